"""Figures of results files, drawn by matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.report import tables
from lft_jax.cli.picture import save

#: Methods in drawing order, with their colours. Other methods are only in the table.
COLOURS = {
    "pgd (untuned)": "#bbbbbb",
    "pgd": "#4477aa",
    "momentum_pgd": "#66ccee",
    "sgd": "#ee8866",
    "adam": "#ccbb44",
    "adamm": "#999933",
    "uap_sgd": "#aa3377",
    "transfer, fine-tuned": "#7755dd",
    "maml": "#997700",
    "first_order_maml": "#ddcc77",
    "sign_maml": "#88ccaa",
    "anil": "#44aa99",
    "reptile": "#ddaa33",
    "meta_sgd": "#cc99bb",
    "joint": "#332288",
    "l2o": "#228833",
    "adaptive_lft": "#ee99aa",
    "lft": "#cc3311",
    "oracle": "#000000",
}


def asr_against_step(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws mean query ASR against the fine-tuning step, with 95% bands, one panel per victim.

    The x axis is the number of image evaluations so far where it differs between methods.
    """
    targets = list(dict.fromkeys((row["source"], row["victim"], row["seen_victim"]) for row in rows))
    columns = min(3, len(targets))
    lines = -(-len(targets) // columns)
    labels = 2 + columns  # columns of the legend below the panels
    legend = 0.22 * -(-len({row["method"] for row in rows}) // labels)
    size = (max(7.4, 4.2 * columns), 3 * lines + legend)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(targets) :]:
        axis.axis("off")
    for axis, (source, victim, seen) in zip(axes.flat, targets, strict=False):
        of_target = {row["method"]: row for row in rows if (row["source"], row["victim"]) == (source, victim)}
        # In the order of COLOURS, which puts learned methods on top. Augmented variants, and runs of one learner on
        # different sources, share a colour and differ in line style.
        spent = _spent(of_target)
        variants = [(n, m) for n in COLOURS for m in of_target if m == n or _plain(m) == n]
        for name, method in variants:
            row, colour = of_target[method], COLOURS[name]
            alike = [m for n, m in variants if n == name]
            style = ("-", "--", "-.", ":")[alike.index(method) % 4]
            if method == "oracle":
                axis.axhline(row["asr"][-1], color=colour, linestyle=":", label="oracle (all images)")
                continue
            at, asr, width = (np.asarray(row[name], float) for name in ("at", "asr", "asr_interval"))
            if spent:
                at = np.asarray(spent.get(method, spent["pgd"]))
            axis.plot(at, asr, color=colour, linestyle=style, marker="o", markersize=2, label=method)
            axis.fill_between(at, asr - width, asr + width, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=f"{victim} ({'seen' if seen else 'unseen'} victim)", ylim=(0, None))
        axis.set_xlabel("image evaluations of the victim" if spent else "fine-tuning step")
        if not spent:
            axis.set_xticks(tables.shown_steps(of_target["pgd"]["at"]))
        axis.grid(alpha=0.3)
    for line in axes:
        line[0].set_ylabel("query attack success rate")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(labels, len(handles)),
        frameon=False,
        fontsize=9,
    )
    save(figure, path)


def _spent(rows):
    """`{method: image evaluations after each evaluated step}`; empty if they are equal for all methods."""
    spent = {method: tuple(row["queries"]) for method, row in rows.items() if row.get("queries")}
    return spent if len(set(spent.values())) > 1 else {}


def _plain(method):
    """The name of a method without augmentation and sources; untuned methods keep their full names."""
    return method if method.endswith("(untuned)") else method.removesuffix(tables.AUGMENTED).split(" (")[0]


def steps_to_reach(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the steps until a method's mean ASR reaches the final ASR of tuned PGD, one panel per victim.

    Bars are image evaluations where they differ between methods.
    """
    targets = list(dict.fromkeys(row["victim"] for row in rows))
    shown = [row for row in rows if row["method"] not in ("oracle", "transfer") and "(untuned)" not in row["method"]]
    methods = list(dict.fromkeys(row["method"] for row in shown))
    size = (2.2 + 2.4 * len(targets), 0.8 + 0.26 * len(methods))
    figure, axes = plt.subplots(1, len(targets), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, victim in zip(axes[0], targets, strict=True):
        of_target = {row["method"]: row for row in shown if row["victim"] == victim}
        spent = _spent(of_target)
        for height, method in enumerate(methods):
            if method not in of_target:
                axis.text(0, height, " not comparable", va="center", fontsize=7, color="#777777")
                continue
            row = of_target[method]
            steps = row["steps_to_tuned_pgd"]
            if steps and spent:
                steps = round(spent.get(method, spent["pgd"])[row["at"].index(steps)])
            colour = COLOURS.get(_plain(method), "#777777")
            axis.barh(height, steps or 0, color=colour)
            axis.text(steps or 0, height, f" {steps or 'never'}", va="center", fontsize=7)
        most = spent["pgd"][-1] if spent else rows[0]["at"][-1]
        unit = "image evaluations" if spent else "steps"
        axis.set(title=victim, xlabel=f"{unit} to tuned PGD's final success", xlim=(0, 1.25 * most))
        axis.title.set_size(8)
        axis.xaxis.label.set_size(8)
    axes[0, 0].set_yticks(range(len(methods)), methods, fontsize=8)
    axes[0, 0].invert_yaxis()
    save(figure, path)


def public(results: Mapping[str, Any], path: Path) -> None:
    """Draws success rate against K and against the number of support images, for methods with several; or nothing."""
    panels = {"K": ("steps", "images"), "support images": ("images", "steps")}
    curves = {label: _public_curves(results["rows"], *names) for label, names in panels.items()}
    curves = {label: found for label, found in curves.items() if found}
    if not curves:
        return
    size, palette = (6.4, 4 * len(curves)), plt.get_cmap("tab10").colors + plt.get_cmap("Dark2").colors
    methods = list(dict.fromkeys(method for found in curves.values() for method, _ in found))
    styles = {m: (palette[i % len(palette)], "-o" if i < len(palette) else "--s") for i, m in enumerate(methods)}
    figure, axes = plt.subplots(len(curves), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, (label, found) in zip(axes[:, 0], curves.items(), strict=True):
        name, fixed = panels[label]
        for (method, other), rows in sorted(found.items(), key=lambda curve: -curve[1][-1]["asr"]):
            at, asr = ([row[key] for row in rows] for key in (name, "asr"))
            widths = [row["asr_interval"] or 0 for row in rows]
            colour, style = styles[method]
            several = len({count for _, count in found}) > 1
            words = f"{method}, {'K = ' if fixed == 'steps' else ''}{other}" if several else method
            words += " images" if several and fixed == "images" else ""
            axis.errorbar(at, asr, widths, fmt=style, color=colour, markersize=3, linewidth=1, capsize=2, label=words)
        axis.set(xlabel=label, ylabel="success rate", ylim=(0, None))
        if name == "images":
            axis.set_xscale("symlog")  # there may be none
            axis.set_xlim(left=-0.3)
        else:
            axis.set_xscale("log")
        ticks = sorted({row[name] for rows in found.values() for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
    save(figure, path)


def _public_curves(rows, name, fixed):
    """Rows by method and value of `fixed`, sorted by `name`, of which there are several."""
    curves: dict[tuple[str, int], list] = {}
    for row in sorted(rows, key=lambda row: row[name]):
        curves.setdefault((row["method"], row[fixed]), []).append(row)
    return {at: found for at, found in curves.items() if len(found) > 1}


def sine(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws mean squared error against the fine-tuning step, with 95% bands, one panel per network."""
    panels: dict[str, list] = {}
    for row in rows:
        panels.setdefault(f"two layers of {row['width']} units", []).append(row)
    _curves(panels, "error", "mean squared error on other points", path, log=True)


def classification(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws accuracy against the fine-tuning step, with 95% bands, one panel per kind of tasks."""
    panels: dict[str, list] = {}
    for row in rows:
        shots = f", {row['shots']}-shot" if "shots" in row else ""
        panels.setdefault(f"{row['case']} ({row['part']}){shots}", []).append(row)
    _curves(panels, "accuracy", "accuracy on other images", path)


def _curves(panels, metric, label, path, log=False):
    """Draws mean curves over the steps, with 95% bands, in one panel per title."""
    size = (3.8 * len(panels), 3.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for row in rows:
            mean, band = (np.asarray(row[name], float) for name in (metric, f"{metric}_interval"))  # None becomes nan
            steps, colour = np.arange(1, len(mean) + 1), COLOURS[row["method"]]
            axis.plot(steps, mean, color=colour, marker="o", markersize=3, label=row["method"])
            axis.fill_between(steps, mean - band, mean + band, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="fine-tuning step", yscale="log" if log else "linear")
        axis.title.set_size(9)
        axis.legend(fontsize=7, frameon=False)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(label)
    if log:  # clips diverging curves at the top
        errors = np.asarray([row[metric] for rows in panels.values() for row in rows], float)
        axes[0, 0].set_ylim(0.7 * np.nanmin(errors), 1.5 * np.nanmax(errors[:, 0]))
    save(figure, path)


#: Colours of attacks on single images. Baselines with tuned learning rates are dashed.
ZO_COLOURS = {
    "zo_sgd": "#ee8866",
    "zo_signsgd": "#4477aa",
    "zo_adam": "#ccbb44",
    "update_rnn": "#cc3311",
    "update_rnn + query_rnn": "#332288",
    "update_rnn + guided": "#228833",
}


def zo_l2l(results: Mapping[str, Any], path: Path) -> None:
    """Draws loss, with 95% bands over runs, and success rate of attacks on single images against the step."""
    rows = {row["method"]: row for row in results["rows"]}
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    for name, colour in ZO_COLOURS.items():
        for method, style in ((name, "-"), (f"{name} (tuned)", "--")):
            if method not in rows:
                continue
            row = rows[method]
            loss, band = np.asarray(row["loss"]), np.asarray(row["loss_interval"])
            steps = np.arange(1, len(loss) + 1)
            axes[0].semilogy(steps, loss, color=colour, linestyle=style, label=method)
            axes[0].fill_between(steps, loss - band, loss + band, color=colour, alpha=0.15, linewidth=0)
            axes[1].plot(steps, 100 * np.asarray(row["success"]), color=colour, linestyle=style)
    flags = results["flags"]
    axes[0].set(xlabel="step", ylabel="loss", title=f"{flags['images']} images, {flags['runs']} attacks on each")
    axes[1].set(xlabel="step", ylabel="attack success rate, %", ylim=(0, 101))
    axes[0].set_yticks([t for t in (1, 2, 3, 4, 6, 8) if t < axes[0].get_ylim()[1]])
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("")
    axes[0].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    save(figure, path)


def theory_gap(results: Mapping[str, Any], path: Path) -> None:
    """Draws the gap between the meta-gradients, and standard deviations of gradients, against the number of images."""
    rows = results["rows"]
    figure, axes = plt.subplots(1, len(rows), figsize=(4.6 * len(rows), 3.8), squeeze=False, layout="constrained")
    drawn = (
        ("gaps", "gap on a task", COLOURS["lft"], 1),
        ("norms", "LFT's meta-gradient on a task", COLOURS["pgd"], 1),
        ("query_variance", "std of the query gradient", "#bbbbbb", 0.5),
        ("support_variance", "std of the support gradient", "#777777", 0.5),
    )
    for axis, (name, lines) in zip(axes[0], rows.items(), strict=True):
        images = np.asarray([line["images"] for line in lines], float)
        for quantity, label, colour, power in drawn:
            axis.loglog(
                images, [line[quantity]["mean"] ** power for line in lines], color=colour, marker="o", label=label
            )
        axis.loglog(
            images, [line["mean_gap"] for line in lines], color=COLOURS["l2o"], marker="o", label="gap of the means"
        )
        first = lines[0]["gaps"]["mean"]
        axis.loglog(images, first * (images / images[0]) ** -0.5, "k:", label="images^-0.5")
        decay = results.get("decay", {}).get(name)
        fit = "" if decay is None else f": gap ~ images^-{decay['exponent']:.2f}"
        axis.set(title=f"{name}{fit}", xlabel="support images (as many query images)")
    axes[0, 0].legend(fontsize=8, frameon=False)
    axes[0, 0].set_ylabel("norm")
    save(figure, path)
