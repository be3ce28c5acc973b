"""Comparisons of attacks as Markdown."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import DEFAULT_EPSILON
from lft_jax import evaluation
from lft_jax.evaluation.comparison import AUGMENTED, TRANSFER

_SHOWN = (1, 2, 5, 10, 20)  # PROTOCOL 4


def shown_steps(at: Sequence[int]) -> list[int]:
    """Those of the judged steps that a table has columns for: 1, 2, 5, 10, 20 and the last."""
    return [k for k in at if k in _SHOWN or k == at[-1]]


def comparison_table(rows: Sequence[Mapping[str, Any]], penalised: bool = False) -> str:
    """A table a target: query ASR (percent, 95% interval over tasks) after each judged step, by method.

    With a penalty the query loss, which holds it, is a column too.
    """
    targets = dict.fromkeys((row["source"], row["victim"], row["seen_victim"]) for row in rows)
    return "\n".join(
        _target_table(target, [r for r in rows if r["victim"] == target[1]], penalised) for target in targets
    )


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """One line a victim that was not seen in meta-training: final success of the strongest of each kind of method."""
    lines = [
        "| victim | tuned PGD | best tuned baseline | best of two augmented | L2O | LFT | full-data oracle | LFT minus "
        "tuned PGD | gap closed |",
        "|---" * 9 + "|",
    ]
    for results in found:
        rows = [row for row in results["rows"] if not row["seen_victim"]]
        for victim in dict.fromkeys(row["victim"] for row in rows):
            of = {row["method"]: row for row in rows if row["victim"] == victim}
            lft, l2o = (_of_learner(of, learner) for learner in ("lft", "l2o"))
            if lft is None:
                raise ValueError(f"results: {victim} was not attacked by an lft, which a summary is about.")
            cells = [_final(of["pgd"])]
            cells += [_final(row, named=True) if row else "" for row in _best_rivals(of, results["protocol"])]
            cells += [_final(row) if row else "" for row in (l2o, lft, of["oracle"])]
            mean, width = lft["difference_to_tuned_pgd"]
            gap = lft["gap_closed"]
            cells += [f"{100 * mean:+.1f} ± {_percent(width)}", "" if gap is None else f"{100 * gap:.0f}%"]
            lines.append(f"| `{victim}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def claims(found: Sequence[Mapping[str, Any]]) -> str:
    """The LFT against each kind of rival, a line a victim; empty if no unseen victim was attacked by one.

    Differences are paired by task. Steps are those to the final success of the best tuned baseline.
    """
    lines = []
    for results in found:
        rows = [row for row in results["rows"] if not row["seen_victim"]]
        for victim in dict.fromkeys(row["victim"] for row in rows):
            of = {row["method"]: row for row in rows if row["victim"] == victim}
            first = {learner: _of_learner(of, learner) for learner in ("lft", "l2o", "maml", "joint")}
            hand_made, augmented = _best_rivals(of, results["protocol"])
            lft, goal = first["lft"], hand_made["asr"][-1]
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
                "" if lft["gap_closed"] is None else f"{100 * lft['gap_closed']:.0f}%",
            ]
            lines.append(f"| `{victim}` | " + " | ".join(cells) + " |")
    if not lines:
        return ""
    head = (
        "| victim | setting | times untuned PGD | minus tuned PGD | minus tuned Adam | minus best augmented | steps to "
        "the best tuned baseline's final success: LFT | L2O | MAML | joint | gap closed |"
    )
    about = "The LFT's final success against that of others, in points, paired by task; what augments is tuned too."
    title = "## The LFT against each kind of rival"
    return "\n".join([title, "", about, "", head, "|---" * 11 + "|", *lines, "", ""])


def _kind(results):
    """What tells this comparison from others of the same victim, in a few words."""
    tasks = results["tasks"]
    if tasks.get("num_directions"):
        return "queries only"
    if tasks.get("penalty"):
        return f"penalty, kappa {tasks.get('kappa', 0.0):g}"
    parts = [f"{tasks['norm']} ball"]
    if tasks["shots"] > 1:
        parts.append(f"{tasks['shots']} images")
    if _two_losses(tasks):
        parts.append("two losses")
    if _along_the_gradient(results):
        parts.append("along the gradient")
    return ", ".join(parts)


def _two_losses(tasks):
    return tasks.get("second_loss", "none") != "none" and not tasks.get("num_directions")


def _along_the_gradient(results):
    return any(run.get("start") == "gradient" for run in results["meta_training"])


def _reached(row, index, tasks):
    """The step, and what it took of all queries, where these are what counts."""
    step, queries = str(row["at"][index]), row.get("queries")
    if not (tasks.get("num_directions") and queries):
        return step
    return f"{step} ({queries[index]:.0f} of {queries[-1]:.0f} queries)"


def _of_learner(of, learner):
    """The first row of a learner, or None."""
    return next((row for method, row in of.items() if method.split(" (")[0] == learner), None)


def _best_rivals(of, protocol):
    """The rows of the best tuned baseline and of the best that augments, or None."""
    plain = (*protocol["methods"], "pgd", "transfer", TRANSFER)
    groups = ([of[m] for m in of if m in plain], [of[m] for m in of if m.endswith(AUGMENTED)])
    return [max(group, key=lambda row: row["asr"][-1], default=None) for group in groups]


def _paired(row, other):
    """The mean difference of two rows' final success, in points, with its interval over the tasks they share."""
    mean, width = evaluation.mean_interval(np.subtract(row["task_asr"], other["task_asr"]))
    return f"{100 * mean:+.1f} ± {100 * width:.1f}"


def _final(row, named=False):
    name = f" ({row['method'].removesuffix(AUGMENTED)})" if named else ""
    return f"{100 * row['asr'][-1]:.1f} ± {_percent(row['asr_interval'][-1])}{name}"


def results_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """The tables of a results file, those of unseen victims first, where they come from, and the figures."""
    rows, tasks, protocol = results["rows"], results["tasks"], results["protocol"]
    penalised = bool(tasks.get("penalty"))
    known = {**DEFAULT_EPSILON.get(tasks["norm"], {}), **tasks["epsilon"]}
    radii = ", ".join(f"{s} {known[s]}" for s in dict.fromkeys(row["source"] for row in rows) if s in known)
    bound = f"an {tasks['norm']} ball{f' ({radii})' if radii else ''}"
    if penalised:
        bound = (
            f"a penalty of {tasks['penalty']} on the {tasks['norm']} norm, where settings and oracles are chosen by "
            "the loss, of which success is only a part"
        )
    if tasks.get("loss") == "hinge":
        bound += f", and the hinge with a confidence of {tasks.get('kappa', 0.0):g}"
    directions = tasks.get("num_directions")
    gradients = f"zeroth-order gradients of {directions} directions a step" if directions else "exact gradients"
    if tasks.get("waves"):
        gradients += f" from a start that {tasks['waves']} evaluations searched plane waves for"
    two = _two_losses(tasks)
    about = (
        f"Attack success rate on unseen images after K fine-tuning steps with {gradients} on {tasks['shots']} support "
        f"image(s) of each of {tasks['ways']} classes, within {bound}; mean ± 95% interval over "
        f"{protocol['num_tasks']} tasks (of several seeds: the mean, and the range of their ASR at the last K). "
        f"Meta-trained: {_meta_trained(results['meta_training'], tasks)}"
        + (
            f"; on support images they follow {tasks['support_loss']} and {tasks['second_loss']} together"
            if two
            else ""
        )
        + ". Baselines are tuned over grids of 24 to 48 "
        f"settings (step, momentum, schedule, loss) on {protocol['num_validation']} validation tasks of the same victim"
        + (
            ", and make as many queries in all, from zero or the transfer start, with directions that all images share"
            if directions
            else ""
        )
        + "; the oracle sees all "
        'training images. "Steps" are those until a method\'s mean ASR reaches the final one of tuned PGD; "gap '
        'closed" is the part of the way from the best tuned baseline to the oracle'
        + (
            ', "augmented" that from the best of these and of two that augment too'
            + (", and search and ask as the learned methods do" if directions else "")
            + (", with the second loss or without" if two else "")
            + ": what was best on the validation tasks without and the transfer start fine-tuned by it, tuned again"
            if _augmented(rows)
            else ""
        )
        + f". {origin(results, path)}"
    )
    unseen = [row for row in rows if not row["seen_victim"]]
    seen = [row for row in rows if row["seen_victim"]]
    setting = f"{tasks['ways']} classes, {tasks['shots']} image{'s' if tasks['shots'] > 1 else ''} of each, {gradients}"
    setting += " of two losses" if two else ""
    if _along_the_gradient(results):
        setting += ", rules that start along the gradient"
    title = f"## Attacks on {' and '.join(dict.fromkeys(row['source'] for row in rows))}: {setting}"
    parts = [title, "", about, "", comparison_table(unseen, penalised)]
    if seen:
        parts += ["Victims that were in meta-training (unseen images only):", "", comparison_table(seen, penalised)]
    parts += [
        f"![success against the step]({figures}.png)",
        "",
        f"![steps to reach tuned PGD]({figures}_steps.png)",
        "",
    ]
    for victim in dict.fromkeys(row["victim"] for row in unseen):
        parts += [f"![perturbations of {victim}]({figures}_{victim}.png)", ""]
    return "\n".join(parts)


def _meta_trained(runs, tasks):
    """Learners, with how many seeds and victims of which sources, and where the tasks that they had differ."""
    seeds, shots = {}, tasks["shots"]
    for run in runs:
        seeds.setdefault((run["learner"], tuple(run["victims"])), []).append(run["seed"])
    parts = []
    for (learner, victims), of_run in seeds.items():
        names = [Path(victim).name for victim in victims]
        sources = dict.fromkeys(re.sub("_(small_cnn|lenet|vgg)_.*", "", name) for name in names)
        seeds_of, victims_of = (
            f"{len(of)} {noun}{'' if len(of) == 1 else 's'}" for of, noun in ((of_run, "seed"), (victims, "victim"))
        )
        parts.append(f"{learner} ({seeds_of}) on {victims_of} of {' and '.join(sources)}")
    other = dict.fromkeys(str(run["shots"]) for run in runs if run.get("shots", shots) != shots)
    searched = tasks.get("waves", 0)
    asking = {}
    for run in runs:
        if run.get("waves", searched) != searched:
            asking.setdefault(run["num_directions"], {})[run["learner"]] = None
    return (
        "; ".join(parts)
        + (f", with {' or '.join(other)} image(s) of each class" if other else "")
        + "".join(f"; {' and '.join(of)} without that search, with {n} directions" for n, of in asking.items())
    )


def _augmented(rows):
    """Whether the learned methods, and some baselines, had augmented support images."""
    return any(row["method"].endswith(AUGMENTED) for row in rows)


def origin(results: Mapping[str, Any], path: str) -> str:
    """Where a results file came from."""
    made = results["provenance"]
    return f"From `{path}`: `{made['command']}`, commit {made['commit']}, {made['device']}."


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
        + " | minus tuned PGD | steps | gap closed | "
        + ("augmented | " if augmented else "")
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
        if row["method"] in ("oracle", "transfer"):  # not fine-tuned: the same at every step
            cells = [""] * (len(cells) - 1) + cells[-1:]
        elif row["seeds"] > 1:
            cells[-1] += f" ({100 * min(row['seed_asr']):.1f} to {100 * max(row['seed_asr']):.1f})"
        mean, width = row["difference_to_tuned_pgd"]
        gaps = [row[name] for name in ("gap_closed", "gap_closed_augmented")[: 1 + augmented]]
        cells += [
            f"{100 * mean:+.1f} ± {_percent(width)}",
            str(row["steps_to_tuned_pgd"] or ""),
            *("" if gap is None else f"{100 * gap:.0f}%" for gap in gaps),
            *([f"{row['loss']:.2f}"] if penalised else []),
            f"{row['l1']:.1f}",
            f"{row['l2']:.2f}",
            f"{row['linf']:.3f}",
        ]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _percent(width):
    return "?" if width is None else f"{100 * width:.1f}"
