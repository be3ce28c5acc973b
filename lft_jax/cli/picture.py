"""Pictures of perturbations and perturbed images, drawn by matplotlib (the extra `plots`)."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lft_jax.data import ImageSource, unit_range
from lft_jax.tasks import perturb

#: Images that a picture shows.
MOST = 6


def attack_picture(
    model: Callable[[jax.Array], jax.Array],
    source: ImageSource,
    perturbations: Mapping[str, np.ndarray],
    path: Path,
    num_images: int = MOST,
) -> None:
    """Draws one row per perturbation: the perturbation, then perturbed images with the model's predictions.

    Titles are "label -> prediction", in red if the prediction is wrong. The first row has clean images.
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
        predictions = np.argmax(np.asarray(model(images)), -1)
        show(line[0], theta / (2 * limit) + 0.5)
        line[0].set_ylabel(name)
        for axis, image, predicted, label in zip(
            line[1:], np.asarray(images), predictions, labels[picked], strict=True
        ):
            show(axis, image)
            axis.set_title(f"{label} -> {predicted}", fontsize=9, color="tab:red" if predicted != label else "black")
    axes[0, 0].set_title("perturbation", fontsize=9)
    save(figure, path)


def before_and_after(
    images: np.ndarray,
    theta: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    path: Path,
    labels: np.ndarray | None = None,
) -> None:
    """Draws the perturbation, then images without it and, below, with it, each with the class that a model predicts.

    Changed predictions are red. Labels are shown where the model is wrong before.

    Args:
      images: `[N, H, W, C]`, uint8 or floating-point in [0, 1].
      theta: `[H, W, C]`, the perturbation; its largest absolute value is drawn black or white.
      before: `[N]`, predicted classes of the images.
      after: `[N]`, predicted classes of the perturbed images.
      path: of the file.
      labels: `[N]`, true classes, or None.
    """
    clean = unit_range(jnp.asarray(images))
    rows = (np.asarray(clean), np.asarray(perturb(clean, jnp.asarray(theta, clean.dtype))))
    size = (1.25 * (len(images) + 1), 3.3)
    figure, axes = plt.subplots(2, len(images) + 1, figsize=size, squeeze=False, layout="constrained")
    limit = float(np.abs(theta).max())
    show(axes[0, 0], theta / (2 * limit or 1.0) + 0.5)
    axes[0, 0].set_title("perturbation", fontsize=9)
    axes[0, 0].set_xlabel(f"{-limit:.2g} to {limit:.2g}", fontsize=8)
    axes[1, 0].axis("off")
    axes[1, 0].text(0.5, 0.5, "above: before\nbelow: after", ha="center", va="center", fontsize=9)
    for column, (first, then) in enumerate(zip(before, after, strict=True)):
        changed = first != then
        top, below = axes[:, column + 1]
        show(top, rows[0][column])
        show(below, rows[1][column])
        top.set_title(f"class {first}", fontsize=9)
        if labels is not None and first != labels[column]:
            top.set_title(f"{first} (is {labels[column]})", fontsize=9)
        style = {"color": "tab:red", "fontweight": "bold"} if changed else {}
        below.set_title(f"{first} -> {then}" if changed else f"class {then}", fontsize=9, **style)
        for spine in below.spines.values() if changed else ():
            spine.set(color="tab:red", linewidth=2)
    save(figure, path)


def show(axis, image: np.ndarray) -> None:
    """Draws one image `[H, W, C]` in [0, 1], without ticks; in grey, the mean of its channels, unless these are 3."""
    pixels = np.clip(image, 0, 1)
    pixels = pixels if pixels.shape[-1] == 3 else pixels.mean(-1)
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def save(figure, path: Path) -> None:
    """Writes a figure to a file, whose folder it makes, and closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
