"""Markdown section of the study of public models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments.report.origins import origin

#: Methods of the study of public models, by the first part of their names.
_METHODS = {
    "uap-linf": "the pretrained rule, on periods, from the default start",
    "coarse-to-fine": "`short-steps` with longer periods opened as a run goes on (decision 020 did not adopt it)",
    "uap-linf-8": "`uap-linf` whose long periods need twice the signal to noise (before decision 031)",
    "uap-linf-zeros": "`uap-linf` on large images from zeros, with steps 2.5 times as long (before decision 028)",
    "short-steps": "a third of the step, at every size from the best of 65 patterns (before decision 026)",
    "short-steps-zeros": "a third of the step, from zeros (before decision 026)",
    "open-periods": "the same as `short-steps`, whose last perturbation was always the result (before decision 020)",
    "frequencies": "the rule of decision 017, which gated single frequencies, as `uap-linf` was before decision 019",
    "spatial-linf": "the pretrained rule on pixels",
    "pgd": "momentum sign steps with an untuned step size",
    "periods": "`lft_jax.optimizers.periodic_descent`",
    "uap-sgd": "steps on small batches, clamped cross-entropy (Shafahi et al. 2020, arXiv 1811.11304)",
    "sga": "steps along the aggregated gradients of small batches (Liu et al. 2023, arXiv 2308.06015)",
    "df-uap": "Adam on the clamped logit margin (Zhang et al. 2020, arXiv 2007.06189)",
    "cosine-uap": "Adam on the cosine similarity to the clean logits (Zhang et al. 2021, ICCV)",
    "sign": "momentum sign steps",
    "adam": "Adam",
    "periodic": "momentum sign steps along the gradient's mean over translations by that many pixels",
    "tile": "the best of random 2x2 tiles and changes of it, with the evaluations of K steps",
    "wave": "the best of random plane waves and changes of it, with the evaluations of K steps",
    "patterns": "the best of tiles and waves (`PatternSearch`); at the end of a name, as the start of the method",
    "from-tile": "at the end of a name: from the learned tile, with 0.4 times its steps, as `uap-linf`",
}
_BATCHES = {
    "plain": "on the support images alone",
    "shifts": "on shifted support images",
    "augmented": "on the support images with shifts, mixing and noise of 0.2 (`Augmentation()`)",
}


def public_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Attacks on a public model."""
    about, rows = results["about"], results["rows"]
    title = "Settings of baselines" if all(" " in row["method"] for row in rows) else "Attacks"
    kind = "a victim trained here" if about["model"].startswith(about["source"]) else "a public model"
    former = any(row["method"] == "frequencies" for row in rows)
    lines = [
        f"## {title} on `{about['model']}`, {kind}{' (before decision 019)' if former else ''}",
        "",
        f"Attack success rate, %, mean ± 95% interval over draws of the support images, on those of {about['queries']} "
        f"unseen images of {about['source']} that are right when clean ({100 * results['clean_accuracy']:.1f}%), in an "
        f"{about['norm']} ball of {255 * about['epsilon']:.3g}/255. All methods have the same draws, and settings that "
        f"are the same for all models. Support images are among {about['support']} others. Role of the model: "
        f"{about['role']}. Differences are paired by draw. Evaluations "
        "are of the model on one image. Seconds are medians over draws, with other programs on the same cores. "
        f"{origin(results, path)}",
        "",
    ]
    for images, steps in sorted({(row["images"], row["steps"]) for row in rows}):
        cell = [row for row in rows if (row["images"], row["steps"]) == (images, steps)]
        lines += _table(cell, f"{images} images, K = {steps}", results["provenance"]["device"])
    elsewhere = _elsewhere(rows, results["provenance"]["device"])
    if elsewhere:
        lines += [f"† measured on {', '.join(sorted(elsewhere))}.", ""]
    if results["ceiling"]:
        lines += [_ceiling(results["ceiling"]), ""]
    lines += _legend(row["method"] for row in rows)
    if any(len({row[name] for row in rows}) > 1 for name in ("steps", "images")):
        lines += [f"![success rate against K and the number of support images]({figures}.png)", ""]
    if results.get("picture"):
        shown = ", ".join(f"`{name}`" for name in results["picture"])
        what = "Perturbations on the first draw, and images with the classes that the model predicts"
        if about["source"] == "imagenet_sample":
            what = "The upper left 64 x 64 pixels of perturbations on the first draw (ImageNet's images are not shown)"
        lines += [
            f"{what}: {shown}.",
            "",
            f"![perturbations]({figures}_perturbations.png)",
            "",
        ]
    return "\n".join([*lines, ""])


#: Methods that were stages of `uap-linf`, or other shipped rules: they are no rivals of it in `public_brief`.
_OWN = ("uap-linf", "short-steps", "coarse-to-fine", "open-periods", "frequencies", "spatial-linf")


def public_brief(found: Sequence[Mapping[str, Any]]) -> str:
    """The shipped rule and its strongest rival on each model, from the same ten images and in as many steps.

    Numbers of steps that fewer than two rivals were measured with are left out. The last line has the means over all
    models, and the rival with the best one.
    """
    lines = ["| model | K | strongest other method | `uap-linf` | against it |", "|---" * 5 + "|"]
    for results in found:
        about, rows = results["about"], [row for row in results["rows"] if row["images"] == 10]
        for own in sorted((row for row in rows if row["method"] == "uap-linf"), key=lambda row: -row["steps"]):
            others = [row for row in rows if row["steps"] == own["steps"] and "difference" in row]
            rivals = [row for row in others if " " not in row["method"] and not row["method"].startswith(_OWN)]
            if len(rivals) < 2:  # the strongest of one is none
                continue
            rival = max(rivals, key=lambda row: row["asr"])
            cells = [
                f"`{about['model']}`",
                str(own["steps"]),
                f"`{rival['method']}`, {_percent(rival['asr'], rival['asr_interval'])}",
                _percent(own["asr"], own["asr_interval"]),
                _relation(rival["difference"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_of_all_models(found), ""])


def _of_all_models(found):
    """The same for the means over the models of the one other method that is best on average.

    Of the draws that all methods have on a model. The interval is over draws, on these models: the variance of the mean
    is that of its parts, and the degrees of freedom are those of one model.
    """
    columns = [
        {
            row["method"]: np.asarray(row["draw_asr"])
            for row in results["rows"]
            if (row["images"], row["steps"]) == (10, 20)
        }
        for results in found
    ]
    own, shared = "uap-linf", set.intersection(*map(set, columns)) if len(columns) > 1 else set()
    rivals = [name for name in shared if name != own and " " not in name and not name.startswith(_OWN)]
    if own not in shared or not rivals:
        return []
    draws = min(len(values) for column in columns for name, values in column.items() if name in {own, *rivals})
    values = {name: np.stack([column[name][:draws] for column in columns]) for name in (own, *rivals)}
    rival = max(rivals, key=lambda name: np.mean(values[name]))

    def mean(values):
        width = None
        if draws > 1:
            variance = np.sum(np.var(values, axis=1, ddof=1)) / draws / len(values) ** 2
            width = stats.t.ppf(0.975, draws - 1) * variance**0.5
        return np.mean(values), width

    difference = dict(zip(("asr", "interval"), mean(values[rival] - values[own]), strict=True))
    cells = [f"the mean of all {len(columns)}", "20", f"`{rival}`, {_percent(*mean(values[rival]))}"]
    cells += [_percent(*mean(values[own])), _relation(difference)]
    return ["| " + " | ".join(cells) + " |"]


def _relation(difference):
    """Of the shipped rule to a rival, from the difference of the rival to it."""
    mean, width = -difference["asr"], difference["interval"]
    if width is None:
        return f"{100 * mean:+.1f}, one draw"
    relation = "level" if abs(mean) <= width else ("ahead" if mean > 0 else "behind")
    return f"{relation} ({_percent(mean, width, '+')})"


def _elsewhere(rows, device):
    """Other devices than that of the latest rows; rows of before 0.3 do not say theirs."""
    return {row["device"] for row in rows if row.get("device", device) != device}


def _table(rows, title, device):
    others = {row["difference"]["to"] for row in rows if "difference" in row}
    rival = f"minus `{others.pop()}`" if others else "difference"
    lines = [
        f"{title}:",
        "",
        f"| method | draws | success | {rival} | fooling rate | evaluations | seconds |",
        "|---" * 7 + "|",
    ]
    for row in sorted(rows, key=lambda row: row["asr"]):
        asr, fooling = (_percent(row[name], row[f"{name}_interval"]) for name in ("asr", "fooling_rate"))
        paired = row.get("difference")
        difference = _percent(paired["asr"], paired["interval"], "+") if paired else ""
        cells = [f"`{row['method']}`", len(row["draw_asr"]), asr, difference, fooling]
        mark = "†" if _elsewhere([row], device) else ""
        cells += [f"{row['evaluations']:.0f}", f"{row['seconds']:.1f}{mark}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def _percent(mean, width, sign=""):
    return f"{100 * mean:{sign}.1f}" + (f" ± {100 * width:.1f}" if width is not None else "")


def _ceiling(found):
    best = {"loss": found["loss"], "target": found["target"], "start": found["start"]}
    words = ", ".join(f"{name} {value}" for name, value in best.items() if value is not None)
    return (
        f"Ceiling: {100 * found['asr']:.1f}, fooling rate {100 * found['fooling_rate']:.1f}, by the best on the "
        f"support images of {len(found['runs'])} runs of {found['runs'][0]['steps']} momentum sign steps on batches "
        f"of all support images ({words}; {found['evaluations']} evaluations in all)."
    )


def _legend(names):
    names = list(names)
    firsts = {name.partition(" ")[0] for name in names}
    methods = [m for m in _METHODS if any(name == m or name.startswith(f"{m}-") for name in firsts)]
    for end in ("patterns", "from-tile"):
        methods += [end] if end not in methods and any(name.endswith(f"-{end}") for name in names) else []
    lines = [f"- `{method}`: {_METHODS[method]}" for method in methods]
    if any(" " in name for name in names) and not all(" " in name for name in names):
        lines += ["- a method with its settings: tuned, the best of its grid on other images of this same model"]
    ends = [end for end in _BATCHES if any(name.endswith(f"-{end}") for name in names)]
    lines += [f"- `-{end}`: {_BATCHES[end]}; all other methods are on proxies" for end in ends]
    return [*lines, ""]
