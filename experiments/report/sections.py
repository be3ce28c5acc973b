"""Markdown sections of all results other than comparisons of attacks."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report.origins import origin
from experiments.report.tables import shown_steps

#: Names of methods in results files, with the names that are shown.
_METHODS = {f"the rule's {name}, augmented": "base update alone, augmented" for name in ("start", "base update")}


def breadth_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """A pretrained rule in settings that it was not meta-trained for."""
    del figures
    flags, rows = results["flags"], results["rows"]
    methods = list(rows[0]["methods"])
    lines = [
        f"## `{flags['optimizer']}` at other image sizes, radii, numbers of classes, images and steps",
        "",
        f"Attack success rate, %, mean ± 95% interval over {flags['num_tasks']} tasks against victims that "
        "meta-training did not see. PGD is tuned for each row on validation tasks. The base update is the update that "
        "the rule's output is added to, used alone. For image sizes that no victim has, a stored victim "
        "sees the images scaled to its own size; for fewer classes, its other logits are dropped. Epsilon is relative "
        "to the usual radius of the source. "
        f"{origin(results, path)}",
        "",
        "| victim | image | classes | images per class | epsilon | K | "
        + " | ".join(_METHODS.get(name, name) for name in methods)
        + " | minus tuned PGD |",
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


#: Explanations of variant names.
_VARIANTS = {
    "no start": "a rule without a base update",
    "no features but momenta": "a rule that sees the momenta of the gradient only",
    "momenta alone": "a rule that sees the momenta only, without convolutions and without a base update",
    "coordinatewise": "a rule without convolutions",
    "one victim a source": "meta-training on one victim per source instead of six",
    "learned on support images": "L2O, whose outer loss is that of the support images",
    "learned on support images without augmentation": "L2O, whose outer loss is that of the support images",
    "the paper's rule": "two coordinatewise LSTM layers on LogAndSign features, hinge losses, no augmentation",
    "no waves": "no search for a start, its queries spent on directions",
    "learned directions": "a learned sampler (QueryRNN) sets the deviation of the directions",
}


def _compared(rows, base):
    names = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != base]
    return ", ".join(names) if len(names) < 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def ablation_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Ablation: what each part of the fine-tuner contributes."""
    del figures
    flags, rows = results["flags"], results["rows"]
    # Files from before these flags have one seed and meta-training on small CNNs.
    base, seeds, trained = rows[0]["variant"], flags.get("seeds", 1), flags.get("architectures", ["small_cnn"])
    variants = dict.fromkeys(row["variant"] for row in rows)
    lines = [
        f"## Ablation of the study `{flags['study']}`: {_compared(rows, base)}",
        "",
        f"Attack success rate, %, after the first and the last fine-tuning step, on {flags['num_tasks']} validation "
        f"tasks of each of the validation victims. Meta-training: {flags['meta_steps']} meta-steps on victims of "
        + (f"the architecture {', '.join(trained)}, " if trained else "all the study's architectures, ")
        + (f"mean over {seeds} meta-training seeds" if seeds > 1 else "one seed")
        + f". In brackets: the difference to `{base}` after the last step with its 95% interval over tasks, paired by "
        "task"
        + (", then that of each seed" if seeds > 1 else "")
        + ". Radii are the defaults"
        + (f", except {', '.join(flags['epsilon'])}" if flags.get("epsilon") else "")
        + ". Variants have the names of `--variants`; `experiments/studies/ablation.py` defines them. "
        + "".join(f"`{name}`: {_VARIANTS[name]}. " for name in variants if name in _VARIANTS)
        + origin(results, path),
        "",
    ]
    victims = list(dict.fromkeys(row["victim"] for row in rows))
    lines += [
        "| variant | steps | queries | " + " | ".join(f"{v}, {k}" for v in victims for k in ("first", "last")) + " |",
        "|---" * (3 + 2 * len(victims)) + "|",
    ]
    for variant in variants:
        of_variant = [row for row in rows if row["variant"] == variant]
        cells = [str(of_variant[0]["at"][-1]), f"{of_variant[0]['queries']:.0f}"]
        for row in of_variant:
            change = "" if variant == base else f" ({_difference(row)})"
            cells += [f"{100 * row['asr'][0]:.1f}", f"{100 * row['asr'][-1]:.1f}{change}"]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", ""])


def directions_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Success of each method by the number of directions per step."""
    del figures
    flags, rows = results["flags"], results["rows"]
    lines = [
        "## Zeroth-order directions per step",
        "",
        f"Attack success rate, %, mean ± 95% interval over {flags['num_tasks']} tasks, after "
        f"{flags['evaluations']} evaluations of every support image in total. Columns are numbers q of zeroth-order "
        "directions per step; in brackets the number of steps that this leaves. Baselines (sgd is ZO-SGD, pgd "
        "ZO-signSGD, adam ZO-Adam, adamm ZO-AdaMM) are tuned for each q on "
        f"{flags['num_validation']} validation tasks of the victim. The LFT is `{flags['learned']}`, meta-trained with "
        f"{flags['meta_trained_at']} directions. It and the augmented baselines augment the support images, start from "
        "the best of plane waves, and draw directions on tiles for each image separately. The smoothing is "
        f"{flags['smoothing']} for all. {origin(results, path)}",
        "",
        "| victim | method | " + " | ".join(f"q = {count}" for count in flags["directions"]) + " |",
        "|---" * (2 + len(flags["directions"])) + "|",
    ]
    for victim, method in dict.fromkeys((row["victim"], row["method"]) for row in rows):
        found = [row for row in rows if (row["victim"], row["method"]) == (victim, method)]
        cells = [f"{100 * row['asr']:.1f} ± {100 * row['interval']:.1f} ({row['steps']})" for row in found]
        lines.append(f"| `{victim}` | {method} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", ""])


def _difference(row):
    mean, width = (100 * x for x in row["difference"])
    seeds = [f"{100 * x:+.1f}" for x in row.get("seed_differences", [])]
    return f"{mean:+.1f} ± {width:.1f}" + (f": {', '.join(seeds)}" if len(seeds) > 1 else "")


def sine_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Sine regression: mean squared errors by network and method."""
    flags, rows = results["flags"], results["rows"]
    lines = [
        "## Sine regression",
        "",
        f"Mean squared error on 100 points of a curve after steps on 10 others, mean ± 95% interval over "
        f"{flags['num_tasks']} curves, mean over {len(flags['seeds'])} meta-training seeds. One LFT is meta-trained on "
        f"networks of all {len(flags['widths'])} widths together. It, SGD and Adam start from random weights. "
        f"{origin(results, path)}",
        "",
    ]
    for width in dict.fromkeys(row["width"] for row in rows):
        lines += [f"Network with two layers of {width} units:", ""]
        lines += _curve_lines([row for row in rows if row["width"] == width], "error", "{:.3f}", "{:+.3f}")
    lines += [
        "Curves whose frequency varies too. Published: Meta-SGD, Li et al. 2017 (arXiv 1707.09835), table 1, after one "
        "step, 100 curves; quoted from memory. The other columns are obtained here, with "
        f"{flags['published_steps']} meta-steps of 4 tasks:",
        "",
        "| method | published | after 1 step | after 10 steps |",
        "|---|---|---|---|",
    ]
    for row in results["published"]:
        cells = ["{:.2f} ± {:.2f}".format(*row["published_error"])]
        cells += [_plus_minus(row["error"][k], row["error_interval"][k], "{:.3f}", "{:.3f}") for k in (0, -1)]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"![errors]({figures}.png)", "", ""])


def zo_l2l_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Query-only attacks on single images: losses by method, the best first."""
    flags, victim, rows = results["flags"], results["victim"], results["rows"]
    last = len(rows[0]["loss"])
    shown = [*(k for k in (20, 50, 100) if k < last), last]
    lines = [
        "## Query-only attacks on single images: the experiment of ZO-L2L",
        "",
        f"Attacks on {flags['images']} images of `{victim['source']}` against a `{victim['architecture']}`, the "
        f"victim of the meta-training, {flags['runs']} runs per image. The loss is the hinge on log-probabilities "
        "plus 0.1 times the l1 distance: its mean over images, ± 95% interval over runs. Then: images fooled after the "
        "last step, and the difference to the loss of the UpdateRNN alone, ± 95% interval over images. Estimates are "
        "forward differences along 20 Gaussian directions. Learning rates are the published ones, and those tuned on "
        "training images. `experiments/studies/zo_l2l.py` lists the differences to the authors' code. "
        f"{origin(results, path)}",
        "",
        "| loss | "
        + " | ".join(f"step {k}" for k in shown)
        + " | mean of all steps | fooled, % | l1 | queries | minus the UpdateRNN's |",
        "|---" * (len(shown) + 6) + "|",
    ]
    for row in rows:
        cells = [f"{row['loss'][k - 1]:.2f} ± {row['loss_interval'][k - 1]:.2f}" for k in shown]
        cells += [f"{_mean_loss(row):.2f}", f"{100 * row['success'][-1]:.0f}"]
        cells += [f"{row['l1']:.1f}", f"{row['queries'][-1]:.0f}"]
        cells.append("{:+.2f} ± {:.2f}".format(*row["difference_to_update_rnn"]))
        rate = f", learning rate {row['rate_times_d']:g} / d" if "rate_times_d" in row else ""
        lines.append(f"| {row['method']}{rate} | " + " | ".join(cells) + " |")
    for name, key in (("the last step's loss", lambda row: row["loss"][-1]), ("the mean of all steps", _mean_loss)):
        order = " < ".join(row["method"] for row in sorted(rows, key=key))
        lines += ["", f"By {name}: {order}."]
    return "\n".join([*lines, "", f"![losses]({figures}.png)", "", ""])


def _mean_loss(row):
    return sum(row["loss"]) / len(row["loss"])


def classification_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Few-shot classification: accuracy by kind of tasks and method."""
    flags, rows = results["flags"], results["rows"]
    shots = " or ".join(map(str, dict.fromkeys(row.get("shots", flags["shots"]) for row in rows)))
    lines = [
        "## Few-shot classification",
        "",
        f"Accuracy, %, on other images after steps on {shots} images of each of {flags['ways']} classes, mean "
        f"± 95% interval over {flags['num_tasks']} tasks, mean over {len(flags['seeds'])} meta-training seeds (in "
        "brackets their range). Classes and images of the tasks are not in meta-training. The LFT, SGD and Adam start "
        "from random weights, all other methods from a learned initialization. Settings are the best of several on "
        "validation tasks, which have the classes of meta-training (inner learning rates with the first seed). "
        f"{settings_tried(rows)} Tasks are named source:size:architecture:width. {origin(results, path)}",
        "",
        *classification_tables(results),
    ]
    return "\n".join([*lines, f"![accuracies]({figures}.png)", "", ""])


def settings_tried(rows: Sequence[Mapping[str, Any]]) -> str:
    """Sentences on the number of settings that were tried for each method."""
    tried = {row["method"]: row["settings_tried"] for row in rows if row.get("settings_tried", 1) > 1}
    tried = ", ".join(f"{method} {count}" for method, count in tried.items())
    return f"Numbers of settings tried: {tried}. Those of the LFT are not tuned."


def classification_tables(results: Mapping[str, Any]) -> list[str]:
    """Lines of the tables of few-shot classification: one table for each number of images and kind of tasks."""
    flags, rows = results["flags"], results["rows"]
    lines = []
    for shots, part, case in dict.fromkeys((row.get("shots"), row["part"], row["case"]) for row in rows):
        of_case = [row for row in rows if (row.get("shots"), row["part"], row["case"]) == (shots, part, case)]
        alone = "Congruous, each learner meta-trained on these tasks alone"
        together = f"Incongruous, one LFT meta-trained on all {len(flags['incongruous'])} kinds of tasks together"
        each = "" if shots is None or flags["shots"] == [shots] else f", {shots}-shot"
        lines += [f"{alone if part == 'congruous' else together}; `{case}`{each}:", ""]
        lines += _curve_lines(of_case, "accuracy", "{:.1f}", "{:+.1f}", factor=100)
    return lines


def _curve_lines(rows, metric, number, signed, factor=1):
    """A table of a metric by method and step, with the final differences to SGD and Adam."""
    shown = shown_steps(range(1, 1 + len(rows[0][metric])))
    head = [f"{k} step{'s' if k > 1 else ''}" for k in shown]
    lines = [f"| method | {' | '.join(head)} | minus SGD | minus Adam |", "|---" * (len(shown) + 3) + "|"]
    for row in rows:
        pairs = [(row[metric][k - 1], row[f"{metric}_interval"][k - 1]) for k in shown]
        cells = [_plus_minus(*pair, number, number, factor) for pair in pairs]
        seeds = [number.format(factor * x) for x in row.get("seed_accuracy", ())]
        if len(seeds) > 1:
            cells[-1] += f" ({min(seeds, key=float)} to {max(seeds, key=float)})"
        for name in ("sgd", "adam"):
            cells.append(_plus_minus(*row[f"difference_to_{name}"], signed, number, factor))
        setting = row.get("setting", {key: row[key] for key in ("learning_rate",) if key in row})
        named = "".join(f", {key.replace('_', ' ')} {value}" for key, value in setting.items())
        lines.append(f"| {row['method']}{named} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _plus_minus(mean, width, number, of_width, factor=1):
    return "not finite" if mean is None else f"{number.format(factor * mean)} ± {of_width.format(factor * width)}"


def theory_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """The gap between the meta-gradients of LFT and L2O against the number of images."""
    flags, victim = results["flags"], results["victim"]
    lines = [
        "## The gap between LFT and L2O",
        "",
        f"Norms of meta-gradients on tasks of `{victim['source']}` against a `{victim['architecture']}`, K = "
        f"{flags['num_steps']}, {flags['ways']} classes, means over {flags['num_tasks']} tasks; the rule is "
        f"`{flags['rule']}` as shipped at that commit, and the same rule with random weights (untrained). Standard "
        "deviations are those of the mean gradients over the set. "
        f"{origin(results, path)}",
        "",
    ]
    for name, rows in results["rows"].items():
        decay = results.get("decay", {}).get(name)  # None for a single number of images
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


def victim_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """The training of a victim, by epoch."""
    del figures
    lines = [
        f"## Training of a victim: `{results['architecture']}` on {results['source']}",
        "",
        f"Seed {results['seed']}, {results['epochs']} epochs, batches of {results['batch_size']}, learning rate "
        f"{results['learning_rate']}, augmentation: {results['augment']}. {results['wall_seconds']:.0f} s on a shared "
        f"machine, {results['cpu_seconds']:.0f} s of processor time. Final test accuracy "
        f"{100 * results['test_accuracy']:.1f}%. {origin(results, path)}",
        "",
        "| epoch | training loss | validation accuracy, % |",
        "|---|---|---|",
    ]
    lines += [f"| {row['epoch']} | {row['loss']:.3f} | {100 * row['accuracy']:.1f} |" for row in results["curve"]]
    return "\n".join([*lines, "", ""])


def timings_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Times of meta-training runs and attacks by device."""
    del figures
    lines = [
        "## Meta-training on a CPU core and on a GPU",
        "",
        "Readings of whole runs on machines that were partly shared, not ratios of alternating measurements. From "
        f"`{path}`, {results['date']}.",
        "",
        "| run | device | also running | meta-steps | first one, s | median, s | total, s | commit |",
        "|---" * 8 + "|",
    ]
    for run in results["meta_training"]:
        cells = [run["run"], run["device"], run["beside"], run["meta_steps"], run["first_seconds"]]
        cells += [run["median_seconds"], run["total_seconds"], run["commit"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for attack in results["attacks"]:
        state = "finished" if attack["finished"] else "stopped"
        lines += [
            "",
            f"A comparison, {state} after {attack['seconds']} s on {attack['device']} (also running: "
            f"{attack['beside']}), commit {attack['commit']}: {attack['reached']}. Command: `{attack['command']}`.",
        ]
    return "\n".join([*lines, "", ""])
