"""Section and figure of few-shot classification of Omniglot's small sets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.report.figures import COLOURS
from experiments.report.origins import origin
from experiments.report.sections import classification_tables, settings_tried
from lft_jax.cli.picture import save

#: Published accuracies, %, with 95% intervals, of 5-way tasks with 1 and with 5 shots on the whole of Omniglot. Those
#: of arXiv 1703.03400 and 1803.02999 are with batch statistics of the query images.
PUBLISHED = {
    "maml": ((98.7, 0.4), (99.9, 0.1), "arXiv 1703.03400"),
    "first_order_maml": ((98.3, 0.5), (99.2, 0.2), "arXiv 1803.02999"),
    "meta_sgd": ((99.53, 0.26), (99.93, 0.09), "arXiv 1707.09835"),
    "reptile": ((97.68, 0.04), (99.48, 0.06), "arXiv 1803.02999"),
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
        f"`{network}`, with {width} filters of each convolution (published: 64), on {size}x{size} pixels; it "
        "normalizes by batch statistics, also of the images to classify (transductive, as published).",
        "",
        "Images are Omniglot's small sets: `small1`, 136 characters, for meta-training, `small2`, 156 characters, for "
        "tests. 50 characters (the Greek and the Latin alphabet) are in both, with the same drawings; meta-training "
        "does not have them. Of the other 86 every fifth (18) is held out for tuning. The remaining 68, with their "
        "rotations by quarter turns, are 272 classes for meta-training. Accuracy on characters of meta-training is on "
        f"18 of these classes, that on held-out characters on the 18, {flags['familiar_tasks']} tasks each.",
        "",
        f"Meta-steps: {flags['meta_steps']:,} of {flags['tasks']} tasks, {flags['rule_meta_steps']:,} for LFT and "
        f"joint. MAML, ANIL and Meta-SGD are meta-trained with {flags['maml_steps']} inner step and judged after up to "
        f"{flags['num_steps']}, as in arXiv 1703.03400, appendix A.1. The LFT, SGD and Adam start from random weights. "
        f"Settings are the best of several on tuning tasks. {settings_tried(rows)} {origin(results, path)}",
        "",
    ]
    if resumed := results["provenance"].get("resumed_at_commits"):
        lines += [f"The run was interrupted, and went on at commit {', '.join(resumed)}.", ""]
    lines += _missing(results)
    for shots in _shown(results):
        lines += _compared(results, shots)
    lines += [*_explained(results), f"![accuracies]({figures}.png)", "", "**By step, and incongruous tasks.**", ""]
    return "\n".join([*lines, *classification_tables(results), ""])


def _missing(results):
    """A line that names the rows of an unfinished run which are still to be measured."""
    flags = results["flags"]
    methods = ["sgd", "adam", "lft"]
    cases = [("congruous", flags["congruous"], [*methods, *flags["initializations"]])]
    cases += [("incongruous", case, methods) for case in flags["incongruous"]]
    known = {(row["shots"], row["part"], row["case"], row["method"]) for row in results["rows"]}
    missing = []
    for shots in flags["shots"]:
        for part, case, names in cases:
            left = [name for name in names if (shots, part, case, name) not in known]
            missing += [f"{shots}-shot, {part}, `{case}`: {', '.join(left)}"] if left else []
    return [f"**Not measured yet**: {'; '.join(missing)}.", ""] if missing else []


def _shown(results):
    """The numbers of images per character that there are rows of."""
    return list(dict.fromkeys(row["shots"] for row in results["rows"]))


def _compared(results, shots):
    """Lines of a table: accuracy by method and kind of characters, and the published one."""
    lines = [
        f"**{shots}-shot**, after {results['flags']['num_steps']} steps:",
        "",
        "| method | " + " | ".join(KINDS.values()) + " | familiar minus test | published, whole set |",
        "|---" * (len(KINDS) + 3) + "|",
    ]
    for name, found in _final(results, shots).items():
        published = PUBLISHED.get(name) if shots in _SHOTS else None
        cells = [f"{100 * mean:.1f} ± {100 * width:.1f}" for mean, width in found.values()]
        cells.append(f"{100 * (found['familiar'][0] - found['accuracy'][0]):+.1f}")
        cells.append("{} ± {}".format(*published[_SHOTS.index(shots)]) + f" ({published[2]})" if published else "")
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
    """Lines on where the difference between MAML's accuracies here and the published ones comes from."""
    flags, parts = results["flags"], []
    for shots in _shown(results):
        final = _final(results, shots)
        if "maml" not in final or shots not in _SHOTS:
            continue
        familiar, test = (100 * final["maml"][kind][0] for kind in ("familiar", "accuracy"))
        others = [name for name in (_CENTROID, "sgd", "adam") if name in final]
        lost = {name: 100 * (final[name]["familiar"][0] - final[name]["accuracy"][0]) for name in others}
        published = PUBLISHED["maml"][_SHOTS.index(shots)][0]
        left = [max(0.0, familiar - test - number) for number in lost.values()]
        fitted = f"{min(left):.1f} to {max(left):.1f} points are" if any(left) else "nothing is"
        parts.append(
            f"With {shots} image{'s' if shots > 1 else ''} per character MAML has {test:.1f} on test characters, "
            f"published are {published}. Of these {published - test:.1f} points, {published - familiar:.1f} are "
            f"missing on characters of its own meta-training already ({familiar:.1f}), where unseen characters are no "
            f"reason. The other {familiar - test:.1f} lie between those and test characters. Methods that were not "
            f"meta-trained on any lose {', '.join(f'{number:.1f} ({name})' for name, number in lost.items())} there, "
            f"as the sets differ in difficulty; {fitted} left for over-fitting."
        )
    if not parts:
        return []
    parts.append(
        f"The published meta-training has 60,000 meta-steps of 32 tasks instead of {flags['meta_steps']:,} of "
        f"{flags['tasks']}, 64 filters, and 1,200 characters with rotations instead of 68."
    )
    lines = ["**Why the accuracies are below the published ones.** " + " ".join(parts), ""]
    lengths = results.get("lengths", ())
    if len(lengths) > 1:
        kinds = ("familiar", "validation", "test")
        first, last = ([100 * row[f"{kind}_accuracy"][0] for kind in kinds] for row in (lengths[0], lengths[-1]))
        gained = [f"{after - before:+.1f}" for before, after in zip(first, last, strict=True)]
        lines += [
            f"Longer meta-training, 1-shot, first seed: from {lengths[0]['meta_steps']:,} to "
            f"{lengths[-1]['meta_steps']:,} meta-steps MAML gains {gained[0]} points on characters of its "
            f"meta-training, {gained[1]} on held-out ones of the same alphabets and {gained[2]} on test characters.",
            "",
            "| meta-steps | " + " | ".join(KINDS.values()) + " |",
            "|---" * (1 + len(KINDS)) + "|",
        ]
        for row in lengths:
            pairs = [row[f"{kind}_accuracy"] for kind in kinds]
            cells = [f"{100 * mean:.1f} ± {100 * width:.1f}" for mean, width in pairs]
            lines.append(f"| {row['meta_steps']:,} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws the accuracy of each method on familiar, held-out and test characters, one panel per number of images."""
    shown = _shown(results)
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
                axis.plot(
                    PUBLISHED[name][_SHOTS.index(shots)][0],
                    height,
                    marker="*",
                    color="black",
                    linestyle="",
                    markersize=8,
                    zorder=3,
                )
        axis.plot([], [], marker="*", color="black", linestyle="", markersize=8, label="published, whole set")
        axis.set_yticks(range(len(final)), final if axis is axes[0, 0] else [""] * len(final))
        axis.invert_yaxis()
        axis.set(title=f"{results['flags']['ways']}-way, {shots}-shot", xlabel="accuracy, %")
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(figure, path)
