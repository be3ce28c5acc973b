r"""Puts the tables of a results file into a document, between its `<!-- results -->` marks, and draws its curves anew.

python -m experiments.render --results=results/small/results.json --document=README.md
"""

import dataclasses
import json
from pathlib import Path

from experiments import config, figures, tables

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the binary."""

    results: tuple[str, ...] = config.required("Results files of experiments.evaluate or experiments.quickstart.")
    document: str = config.option("README.md", "Markdown file with the marks.")


def render(flags: Config) -> None:
    """Replaces what is between the marks, and the figures of success against step beside the files."""
    document = Path(flags.document)
    results = [(json.loads(Path(path).read_text(encoding="utf-8")), path) for path in flags.results]
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"document: {document} has no marks {BEGIN} and {END}.")
    for found, path in results:
        figures.asr_against_step(found["rows"], Path(path).with_suffix(".png"))
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    sections = "\n".join(tables.results_section(*pair) for pair in results)
    document.write_text(f"{before}{BEGIN}\n{sections}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    config.main(Config, render)
