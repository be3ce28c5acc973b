"""Markdown section of the study of outer losses: LFT, L2O and the rule without meta-training."""

from collections.abc import Mapping
from typing import Any

from experiments.report.origins import origin


def objectives_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Success of a rule meta-trained on query images, on support images, and not at all."""
    del figures
    flags = results["flags"]
    lines = [
        "## LFT, L2O and the rule without meta-training",
        "",
        f"The rule of `uap-linf`, meta-trained with {flags['seeds']} seeds in {flags['meta_steps']} meta-steps on "
        f"{len(flags['victims'])} victims. LFT's outer loss is of query images, L2O's of support images; all else is "
        "the same. Both fine-tune on proxies. Attack success rate, %, mean ± 95% interval over "
        f"{flags['draws']} draws of {flags['images']} support images, with K = {flags['steps']}; for each draw it is "
        "the mean over seeds, whose own means are in brackets. Differences are paired by draw. Nothing was chosen on "
        f"these models. {origin(results, path)}",
        "",
        "| model | LFT | L2O | untrained | LFT minus L2O | LFT minus untrained |",
        "|---" * 6 + "|",
    ]
    for model in results["models"]:
        cells = [_percent(model[name]) for name in ("lft", "l2o", "untrained")]
        cells += [_percent(model[name], "+") for name in ("lft minus l2o", "lft minus untrained")]
        lines.append(f"| `{model['model']}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Victims of the meta-training: " + ", ".join(_names(flags)) + ".", ""])


def _names(flags):
    return [f"`{victim.removeprefix('victims/')}`" for victim in flags["victims"]]


def _percent(found, sign=""):
    width = "" if found["interval"] is None else f" ± {100 * found['interval']:.1f}"
    seeds = ", ".join(f"{100 * value:{sign}.1f}" for value in found["seed_asr"])
    return f"{100 * found['asr']:{sign}.1f}{width} ({seeds})"
