"""Results as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = (1, 2, 5, 10, 20)  # PROTOCOL 4


def shown_steps(at: Sequence[int]) -> list[int]:
    """Those of the judged steps that a table has columns for: 1, 2, 5, 10, 20 and the last."""
    return [k for k in at if k in _SHOWN or k == at[-1]]


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table a target: query ASR (percent, 95% interval over tasks) after each judged step, by method."""
    targets = dict.fromkeys((row["source"], row["victim"], row["seen_victim"]) for row in rows)
    return "\n".join(_target_table(target, [r for r in rows if r["victim"] == target[1]]) for target in targets)


def results_section(results: Mapping[str, Any], path: str) -> str:
    """The tables of a results file, those of unseen victims first, and where they come from."""
    rows, origin = results["rows"], results["provenance"]
    tasks, protocol = results["tasks"], results["protocol"]
    victims = {victim for run in results["meta_training"] for victim in run["victims"]}
    about = (
        f"Attack success rate on unseen images after K fine-tuning steps on {tasks['shots']} support image(s) of each "
        f"of {tasks['ways']} classes; mean ± 95% interval over {protocol['num_tasks']} tasks. One LFT, and one L2O, "
        f"meta-trained on {len(victims)} victims of all sources together (of several seeds: the mean, and the range of "
        "their ASR at the last K). Baselines are tuned over grids of 24 to 48 "
        "settings (step, momentum, schedule, loss) on validation tasks of the same victim; the oracle sees all "
        'training images. "Steps" are those until a method\'s mean ASR reaches the final one of tuned PGD. '
        f"From `{path}`: `{origin['command']}`, commit {origin['commit']}, {origin['device']}."
    )
    unseen = [row for row in rows if not row["seen_victim"]]
    seen = [row for row in rows if row["seen_victim"]]
    parts = [about, "", comparison_table(unseen)]
    if seen:
        parts += ["Victims that were in meta-training (unseen images only):", "", comparison_table(seen)]
    return "\n".join(parts)


def sine_section(results: Mapping[str, Any], path: str) -> str:
    """Sine regression: mean squared errors by network and method."""
    flags, rows = results["flags"], results["rows"]
    lines = [
        "## Sine regression",
        "",
        f"Mean squared error on 100 points of a curve after steps on 10 others, mean ± 95% interval over "
        f"{flags['num_tasks']} curves, and the mean of {len(flags['seeds'])} meta-training seeds. The LFT is one, "
        f"meta-trained on networks of all {len(flags['widths'])} widths together; it, SGD and Adam start from random "
        f"weights. {_origin(results, path)}",
        "",
    ]
    for width in dict.fromkeys(row["width"] for row in rows):
        shown = shown_steps(range(1, 1 + len(rows[0]["error"])))
        lines += [
            f"Network of two layers of {width}:",
            "",
            "| method | "
            + " | ".join(f"{k} step{'s' if k > 1 else ''}" for k in shown)
            + " | minus SGD | minus Adam |",
            "|---" * (len(shown) + 3) + "|",
        ]
        for row in (row for row in rows if row["width"] == width):
            cells = [f"{row['error'][k - 1]:.3f} ± {row['error_interval'][k - 1]:.3f}" for k in shown]
            cells += ["{:+.3f} ± {:.3f}".format(*row[f"difference_to_{name}"]) for name in ("sgd", "adam")]
            rate = f", learning rate {row['learning_rate']}" if "learning_rate" in row else ""
            lines.append(f"| {row['method']}{rate} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, f"![errors]({_beside(path)})", "", ""])


def theory_section(results: Mapping[str, Any], path: str) -> str:
    """The gap between the meta-gradients of LFT and L2O against the number of images."""
    flags, victim = results["flags"], results["victim"]
    lines = [
        "## The gap between LFT and L2O",
        "",
        f"Norms of meta-gradients on tasks of `{victim['source']}` against a `{victim['architecture']}`, K = "
        f"{flags['num_steps']}, {flags['ways']} classes, means over {flags['num_tasks']} tasks; the rule is "
        f"`{flags['rule']}`, as it was shipped and with weights that were not meta-trained. {_origin(results, path)}",
        "",
    ]
    for name, rows in results["rows"].items():
        decay = results["decay"][name]
        lines += [
            f"**{name}**: the gap on a task falls with the number of images to the power of "
            f"-{decay['exponent']:.3f} (95% interval {decay['low']:.3f} to {decay['high']:.3f}).",
            "",
            "| support = query images | gap on a task | LFT's meta-gradient on a task | gap of the means | LFT's mean "
            "meta-gradient | std of the support gradient | of the query gradient |",
            "|---" * 7 + "|",
        ]
        for row in rows:
            numbers = [
                row["gaps"]["mean"],
                row["norms"]["mean"],
                row["mean_gap"],
                row["mean_norm"],
                row["support_variance"]["mean"] ** 0.5,
                row["query_variance"]["mean"] ** 0.5,
            ]
            lines.append(f"| {row['images']} | " + " | ".join(f"{number:.3g}" for number in numbers) + " |")
        lines.append("")
    return "\n".join([*lines, f"![gap]({_beside(path)})", "", ""])


def _origin(results, path):
    origin = results["provenance"]
    return f"From `{path}`: `{origin['command']}`, commit {origin['commit']}, {origin['device']}."


def _beside(path):
    """Where the figure of a results file lies, seen from docs/."""
    return f"../{path.removesuffix('.json')}.png"


def _target_table(target, rows):
    source, victim, seen = target
    at = rows[0]["at"]
    shown = shown_steps(at)
    lines = [
        f"**{source}**, victim `{victim}` ({'seen' if seen else 'not seen'} in meta-training), "
        f"clean accuracy {100 * rows[0]['clean_accuracy']:.1f}%",
        "",
        "| query ASR, % | "
        + " | ".join(f"K = {k}" for k in shown)
        + " | minus tuned PGD | steps | gap closed | augmented | l1 | l2 | linf |",
        "|---" * (len(shown) + 8) + "|",
    ]
    for row in rows:
        cells = [
            f"{100 * asr:.1f} ± {_percent(width)}"
            for k, asr, width in zip(at, row["asr"], row["asr_interval"], strict=True)
            if k in shown
        ]
        if row["method"] in ("oracle", "transfer"):  # not fine-tuned: the same at every step
            cells = [""] * (len(cells) - 1) + cells[-1:]
        elif row["seeds"] > 1:
            cells[-1] += f" ({100 * min(row['seed_asr']):.1f} to {100 * max(row['seed_asr']):.1f})"
        mean, width = row["difference_to_tuned_pgd"]
        gaps = [row[name] for name in ("gap_closed", "gap_closed_augmented")]
        cells += [
            f"{100 * mean:+.1f} ± {_percent(width)}",
            str(row["steps_to_tuned_pgd"] or ""),
            *("" if gap is None else f"{100 * gap:.0f}%" for gap in gaps),
            f"{row['l1']:.1f}",
            f"{row['l2']:.2f}",
            f"{row['linf']:.3f}",
        ]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _percent(width):
    return "?" if width is None else f"{100 * width:.1f}"
