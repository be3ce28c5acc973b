r"""Draws the picture of the README: runs its first Python block and shows the perturbation it finds.

python -m experiments.report.picture
"""

import dataclasses
import re
from pathlib import Path

from experiments import config
from lft_jax.cli.picture import attack_picture


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    document: str = config.option("README.md", "Markdown file whose first Python block defines model, test and result.")
    output: str = config.option("docs/images/attack.png", "Image file to write.")


def draw(flags: Config) -> None:
    """Runs the block and draws its perturbation, with clean and perturbed images."""
    block = re.search(r"```python\n(.*?)```", Path(flags.document).read_text(encoding="utf-8"), re.DOTALL)
    if block is None:
        raise ValueError(f"document: {flags.document} has no Python block.")
    names: dict = {"__name__": "document"}
    exec(compile(block[1], flags.document, "exec"), names)
    attack_picture(names["model"], names["test"], {"uap-linf": names["result"].perturbation}, Path(flags.output))
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    config.main(Config, draw)
