"""Markdown section of the study of the learned tile: what it does to each model before any step."""

from collections.abc import Mapping
from typing import Any

from experiments.report.origins import origin

_SHOWN = ("learned_on", "images", "period", "optimizer", "steps", "seed")


def tile_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """A row for each tile that was learned: attack success rate on the model it is of, and on others."""
    del figures
    rows = results["rows"]
    models = {row["model"]: row["role"] for row in rows}
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        key = tuple(row[name] for name in _SHOWN)
        found.setdefault(key, {})[row["model"]] = row["asr"]
    lines = [
        "## A tile to begin with, learned on one model",
        "",
        "A long attack on a public model along gradients averaged over translations by the period. Attack success "
        f"rate, %, of what it found on unseen images, before any step on the attacked model. {origin(results, path)}",
        "",
        "| learned on | images | period | steps of | steps | seed | "
        + " | ".join(f"`{model}`, {role}" for model, role in models.items())
        + " |",
        "|---" * (len(_SHOWN) + len(models)) + "|",
    ]
    for key, rates in sorted(found.items()):
        cells = [*map(str, key), *(f"{100 * rates[model]:.1f}" if model in rates else "" for model in models)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
