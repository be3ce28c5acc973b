"""Results as Markdown."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import DEFAULT_EPSILON
from lft_jax import evaluation
from lft_jax.comparison import AUGMENTED, TRANSFER

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
            first = {learner: _of_learner(of, learner) for learner in ("lft", "l2o", "maml")}
            hand_made, augmented = _best_rivals(of, results["protocol"])
            lft, goal = first["lft"], hand_made["asr"][-1]
            if lft is None:
                continue
            rivals = (of["pgd"], of.get("adam"), augmented)
            untuned = of["pgd (untuned)"]["asr"][-1]
            reached = [row and evaluation.steps_to_reach(row["asr"], goal) for row in first.values()]
            cells = [
                "penalty" if results["tasks"].get("penalty") else "ball",
                f"{lft['asr'][-1] / untuned:.1f}" if untuned else "",
                *(_paired(lft, rival) if rival else "" for rival in rivals),
                *(
                    ("never" if steps is None else str(lft["at"][steps - 1])) if row else ""
                    for row, steps in zip(first.values(), reached, strict=True)
                ),
                "" if lft["gap_closed"] is None else f"{100 * lft['gap_closed']:.0f}%",
            ]
            lines.append(f"| `{victim}` | " + " | ".join(cells) + " |")
    if not lines:
        return ""
    head = (
        "| victim | setting | times untuned PGD | minus tuned PGD | minus tuned Adam | minus best augmented | steps to "
        "the best tuned baseline's final success: LFT | L2O | MAML | gap closed |"
    )
    about = "The LFT's final success against that of others, in points, paired by task; what augments is tuned too."
    title = "## The LFT against each kind of rival"
    return "\n".join([title, "", about, "", head, "|---" * 10 + "|", *lines, "", ""])


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
    directions = tasks.get("num_directions")
    gradients = f"zeroth-order gradients of {directions} directions a step" if directions else "exact gradients"
    about = (
        f"Attack success rate on unseen images after K fine-tuning steps with {gradients} on {tasks['shots']} support "
        f"image(s) of each of {tasks['ways']} classes, within {bound}; mean ± 95% interval over "
        f"{protocol['num_tasks']} tasks (of several seeds: the mean, and the range of their ASR at the last K). "
        f"Meta-trained: {_meta_trained(results['meta_training'])}. Baselines are tuned over grids of 24 to 48 "
        "settings (step, momentum, schedule, loss) on validation tasks of the same victim; the oracle sees all "
        'training images. "Steps" are those until a method\'s mean ASR reaches the final one of tuned PGD; "gap '
        'closed" is the part of the way from the best tuned baseline to the oracle'
        + (
            ', "augmented" that from the best of these and of two that augment too: what was best on the validation '
            "tasks without, and the transfer start fine-tuned by it, each tuned again"
            if _augmented(rows)
            else ""
        )
        + f". {_origin(results, path)}"
    )
    unseen = [row for row in rows if not row["seen_victim"]]
    seen = [row for row in rows if row["seen_victim"]]
    setting = f"{tasks['ways']} classes, {tasks['shots']} image{'s' if tasks['shots'] > 1 else ''} of each, {gradients}"
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


def breadth_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """A pretrained rule away from what it was trained on."""
    del figures
    flags, rows = results["flags"], results["rows"]
    methods = list(rows[0]["methods"])
    lines = [
        f"## `{flags['optimizer']}` away from its training",
        "",
        f"Attack success rate, %, mean ± 95% interval over {flags['num_tasks']} tasks against victims that "
        "meta-training did not see. PGD is tuned for each line on validation tasks; the start is what the rule's "
        "output is added to: sign steps of 0.8 epsilon, momentum 0.5. Sizes that no victim has are those of stored "
        "victims that see their images scaled down, fewer classes those whose other logits are left out. "
        f"{_origin(results, path)}",
        "",
        "| victim | image | classes | images a class | epsilon | K | " + " | ".join(methods) + " | minus tuned PGD |",
        "|---" * (7 + len(methods)) + "|",
    ]
    for row in rows:
        height, width, channels = row["image_shape"]
        cells = [row["victim"], f"{height}x{width}x{channels}", row["classes"], row["shots"], f"x {row['factor']}"]
        cells += [row["num_steps"]]
        found = [row["methods"][name] for name in methods]
        cells += [f"{100 * m['asr']:.1f} ± {100 * m['interval']:.1f}" for m in found]
        cells += ["{:+.1f} ± {:.1f}".format(*(100 * x for x in found[-1]["difference_to_tuned_pgd"]))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", ""])


def ablation_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """What each part of the fine-tuner is worth."""
    del figures
    flags, rows = results["flags"], results["rows"]
    base, last = rows[0]["variant"], rows[0]["at"][-1]
    lines = [
        "## What the parts are worth",
        "",
        f"Attack success rate, %, on {flags['num_tasks']} validation tasks of each of the validation victims after "
        f"{flags['meta_steps']} meta-steps, one seed; in brackets, paired with `{base}` at K = {last}, the "
        f"difference and its 95% interval. {_origin(results, path)}",
        "",
    ]
    victims = list(dict.fromkeys(row["victim"] for row in rows))
    lines += [
        "| variant | " + " | ".join(f"{v}, K = {k}" for v in victims for k in (rows[0]["at"][0], last)) + " |",
        "|---" * (1 + 2 * len(victims)) + "|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for row in (row for row in rows if row["variant"] == variant):
            mean, width = row["difference"][-1]
            change = "" if variant == base else f" ({100 * mean:+.1f} ± {100 * width:.1f})"
            cells += [f"{100 * row['asr'][0]:.1f}", f"{100 * row['asr'][-1]:.1f}{change}"]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", ""])


def sine_section(results: Mapping[str, Any], path: str, figures: str) -> str:
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
        lines += [f"Network of two layers of {width}:", ""]
        lines += _curve_lines([row for row in rows if row["width"] == width], "error", "{:.3f}", "{:+.3f}")
    return "\n".join([*lines, f"![errors]({figures}.png)", "", ""])


def classification_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Few-shot classification: accuracies by kind of tasks and method."""
    flags, rows = results["flags"], results["rows"]
    tried = {row["method"]: row["settings_tried"] for row in rows if row.get("settings_tried", 1) > 1}
    tried = ", ".join(f"{method} {count}" for method, count in tried.items())
    lines = [
        "## Few-shot classification",
        "",
        f"Accuracy, %, on other images after steps on {flags['shots']} images of each of {flags['ways']} classes, mean "
        f"± 95% interval over {flags['num_tasks']} tasks, and the mean of {len(flags['seeds'])} meta-training seeds "
        "(in brackets their range). Tasks are of classes and images that meta-training did not see. The LFT, SGD and "
        "Adam start from random weights, all others from a learned initialization. Settings are the best of so many on "
        f"validation tasks, which are of the classes of meta-training, inner rates with the first seed: {tried}. The "
        f"LFT's are not tuned. Tasks are named source:size:architecture:width. {_origin(results, path)}",
        "",
    ]
    for part, case in dict.fromkeys((row["part"], row["case"]) for row in rows):
        alone = "Congruous, each learner meta-trained on these tasks alone"
        together = f"Incongruous, one LFT meta-trained on all {len(flags['incongruous'])} kinds of tasks together"
        lines += [f"{alone if part == 'congruous' else together}; `{case}`:", ""]
        of_case = [row for row in rows if (row["part"], row["case"]) == (part, case)]
        lines += _curve_lines(of_case, "accuracy", "{:.1f}", "{:+.1f}", factor=100)
    return "\n".join([*lines, f"![accuracies]({figures}.png)", "", ""])


def _curve_lines(rows, metric, number, signed, factor=1):
    """A table of what methods have after some steps, and of their differences to SGD and Adam."""
    shown = shown_steps(range(1, 1 + len(rows[0][metric])))
    head = [f"{k} step{'s' if k > 1 else ''}" for k in shown]
    lines = [f"| method | {' | '.join(head)} | minus SGD | minus Adam |", "|---" * (len(shown) + 3) + "|"]
    for row in rows:
        pairs = [(row[metric][k - 1], row[f"{metric}_interval"][k - 1]) for k in shown]
        cells = [" ± ".join(number.format(factor * x) for x in pair) for pair in pairs]
        seeds = [number.format(factor * x) for x in row.get("seed_accuracy", ())]
        if len(seeds) > 1:
            cells[-1] += f" ({min(seeds, key=float)} to {max(seeds, key=float)})"
        for name in ("sgd", "adam"):
            mean, width = row[f"difference_to_{name}"]
            cells.append(f"{signed.format(factor * mean)} ± {number.format(factor * width)}")
        setting = row.get("setting", {key: row[key] for key in ("learning_rate",) if key in row})
        named = "".join(f", {key.replace('_', ' ')} {value}" for key, value in setting.items())
        lines.append(f"| {row['method']}{named} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def theory_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """The gap between the meta-gradients of LFT and L2O against the number of images."""
    flags, victim = results["flags"], results["victim"]
    lines = [
        "## The gap between LFT and L2O",
        "",
        f"Norms of meta-gradients on tasks of `{victim['source']}` against a `{victim['architecture']}`, K = "
        f"{flags['num_steps']}, {flags['ways']} classes, means over {flags['num_tasks']} tasks; the rule is "
        f"`{flags['rule']}`, as it was shipped at that commit and with weights that were not meta-trained. "
        f"{_origin(results, path)}",
        "",
    ]
    for name, rows in results["rows"].items():
        decay = results.get("decay", {}).get(name)  # a single number of images has none
        falls = decay and (
            ": the gap on a task falls with the number of images to the power of "
            f"-{decay['exponent']:.3f} (95% interval {decay['low']:.3f} to {decay['high']:.3f})"
        )
        lines += [
            f"**{name}**{falls or ''}.",
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
    return "\n".join([*lines, f"![gap]({figures}.png)", "", ""])


def _meta_trained(runs):
    """Learners, with how many seeds and victims of which sources."""
    seeds = {}
    for run in runs:
        seeds.setdefault((run["learner"], tuple(run["victims"])), []).append(run["seed"])
    parts = []
    for (learner, victims), of_run in seeds.items():
        names = [Path(victim).name for victim in victims]
        sources = dict.fromkeys(re.sub("_(small_cnn|lenet|vgg)_.*", "", name) for name in names)
        plural = "seed" if len(of_run) == 1 else "seeds"
        parts.append(f"{learner} ({len(of_run)} {plural}) on {len(victims)} victims of {' and '.join(sources)}")
    return "; ".join(parts)


def _augmented(rows):
    """Whether the learned methods, and some baselines, had augmented support images."""
    return any(row["method"].endswith(AUGMENTED) for row in rows)


def _origin(results, path):
    origin = results["provenance"]
    return f"From `{path}`: `{origin['command']}`, commit {origin['commit']}, {origin['device']}."


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
