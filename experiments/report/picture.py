r"""Draws the picture of the README: its own first block is run, and what that block found is shown.

python -m experiments.report.picture
"""

import dataclasses
import re
from pathlib import Path

from experiments import config
from lft_jax.cli.picture import attack_picture


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the binary."""

    document: str = config.option("README.md", "Markdown file whose first Python block makes a `result`.")
    output: str = config.option("docs/images/attack.png", "Picture to write.")


def draw(flags: Config) -> None:
    """Runs the block and draws its perturbation, with images before and after."""
    block = re.search(r"```python\n(.*?)```", Path(flags.document).read_text(encoding="utf-8"), re.DOTALL)
    if block is None:
        raise ValueError(f"document: {flags.document} has no Python block.")
    names: dict = {"__name__": "document"}
    exec(compile(block[1], flags.document, "exec"), names)
    attack_picture(names["model"], names["test"], {"uap-linf": names["result"].perturbation}, Path(flags.output))
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    config.main(Config, draw)
