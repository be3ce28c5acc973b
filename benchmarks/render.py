r"""Puts the benchmarks' results into docs/performance.md, between its `<!-- benchmarks -->` marks.

python -m benchmarks.render
"""

import dataclasses
import json
from pathlib import Path

from experiments import config

BEGIN, END = "<!-- benchmarks -->", "<!-- end of benchmarks -->"


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the binary."""

    meta_step: str = config.option("results/bench_meta_step.json", "Results of benchmarks.meta_step.")
    overhead: str = config.option("results/bench_overhead.json", "Results of benchmarks.overhead.")
    document: str = config.option("docs/performance.md", "Markdown file with the marks.")


def render(flags: Config) -> None:
    """Replaces what is between the marks."""
    document = Path(flags.document)
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    if END not in rest:
        raise ValueError(f"document: {document} has no marks {BEGIN} and {END}.")
    sections = [
        section(json.loads(Path(path).read_text(encoding="utf-8")), path)
        for section, path in ((meta_step_section, flags.meta_step), (overhead_section, flags.overhead))
    ]
    document.write_text(f"{before}{BEGIN}\n{''.join(sections)}{END}{rest.partition(END)[2]}", encoding="utf-8")


def meta_step_section(results: dict, path: str) -> str:
    """W1: seconds, ratios, and the parts."""
    lines = ["## A meta-step (W1)", "", _origin(results, path), ""]
    for name, work in results["works"].items():
        lines += [
            f"Perturbed images {'clipped to [0, 1]' if name == 'clip' else 'not clipped'}; "
            f"{work['measured_over_floor']:.1f} times the floor: {sum(work['gflop'].values()):.1f} GFLOP at the "
            f"{work['matmul_gflop_per_second']:.0f} GFLOP/s that XLA's matrix product reached in the same run.",
            "",
            "| | seconds (median; least to most) | its time over ours | first call |",
            "|---|---|---|---|",
        ]
        for contestant, t in work["seconds"].items():
            lines.append(
                f"| {contestant} | {t['seconds']:.2f} ({min(t['all']):.2f} to {max(t['all']):.2f}) | "
                f"{work['ratio'][contestant]:.2f} | {t['first']:.1f} s |"
            )
        lines += ["", "| part, run alone | seconds | GFLOP | GFLOP/s |", "|---|---|---|---|"]
        for part, seconds in work["parts_seconds"].items():
            count = work["gflop"][part]
            lines.append(f"| {part} | {seconds:.3f} | {count:.1f} | {count / seconds:.0f} |")
        lines += [f"| rest | {work['rest_seconds']:.3f} | | |", ""]
    return "\n".join([*lines, ""])


def overhead_section(results: dict, path: str) -> str:
    """Updates alone, and whole fine-tuning steps."""
    lines = ["## An update beside Adam's", "", _origin(results, path), ""]
    for title, table in (("an update alone", results["update"]), ("a whole fine-tuning step", results["whole_step"])):
        names = list(next(iter(table.values())))
        lines += [f"| {title} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for name, row in table.items():
            cells = [f"{row[m]['milliseconds']:.3f} ms ({row[m]['ratio_to_adam']:.2f})" for m in names]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, ""])


def _origin(results, path):
    origin = results["provenance"]
    return (
        f"From `{path}`: `{origin['command']}`, commit {origin['commit']}, {origin['device']}, "
        f"jax {origin['versions']['jax']}, {results['load_of_others']:.2f} cores used by others."
    )


if __name__ == "__main__":
    config.main(Config, render)
