r"""Writes the results of the benchmarks into docs/performance.md, between its `<!-- benchmarks -->` marks.

python -m benchmarks.render
"""

import dataclasses
import json
from pathlib import Path

from experiments import config

BEGIN, END = "<!-- benchmarks -->", "<!-- end of benchmarks -->"


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    meta_step: str = config.option("results/bench_meta_step.json", "Results of benchmarks.meta_step.")
    overhead: str = config.option("results/bench_overhead.json", "Results of benchmarks.overhead.")
    uap: str = config.option("results/bench_uap.json", "Results of benchmarks.uap.")
    growth: str = config.option("results/bench_growth.json", "Results of benchmarks.growth.")
    rewriting: str = config.option("results/bench_rewriting.json", "Results of benchmarks.rewriting.")
    first: str = config.option("results/bench_first.json", "Results of benchmarks.first.")
    adapters: str = config.option("results/bench_adapters.json", "Results of benchmarks.adapters.")
    document: str = config.option("docs/performance.md", "Markdown file with the marks.")


def render(flags: Config) -> None:
    """Replaces the text between the marks."""
    document = Path(flags.document)
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    if END not in rest:
        raise ValueError(f"document: {document} has no marks {BEGIN} and {END}.")
    parts = (
        (meta_step_section, flags.meta_step),
        (rewriting_section, flags.rewriting),
        (first_section, flags.first),
        (adapters_section, flags.adapters),
        (overhead_section, flags.overhead),
        (uap_section, flags.uap),
        (growth_section, flags.growth),
    )
    sections = [section(json.loads(Path(path).read_text(encoding="utf-8")), path) for section, path in parts]
    document.write_text(f"{before}{BEGIN}\n{''.join(sections)}{END}{rest.partition(END)[2]}", encoding="utf-8")


def meta_step_section(results: dict, path: str) -> str:
    """W1: seconds, ratios and parts."""
    lines = ["## A meta-step (W1)", "", _origin(results, path), ""]
    for name, work in results["works"].items():
        lines += [
            f"Perturbed images {'clipped to [0, 1]' if name == 'clip' else 'not clipped'}: "
            f"{work['measured_over_floor']:.1f} times the floor, which is {sum(work['gflop'].values()):.1f} GFLOP at "
            f"{work['matmul_gflop_per_second']:.0f} GFLOP/s, the speed of XLA's matrix product in the same run.",
            "",
            "| | seconds: median (range) | relative to lft_jax | first call |",
            "|---|---|---|---|",
        ]
        for contestant, t in work["seconds"].items():
            lines.append(
                f"| {contestant} | {t['seconds']:.2f} ({min(t['all']):.2f} to {max(t['all']):.2f}) | "
                f"{work['ratio'][contestant]:.2f} | {t['first']:.1f} s |"
            )
        lines += ["", "| part, timed separately | seconds | GFLOP | GFLOP/s |", "|---|---|---|---|"]
        for part, seconds in work["parts_seconds"].items():
            count = work["gflop"][part]
            lines.append(f"| {part} | {seconds:.3f} | {count:.1f} | {count / seconds:.0f} |")
        lines += [f"| rest | {work['rest_seconds']:.3f} | | |", ""]
    return "\n".join([*lines, ""])


def rewriting_section(results: dict, path: str) -> str:
    """Models that a user wrote: W1, and gradients of networks."""
    cores = "one core" if results["cores"] == 1 else f"{results['cores']} cores"
    lines = [
        "## Models of users",
        "",
        _origin(results, path),
        f"All programs of a table in turn in one process on {cores}; computation is that of all "
        "threads, which other processes change less than the time.",
        "",
        "| W1 | time relative to the user's model | computation | seconds of computation |",
        "|---|---|---|---|",
    ]
    for name, t in results["w1"].items():
        ratios = f"{t['seconds_over_user']:.2f} | {t['computed_seconds_over_user']:.2f}"
        lines.append(f"| {name} | {ratios} | {t['computed_seconds']:.2f} |")
    if results["gradients"]:
        lines += [
            "",
            "| gradient of a batch, as written / with fast layers | images | time | computation | largest difference |",
            "|---|---|---|---|---|",
        ]
    for network, row in results["gradients"].items():
        images, difference = "x".join(map(str, row["images"])), f"{row['largest_difference']:.0e}"
        for kind in [kind for kind in row if isinstance(row[kind], dict)]:
            ratios = f"{row[kind]['seconds_ratio']:.2f} | {row[kind]['computed_seconds_ratio']:.2f}"
            lines.append(f"| {network}, {kind} | {images} | {ratios} | {difference} |")
    return "\n".join([*lines, "", ""])


def first_section(results: dict, path: str) -> str:
    """Imports, and the first attack of a process."""
    imported = results["import_seconds"]
    lines = [
        "## Before anything is computed",
        "",
        _origin(results, path),
        f"Without a compilation cache, medians of {len(results['runs']['imports'])} processes each. `import jax` takes "
        f"{imported['jax']:.2f} s, `import lft_jax` after it {imported['lft_jax']:.2f} s.",
        "",
        "| an attack on a LeNet, ten images, 20 steps | first of a process | second |",
        "|---|---|---|",
    ]
    for name, seconds in results["attacks"].items():
        lines.append(f"| {name} | {seconds['first']:.2f} s | {seconds['second']:.3f} s |")
    return "\n".join([*lines, "", ""])


def adapters_section(results: dict, path: str) -> str:
    """Attacks on PyTorch modules."""
    lines = [
        "## Through the PyTorch adapter",
        "",
        _origin(results, path),
        "Ten images. The passes are the gradients and forward passes that the attack asks for, in PyTorch alone.",
        "",
        "| module | an update of `uap-linf`, of a gradient | sign steps / the same loop in PyTorch "
        "| sign steps / passes | default attack / passes | default attack |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results["modules"].items():
        update, signs, default = row["update"], row["signs"], row["default"]
        lines.append(
            f"| {name} | {update['milliseconds']:.2f} ms, {100 * update['share']:.1f}% | {signs['over_pytorch']:.2f} "
            f"| {signs['ratio']:.2f} | {default['ratio']:.2f} | {default['seconds']:.1f} s |"
        )
    return "\n".join([*lines, "", ""])


def overhead_section(results: dict, path: str) -> str:
    """Updates alone, and whole fine-tuning steps."""
    lines = ["## An update compared with Adam", "", _origin(results, path), ""]
    for title, table in (("an update alone", results["update"]), ("a whole fine-tuning step", results["whole_step"])):
        names = list(next(iter(table.values())))
        lines += [f"| {title} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for name, row in table.items():
            cells = [f"{row[m]['milliseconds']:.3f} ms ({row[m]['ratio_to_adam']:.2f})" for m in names]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, ""])


def uap_section(results: dict, path: str) -> str:
    """Universal perturbations, compared with ART."""
    victim, versions = results["victim"], ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    lines = [
        "## Universal perturbations",
        "",
        _origin(results, path),
        f"Victim: a {victim['architecture']} on {victim['source']}, seed {victim['seed']}, clean accuracy "
        f"{victim['test_accuracy']:.3f}; linf ball, radius {results['epsilon']}; ASR on test images, mean over random "
        f"choices of the images ({versions}). Forward and backward are numbers of image evaluations.",
        "",
    ]
    for count, table in results["sizes"].items():
        lines += [
            f"| {count} images | test ASR, % | seconds | relative to the LFT | first call | forward | backward |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in table.items():
            interval = row["asr_interval"]
            spread = "" if interval is None else f" ± {100 * interval:.1f}"
            first = row["first_call_seconds"]
            success = "stopped" if row["asr"] is None else f"{100 * row['asr']:.1f}{spread}"
            lines.append(
                f"| {name} | {success} | {row['seconds']:.2f} | {row['time_over_lft']:.1f} | "
                f"{'' if first is None else f'{first:.1f} s'} | {row['forward']:,.0f} | {row['backward']:,.0f} |"
            )
        draws = len(next(iter(table.values()))["runs"])
        lines += ["", f"({draws} random choice{'s' if draws > 1 else ''} of the images.)", ""]
    return "\n".join([*lines, ""])


def growth_section(results: dict, path: str) -> str:
    """Memory, compilation time, and speed by devices and tasks."""
    methods = list(next(iter(results["memory"].values())))
    lines = [
        "## Memory, compilation, devices",
        "",
        _origin(results, path),
        f"Peak memory of a process that makes two meta-steps of W1; in brackets: before the first. The budget is "
        f"{results['budget_mib']} MiB.",
        "",
        "| peak MiB | " + " | ".join(methods) + " |",
        "|---" * (len(methods) + 1) + "|",
    ]
    for name, row in results["memory"].items():
        cells = [f"{row[m]['peak_mib']:.0f} ({row[m]['peak_mib_before']:.0f})" for m in methods]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| seconds per meta-step | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for name, row in results["memory"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[m]['seconds']:.2f}" for m in methods) + " |")
    first = results["first_meta_step"]
    lines += ["", "| compilation cache | first meta-step | later ones |", "|---|---|---|"]
    lines += [f"| {name} | {case['first_seconds']:.1f} s | {case['seconds']:.2f} s |" for name, case in first.items()]
    lines += [
        "",
        "| devices, processes | tasks per second | largest relative difference to one device |",
        "|---|---|---|",
    ]
    for name, case in results["devices"].items():
        lines.append(f"| {name} | {case['tasks_per_second']:.1f} | {case['largest_difference']:.0e} |")
    tasks = results["tasks"]
    lines += ["", "| tasks per meta-step | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for title, key, digits in (("tasks per second", "tasks_per_second", 1), ("peak MiB", "peak_mib", 0)):
        lines.append(f"| {title} | " + " | ".join(f"{case[key]:.{digits}f}" for case in tasks.values()) + " |")
    return "\n".join([*lines, "", ""])


def _origin(results, path):
    origin, load = results["provenance"], results["load_of_others"]
    return (
        f"From `{path}`: `{origin['command']}`, commit {origin['commit']}, {origin['device']}, "
        f"jax {origin['versions']['jax']}, {'an unknown number of' if load is None else f'{load:.2f}'} cores used by "
        "other processes."
    )


if __name__ == "__main__":
    config.main(Config, render)
