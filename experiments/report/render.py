r"""Puts the tables of results files into a document, between its `<!-- results -->` marks, and draws their curves anew.

python -m experiments.report.render --results=results/hard/mnist.json,results/theory_gap.json
python -m experiments.report.render --results=results/hard/mnist.json --document=README.md --summary
"""

import dataclasses
import json
import os
from pathlib import Path

from experiments import config
from experiments.report import figures, sections, tables


def _draw_comparison(results, path):
    figures.asr_against_step(results["rows"], path)
    figures.steps_to_reach(results["rows"], path.with_name(f"{path.stem}_steps.png"))


#: By the binary that made a file, its tables and its figure, if any; all others are comparisons.
KINDS = {
    "sine": (sections.sine_section, lambda results, path: figures.sine(results["rows"], path)),
    "zo_l2l": (sections.zo_l2l_section, figures.zo_l2l),
    "classification": (
        sections.classification_section,
        lambda results, path: figures.classification(results["rows"], path),
    ),
    "theory_gap": (sections.theory_section, figures.theory_gap),
    "breadth": (sections.breadth_section, lambda results, path: None),
    "ablation": (sections.ablation_section, lambda results, path: None),
    "directions": (sections.directions_section, lambda results, path: None),
}
COMPARISON = (tables.results_section, _draw_comparison)
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the binary."""

    results: tuple[str, ...] = config.required("Results files of the experiments, .json.")
    document: str = config.option("docs/results.md", "Markdown file with the marks.")
    summary: bool = config.option(False, "Only a line a victim, of comparisons, without figures.")


def render(flags: Config) -> None:
    """Replaces what is between the marks, and the figures of success against step beside the files."""
    document = Path(flags.document)
    results = [(json.loads(Path(path).read_text(encoding="utf-8")), path) for path in flags.results]
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"document: {document} has no marks {BEGIN} and {END}.")
    compared = [found for found, _ in results if _kind(found) not in KINDS]
    sections = [(tables.summary if flags.summary else tables.claims)(compared)]
    for found, path in [] if flags.summary else results:
        section, draw = KINDS.get(_kind(found), COMPARISON)
        draw(found, Path(path).with_suffix(".png"))
        beside = os.path.relpath(Path(path).with_suffix(""), document.parent)
        sections.append(section(found, path, beside))
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    joined = "\n".join(filter(None, sections))
    document.write_text(f"{before}{BEGIN}\n{joined}{END}{after}", encoding="utf-8")


def _kind(results):
    """The binary that made a file, without its package, which has changed over time."""
    return results["provenance"]["command"].split()[2].rpartition(".")[2]


if __name__ == "__main__":
    config.main(Config, render)
