"""Markdown tables and sections of comparisons of attacks."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report.origins import origin
from lft_jax import evaluation
from lft_jax.cli.config import pairs
from lft_jax.evaluation.comparison import AUGMENTED, TRANSFER
from lft_jax.victims import DEFAULT_EPSILON, MODELS

_SHOWN = (1, 2, 5, 10, 20)
#: Columns of the gap closed, from the best baseline without augmentation and from the best of all baselines.
_GAP, _GAP_AUGMENTED = "gap closed, without augmentation", "gap closed, with augmentation"


def shown_steps(at: Sequence[int]) -> list[int]:
    """The evaluated steps that a table shows: 1, 2, 5, 10, 20 and the last."""
    return [k for k in at if k in _SHOWN or k == at[-1]]


def comparison_table(rows: Sequence[Mapping[str, Any]], penalised: bool = False) -> str:
    """One table per victim: query ASR (percent, 95% interval over tasks) of each method after some steps.

    If `penalised`, there is also a column for the query loss, which includes the penalty.
    """
    targets = dict.fromkeys((row["source"], row["victim"], row["seen_victim"]) for row in rows)
    return "\n".join(
        _target_table(target, [r for r in rows if r["victim"] == target[1]], penalised) for target in targets
    )


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """One row per unseen victim: the final ASR of the strongest method of each kind."""
    lines = [
        "| victim | tuned PGD | best tuned baseline | best with augmentation | L2O | LFT | full-data oracle | "
        f"LFT minus tuned PGD | LFT minus best with augmentation | {_GAP} | {_GAP_AUGMENTED} |",
        "|---" * 11 + "|",
    ]
    for results, victim, of in _unseen(found):
        lft, l2o = _required_lft(of, victim), _of_learner(of, "l2o")
        plain, augmented = _best_rivals(of, results["protocol"])
        cells = [_final(of["pgd"])]
        cells += [_final(row, named=True) if row else "" for row in (plain, augmented)]
        cells += [_final(row) if row else "" for row in (l2o, lft, of["oracle"])]
        mean, width = lft["difference_to_tuned_pgd"]
        cells += [f"{100 * mean:+.1f} ± {_percent(width)}", _paired(lft, augmented) if augmented else ""]
        cells += [_share(lft["gap_closed"]), _share(lft["gap_closed_augmented"])]
        lines.append(f"| `{victim}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def brief(found: Sequence[Mapping[str, Any]], victims: Sequence[str] = ()) -> str:
    """A short summary of the given unseen victims (all if empty): final ASR and a verdict.

    The verdict compares the LFT with the best baseline with the same augmentation, paired by task.
    """
    lines = [
        "| unseen victim | tuned PGD | tuned, augmented baseline | LFT | full-data oracle | LFT against the baseline |",
        "|---" * 6 + "|",
    ]
    for results, victim, of in _unseen(found):
        if victims and victim not in victims:
            continue
        lft, augmented = _required_lft(of, victim), _best_rivals(of, results["protocol"])[1]
        cells = [_final(row) if row else "" for row in (of["pgd"], augmented, lft, of["oracle"])]
        cells.append(_verdict(lft, augmented) if augmented else "")
        lines.append(f"| `{victim}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _verdict(lft, augmented):
    mean, width = evaluation.mean_interval(np.subtract(lft["task_asr"], augmented["task_asr"]))
    relation = "level" if abs(mean) <= width else ("ahead" if mean > 0 else "behind")
    first = f"{100 * lft['asr'][0]:.0f}% against {100 * augmented['asr'][0]:.0f}% after one step"
    return f"{relation} ({_paired(lft, augmented)}); {first}"


def _unseen(found):
    """Yields `(results, victim, {method: row})` for each unseen victim."""
    for results in found:
        rows = [row for row in results["rows"] if not row["seen_victim"]]
        for victim in dict.fromkeys(row["victim"] for row in rows):
            yield results, victim, {row["method"]: row for row in rows if row["victim"] == victim}


def _required_lft(of, victim):
    lft = _of_learner(of, "lft")
    if lft is None:
        raise ValueError(f"results: a summary needs an lft, and none attacked {victim}.")
    return lft


def claims(found: Sequence[Mapping[str, Any]]) -> str:
    """The LFT against each kind of method, one row per unseen victim; empty if no LFT attacked one.

    Differences are paired by task. Steps are counted up to the final ASR of the best tuned baseline.
    """
    lines = []
    for results, victim, of in _unseen(found):
        first = {learner: _of_learner(of, learner) for learner in ("lft", "l2o", "maml", "joint")}
        plain, augmented = _best_rivals(of, results["protocol"])
        lft, goal = first["lft"], plain["asr"][-1]
        if lft is None:
            continue
        rivals = (of["pgd"], of.get("adam"), augmented)
        untuned = of["pgd (untuned)"]["asr"][-1]
        reached = [row and evaluation.steps_to_reach(row["asr"], goal) for row in first.values()]
        cells = [
            _kind(results),
            f"{lft['asr'][-1] / untuned:.1f}" if untuned else "",
            *(_paired(lft, rival) if rival else "" for rival in rivals),
            *(
                ("never" if steps is None else _reached(row, steps - 1, results["tasks"])) if row else ""
                for row, steps in zip(first.values(), reached, strict=True)
            ),
            _share(lft["gap_closed"]),
            _share(lft["gap_closed_augmented"]) if augmented else "",
        ]
        lines.append(f"| `{victim}` | " + " | ".join(cells) + " |")
    if not lines:
        return ""
    head = (
        "| victim | setting | times untuned PGD | minus tuned PGD | minus tuned Adam | minus best with augmentation | "
        f"steps to the best tuned baseline's final ASR: LFT | L2O | MAML | joint | {_GAP} | {_GAP_AUGMENTED} |"
    )
    about = (
        "Victims that meta-training did not see. Differences are the LFT's final ASR minus that of another method, in "
        "percentage points, mean ± 95% interval, paired by task. Augmented baselines are tuned too. Steps are counted "
        "to the best tuned baseline without augmentation. Gap closed is the share of the distance to a full-data UAP, "
        "from that baseline and from the best of all baselines, augmented ones included."
    )
    title = "## The LFT against each kind of method"
    return "\n".join([title, "", about, "", head, "|---" * 12 + "|", *lines, "", ""])


def _kind(results):
    """The setting in a few words, which distinguish it from other comparisons of the same victim."""
    tasks = results["tasks"]
    if tasks.get("num_directions"):
        return "queries only"
    if tasks.get("penalty"):
        return f"penalty, kappa {tasks.get('kappa', 0.0):g}"
    parts = [f"{tasks['norm']} ball"]
    if tasks["shots"] > 1:
        parts.append(f"{tasks['shots']} images per class")
    if _two_losses(tasks):
        parts.append("two losses")
    if _along_the_gradient(results):
        parts.append("base update along the gradient")
    return ", ".join(parts)


def _two_losses(tasks):
    return tasks.get("second_loss", "none") != "none" and not tasks.get("num_directions")


def _along_the_gradient(results):
    # `start` is the name of the flag in version 0.1.
    return any("gradient" in (run.get("start"), run.get("base_update")) for run in results["meta_training"])


def _reached(row, index, tasks):
    """The step and, for query-only attacks, the queries used up to it."""
    step, queries = str(row["at"][index]), row.get("queries")
    if not (tasks.get("num_directions") and queries):
        return step
    return f"{step} ({queries[index]:.0f} of {queries[-1]:.0f} queries)"


def _of_learner(of, learner):
    """The first row of a learner, or None."""
    return next((row for method, row in of.items() if method.split(" (")[0] == learner), None)


def _best_rivals(of, protocol):
    """Rows of the best tuned baseline without augmentation and of the best with it; None if there is none."""
    plain = (*protocol["methods"], "pgd", "transfer", TRANSFER)
    groups = ([of[m] for m in of if m in plain], [of[m] for m in of if m.endswith(AUGMENTED)])
    return [max(group, key=lambda row: row["asr"][-1], default=None) for group in groups]


def _paired(row, other):
    """Mean difference in final ASR between two rows, in percentage points, with its 95% interval over tasks."""
    mean, width = evaluation.mean_interval(np.subtract(row["task_asr"], other["task_asr"]))
    return f"{100 * mean:+.1f} ± {100 * width:.1f}"


def _final(row, named=False):
    name = f" ({row['method'].removesuffix(AUGMENTED)})" if named else ""
    return f"{100 * row['asr'][-1]:.1f} ± {_percent(row['asr_interval'][-1])}{name}"


def results_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """The section of a comparison: settings, tables (unseen victims first), figures."""
    rows, tasks, protocol = results["rows"], results["tasks"], results["protocol"]
    penalised = bool(tasks.get("penalty"))
    unseen = [row for row in rows if not row["seen_victim"]]
    seen = [row for row in rows if row["seen_victim"]]
    about = [
        f"Attack success rate (ASR, %) on query images after K fine-tuning steps on {_images(tasks)} of "
        f"{tasks['ways']} classes: mean ± 95% interval over {protocol['num_tasks']} tasks. A learner with several "
        "meta-training seeds has the mean over seeds, and in brackets the range of their final ASR.",
        "",
        f"- Gradients: {_gradients(tasks)}.",
        f"- Bound: {_bound(tasks, rows, results['meta_training'])}.",
        f"- Meta-training: {_meta_trained(results['meta_training'], tasks)}.",
        f"- Baselines: {_baselines(tasks, protocol, rows)}.",
        '- "oracle": a full-data UAP, optimized on all training images of the same victim.',
        f"- Columns: {_columns(rows, penalised)}.",
        f"- {origin(results, path)}",
        "",
    ]
    victims = dict.fromkeys(row["victim"] for row in rows)
    named = (
        [f"`{victim}`" for victim in victims] if len(victims) < 3 else list(dict.fromkeys(r["source"] for r in rows))
    )
    title = f"## Attacks on {' and '.join(named)}: {_setting(results)}"
    parts = [title, "", *about, comparison_table(unseen, penalised)]
    if seen:
        parts += ["Victims that were in meta-training (unseen images only):", "", comparison_table(seen, penalised)]
    parts += [
        f"![ASR against the fine-tuning step]({figures}.png)",
        "",
        f"![steps to reach the final ASR of tuned PGD]({figures}_steps.png)",
        "",
    ]
    for victim in dict.fromkeys(row["victim"] for row in unseen):
        parts += [f"![perturbations of {victim}]({figures}_{victim}.png)", ""]
    return "\n".join(parts)


def _images(tasks):
    return f"{tasks['shots']} support image{'s' if tasks['shots'] > 1 else ''} per class"


def _setting(results):
    tasks = results["tasks"]
    parts = [f"{tasks['ways']} classes, {tasks['shots']} image{'s' if tasks['shots'] > 1 else ''} per class"]
    parts.append("queries only" if tasks.get("num_directions") else "exact gradients")
    if tasks.get("penalty"):
        parts.append(f"{tasks['norm']} penalty")
    elif tasks["norm"] != "linf":
        parts.append(f"{tasks['norm']} ball")
    if _two_losses(tasks):
        parts.append("two losses")
    if _along_the_gradient(results):
        parts.append("base update along the gradient")
    return ", ".join(parts)


def _gradients(tasks):
    directions, waves = tasks.get("num_directions"), tasks.get("waves")
    found = f"zeroth-order estimates from {directions} directions per step" if directions else "exact"
    if waves:
        found += f"; the start is the best of plane waves, searched with {waves} evaluations of every support image"
    if _two_losses(tasks):
        found += f", of {tasks['support_loss']} and {tasks['second_loss']} added up on the support images"
    return found


def _bound(tasks, rows, runs):
    if tasks.get("penalty"):
        bound = (
            f"none; the loss has a penalty of {tasks['penalty']} times the {tasks['norm']} norm. Settings and "
            "full-data UAPs are chosen by the loss, of which success is only a part"
        )
    else:
        radii = _radii(tasks, rows, runs)
        bound = f"{tasks['norm']} ball{f', radius {radii}' if radii else ''}"
    if tasks.get("loss") == "hinge":
        bound += f"; the loss is the hinge with a confidence (kappa) of {tasks.get('kappa', 0.0):g}"
    return bound


def _radii(tasks, rows, runs):
    """Radius of each attacked source, and in brackets those of meta-training on that source if they differ."""
    usual = DEFAULT_EPSILON.get(tasks["norm"], {})
    radii, trained = {**usual, **tasks["epsilon"]}, {}
    for run in runs:
        own = {**usual, **pairs("epsilon", run.get("epsilon", ()))}
        for source in _sources(run["victims"]):
            trained.setdefault(source, {})[own.get(source)] = None
    parts = []
    for source in dict.fromkeys(row["source"] for row in rows if row["source"] in radii):
        other = ", ".join(str(radius) for radius in trained.get(source, ()) if radius != radii[source])
        parts.append(f"{source} {radii[source]}" + (f" (meta-trained at {other})" if other else ""))
    return ", ".join(parts)


def _sources(victims):
    """The sources in the names of stored victims, each once."""
    return dict.fromkeys(re.sub(f"_({'|'.join(MODELS)})_.*", "", Path(victim).name) for victim in victims)


def _baselines(tasks, protocol, rows):
    directions = tasks.get("num_directions")
    about = (
        "tuned over grids of 24 to 48 settings (step, momentum, schedule, loss) on "
        f"{protocol['num_validation']} validation tasks of the same victim"
    )
    if directions:
        about += (
            "; they make as many queries in total, start from zero or the transfer start, and share each direction "
            "among all images"
        )
    if _augmented(rows):
        about += (
            '. Two of them ("augmented") have the same augmentation of the support images as the learned methods'
            + (", the same search for a start and the same directions" if directions else "")
            + (", with or without the second loss" if _two_losses(tasks) else "")
            + ": the best one on validation tasks, and the transfer start fine-tuned by it, both tuned again"
        )
    return about


def _columns(rows, penalised):
    about = (
        '"steps" is the first judged step at which a method\'s mean ASR reaches the final one of tuned PGD; "gap '
        'closed" is the share of the distance from the best tuned baseline to the full-data UAP'
    )
    if _augmented(rows):
        about += f'; "{_GAP}" leaves augmented baselines out, "{_GAP_AUGMENTED}" counts them too'
    return about + ('; "loss" is the mean query loss, penalty included' if penalised else "")


def _meta_trained(runs, tasks):
    """Learners with their seeds, victims and sources, and how their meta-training tasks differ from the test tasks."""
    seeds, shots = {}, tasks["shots"]
    for run in runs:
        seeds.setdefault((run["learner"], tuple(run["victims"])), []).append(run["seed"])
    parts = []
    for (learner, victims), of_run in seeds.items():
        sources = _sources(victims)
        seeds_of, victims_of = (
            f"{len(of)} {noun}{'' if len(of) == 1 else 's'}" for of, noun in ((of_run, "seed"), (victims, "victim"))
        )
        parts.append(f"{learner} ({seeds_of}) on {victims_of} of {' and '.join(sources)}")
    other = dict.fromkeys(str(run["shots"]) for run in runs if run.get("shots", shots) != shots)
    searched = tasks.get("waves", 0)
    directions = {}
    for run in runs:
        if run.get("waves", searched) != searched:
            directions.setdefault(run["num_directions"], {})[run["learner"]] = None
    return (
        "; ".join(parts)
        + (f", with {' or '.join(other)} support image(s) per class" if other else "")
        + "".join(
            f"; {' and '.join(of)} without that search, with {n} directions per step" for n, of in directions.items()
        )
    )


def _augmented(rows):
    """Whether some baselines, like the learned methods, had augmented support images."""
    return any(row["method"].endswith(AUGMENTED) for row in rows)


def _target_table(target, rows, penalised):
    source, victim, seen = target
    at, augmented = rows[0]["at"], _augmented(rows)
    shown = shown_steps(at)
    lines = [
        f"**{source}**, victim `{victim}` ({'seen' if seen else 'not seen'} in meta-training), "
        f"clean accuracy {100 * rows[0]['clean_accuracy']:.1f}%",
        "",
        "| query ASR, % | "
        + " | ".join(f"K = {k}" for k in shown)
        + " | minus tuned PGD | steps | "
        + (f"{_GAP} | {_GAP_AUGMENTED} | " if augmented else "gap closed | ")
        + ("loss | " if penalised else "")
        + "l1 | l2 | linf |",
        "|---" * (len(shown) + 7 + augmented + penalised) + "|",
    ]
    for row in rows:
        cells = [
            f"{100 * asr:.1f} ± {_percent(width)}"
            for k, asr, width in zip(at, row["asr"], row["asr_interval"], strict=True)
            if k in shown
        ]
        if row["method"] in ("oracle", "transfer"):  # not fine-tuned, so the same at every step
            cells = [""] * (len(cells) - 1) + cells[-1:]
        elif row["seeds"] > 1:
            cells[-1] += f" ({100 * min(row['seed_asr']):.1f} to {100 * max(row['seed_asr']):.1f})"
        mean, width = row["difference_to_tuned_pgd"]
        gaps = [row[name] for name in ("gap_closed", "gap_closed_augmented")[: 1 + augmented]]
        cells += [
            f"{100 * mean:+.1f} ± {_percent(width)}",
            str(row["steps_to_tuned_pgd"] or ""),
            *map(_share, gaps),
            *([f"{row['loss']:.2f}"] if penalised else []),
            f"{row['l1']:.1f}",
            f"{row['l2']:.2f}",
            f"{row['linf']:.3f}",
        ]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _share(gap):
    return "" if gap is None else f"{100 * gap:.0f}%"


def _percent(width):
    return "?" if width is None else f"{100 * width:.1f}"
