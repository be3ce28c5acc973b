"""Section and figure of few-shot classification of Omniglot's small sets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.report.figures import COLOURS
from experiments.report.sections import classification_tables, settings_tried
from experiments.report.tables import origin
from lft_jax.cli.picture import save

#: Published accuracies, %, of 5-way tasks with 1 and with 5 shots, on the whole of Omniglot.
PUBLISHED = {
    "maml": ("98.7 ± 0.4", "99.9 ± 0.1", "arXiv 1703.03400, table 1"),
    "first_order_maml": ("98.3 ± 0.5", "99.2 ± 0.2", "arXiv 1803.02999, table 2"),
    "meta_sgd": ("99.53 ± 0.26", "99.93 ± 0.09", "arXiv 1707.09835, table 2"),
    "reptile": ("97.68 ± 0.04", "99.48 ± 0.06", "arXiv 1803.02999, table 2, with transduction"),
}
_SHOTS = (1, 5)  # of the columns above
#: Which characters methods are judged on, in the order of the columns.
KINDS = {
    "familiar": "characters of meta-training",
    "validation": "held out of the same alphabets",
    "accuracy": "test: other alphabets",
}
_CENTROID = "nearest centroid of pixels"


def omniglot_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Few-shot classification of handwritten characters, beside published accuracies."""
    flags, rows = results["flags"], results["rows"]
    _, size, network, width = flags["congruous"].split(":")
    lines = [
        "## Few-shot classification of handwritten characters (Omniglot's small sets)",
        "",
        f"Accuracy, %, on {flags['ways']}-way tasks with {' or '.join(map(str, flags['shots']))} images of each "
        f"character and 15 others to classify, mean ± 95% interval over {flags['num_tasks']} test tasks, mean over "
        f"{len(flags['seeds'])} meta-training seeds (in brackets their range). The network is MAML's for Omniglot, "
        f"`{network}`, with {width} filters instead of 64, on {size}x{size} pixels: batch statistics, also over the "
        "images to classify (transductive). Images: Omniglot's `small1` for meta-training, `small2` for tests. "
        "50 characters (Greek and Latin) are in both, with the same drawings; meta-training does not have them. Of the "
        "other 86 of `small1`, every fifth (18) is for tuning, and 68, with their rotations by quarter turns 272 "
        "classes, for meta-training. "
        f"Meta-steps: {flags['meta_steps']:,} of {flags['tasks']} tasks, {flags['rule_meta_steps']:,} for LFT and "
        f"joint. MAML, ANIL and Meta-SGD are meta-trained with {flags['maml_steps']} inner step and judged after up to "
        f"{flags['num_steps']}, as in arXiv 1703.03400, appendix A.1. The LFT, SGD and Adam start from random weights. "
        f"Settings are the best of several on tuning tasks. {settings_tried(rows)} {origin(results, path)}",
        "",
    ]
    for shots in flags["shots"]:
        lines += _compared(results, shots)
    lines += [_explained(results), "", f"![accuracies]({figures}.png)", "", "### By step, and incongruous tasks", ""]
    return "\n".join([*lines, *classification_tables(results), ""])


def _compared(results, shots):
    """Lines of a table: accuracy by method and kind of characters, and the published one."""
    lines = [
        f"**{shots}-shot**, after {results['flags']['num_steps']} steps:",
        "",
        "| method | " + " | ".join(KINDS.values()) + " | familiar minus test | published, whole set |",
        "|---" * (len(KINDS) + 3) + "|",
    ]
    for name, found in _final(results, shots).items():
        published = PUBLISHED.get(name)
        cells = [f"{100 * mean:.1f} ± {100 * width:.1f}" for mean, width in found.values()]
        cells.append(f"{100 * (found['familiar'][0] - found['accuracy'][0]):+.1f}")
        cells.append(f"{published[_SHOTS.index(shots)]} ({published[2]})" if published and shots in _SHOTS else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _final(results, shots):
    """`{method: {kind: (mean, width)}}` of the congruous tasks, after the last step."""
    final = {}
    for row in results["centroids"]:
        if row["shots"] == shots:
            kinds = {"familiar": "familiar_accuracy", "validation": "validation_accuracy", "accuracy": "test_accuracy"}
            final[_CENTROID] = {kind: row[name] for kind, name in kinds.items()}
    for row in results["rows"]:
        if (row["shots"], row["part"]) == (shots, "congruous"):
            found = {kind: row[f"{kind}_accuracy"] for kind in ("familiar", "validation")}
            final[row["method"]] = {**found, "accuracy": (row["accuracy"][-1], row["accuracy_interval"][-1])}
    return final


def _explained(results):
    """Why the accuracies are below the published ones, by the figures of MAML."""
    return ""


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws the accuracy of each method on familiar, held-out and test characters, one panel per number of images."""
    shown = results["flags"]["shots"]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.8 * len(shown), 4), squeeze=False, layout="constrained")
    for axis, shots in zip(axes[0], shown, strict=True):
        final = _final(results, shots)
        for height, (name, found) in enumerate(final.items()):
            colour = COLOURS.get(name, "#777777")
            means, widths = ([100 * pair[number] for pair in found.values()] for number in (0, 1))
            axis.plot(means, [height] * len(means), color=colour, alpha=0.4)
            for mean, width, marker, kind in zip(means, widths, "o^s", KINDS.values(), strict=True):
                label = kind if not height else None
                face = colour if marker == "s" else "white"
                style = {"marker": marker, "color": colour, "markerfacecolor": face, "markersize": 6}
                axis.errorbar(mean, height, xerr=width, label=label, capsize=2, **style)
            if name in PUBLISHED and shots in _SHOTS:
                number = float(PUBLISHED[name][_SHOTS.index(shots)].split()[0])
                axis.plot(number, height, marker="*", color="black", linestyle="", markersize=8, zorder=3)
        axis.plot([], [], marker="*", color="black", linestyle="", markersize=8, label="published, whole set")
        axis.set_yticks(range(len(final)), final if axis is axes[0, 0] else [""] * len(final))
        axis.invert_yaxis()
        axis.set(title=f"{results['flags']['ways']}-way, {shots}-shot", xlabel="accuracy, %")
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)
