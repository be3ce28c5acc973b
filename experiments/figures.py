"""The figures of a comparison."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments import tables
from lft_jax.data import ImageSource, unit_range
from lft_jax.tasks.perturbation import perturb

#: Methods drawn, in order, with their colours; the rest are in the table.
COLOURS = {
    "pgd (untuned)": "#bbbbbb",
    "pgd": "#4477aa",
    "momentum_pgd": "#66ccee",
    "sgd": "#ee8866",
    "adam": "#ccbb44",
    "uap_sgd": "#aa3377",
    "transfer, fine-tuned": "#7755dd",
    "maml": "#997700",
    "meta_sgd": "#cc99bb",
    "joint": "#332288",
    "l2o": "#228833",
    "lft": "#cc3311",
    "oracle": "#000000",
}


def asr_against_step(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a target: mean query ASR against the fine-tuning step, with 95% bands."""
    targets = list(dict.fromkeys((row["source"], row["victim"], row["seen_victim"]) for row in rows))
    columns = min(3, len(targets))
    lines = -(-len(targets) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(targets) :]:
        axis.axis("off")
    for axis, (source, victim, seen) in zip(axes.flat, targets, strict=False):
        of_target = {row["method"]: row for row in rows if (row["source"], row["victim"]) == (source, victim)}
        for method, colour in COLOURS.items():  # in this order, the learned ones on top
            if method not in of_target:
                continue
            row = of_target[method]
            if method == "oracle":
                axis.axhline(row["asr"][-1], color=colour, linestyle=":", label="oracle (all images)")
                continue
            at, asr, width = (np.asarray(row[name], float) for name in ("at", "asr", "asr_interval"))
            axis.plot(at, asr, color=colour, marker="o", markersize=2, label=method)
            axis.fill_between(at, asr - width, asr + width, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=f"{victim} ({'seen' if seen else 'unseen'} victim)", xlabel="fine-tuning step", ylim=(0, None))
        axis.set_xticks(tables.shown_steps(of_target["pgd"]["at"]))
        axis.grid(alpha=0.3)
    for line in axes:
        line[0].set_ylabel("query attack success rate")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(5, 2 * columns, len(handles)),
        frameon=False,
        fontsize=9,
    )
    _save(figure, path)


def attack(
    logits_fn: Callable[[jax.Array], jax.Array],
    source: ImageSource,
    perturbations: Mapping[str, np.ndarray],
    path: Path,
    num_images: int = 6,
) -> None:
    """A line a perturbation: the perturbation, then perturbed images with the victim's answers.

    Titles are "label -> answer", red where the answer is wrong; the first line is clean.
    """
    labels = np.asarray(source.labels)
    picked = np.asarray([np.flatnonzero(labels == label)[0] for label in np.unique(labels)[:num_images]])
    clean = unit_range(jnp.asarray(source.images[picked]))
    lines = {"clean": np.zeros(clean.shape[1:], clean.dtype), **perturbations}
    size = (1.25 * (len(picked) + 1), 1.5 * len(lines))
    figure, axes = plt.subplots(len(lines), len(picked) + 1, figsize=size, squeeze=False, layout="constrained")
    limit = max(float(np.abs(theta).max()) for theta in perturbations.values()) or 1.0
    for line, (name, theta) in zip(axes, lines.items(), strict=True):
        images = perturb(clean, jnp.asarray(theta))
        answers = np.argmax(np.asarray(logits_fn(images)), -1)
        show(line[0], theta / (2 * limit) + 0.5)
        line[0].set_ylabel(name)
        for axis, image, answer, label in zip(line[1:], np.asarray(images), answers, labels[picked], strict=True):
            show(axis, image)
            axis.set_title(f"{label} -> {answer}", fontsize=9, color="tab:red" if answer != label else "black")
    axes[0, 0].set_title("perturbation", fontsize=9)
    _save(figure, path)


def show(axis, image: np.ndarray) -> None:
    """Draws one image `[H, W, C]` in [0, 1] without ticks."""
    axis.imshow(np.squeeze(np.clip(image, 0, 1)), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def _save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
