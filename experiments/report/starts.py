"""Markdown section of the study of learned starts: what was learned, and success after it at equal evaluations."""

from collections.abc import Mapping
from typing import Any

from experiments.report.origins import origin


def starts_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Which patterns fool which victims, the learned distribution, and attacks that begin from both."""
    del figures
    flags, chosen = results["flags"], results["chosen"]
    sources = list(dict.fromkeys(results["sources"]))
    lines = [
        "## A learned distribution of the patterns that attacks begin from",
        "",
        f"{flags['patterns']} random patterns at each of {len(flags['radii'])} radii were tried on "
        f"{len(flags['victims'])} victims for meta-training, on large images at one radius. {origin(results, path)}",
        "",
        "Mean rank correlation of the losses of two victims over the same patterns:",
        "",
        "| sources | waves | tiles |",
        "|---|---|---|",
    ]
    ranks = {(*row["sources"], row["patterns"]): f"{row['correlation']:.2f}" for row in results["ranks"]}
    for first, second in dict.fromkeys(key[:2] for key in ranks):
        cells = (ranks[first, second, kind] for kind in ("waves", "tiles"))
        lines.append(f"| {first}, {second} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Gain in points over uniform patterns of the best of as many draws as a search makes, in closed form, on "
        "victims and patterns that were left out. The penalty is on the divergence from the uniform distribution. "
        f"Chosen: {chosen['parts']}, penalty {chosen['penalty']:g}.",
        "",
        "| learned parts | penalty | " + " | ".join(sources) + " |",
        "|---" * (2 + len(sources)) + "|",
    ]
    for row in results["validation"]:
        cells = (f"{100 * row['source_gain'][source]:+.1f}" for source in sources)
        lines.append(f"| {row['parts']} | {row['penalty']:g} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Attack success rate, %, from {flags['images']} images for choosing at equal evaluations, and the difference "
        "paired by draw with its 95% interval. K = 0 is the search alone.",
        "",
        "| model | K | evaluations | draws | uniform | learned | difference |",
        "|---" * 7 + "|",
    ]
    for row in results["models"]:
        width = "" if row["interval"] is None else f" ± {100 * row['interval']:.1f}"
        cells = [f"`{row['model']}`", row["steps"], f"{row['evaluations']['learned']:,.0f}", row["draws"]]
        cells += [f"{100 * row[start]:.1f}" for start in ("uniform", "learned")]
        cells.append(f"{100 * row['difference']:+.1f}{width}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])
