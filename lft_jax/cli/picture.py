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


def attack_picture(
    model: Callable[[jax.Array], jax.Array],
    source: ImageSource,
    perturbations: Mapping[str, np.ndarray],
    path: Path,
    num_images: int = 6,
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


def show(axis, image: np.ndarray) -> None:
    """Draws one image `[H, W, C]` in [0, 1], without ticks."""
    axis.imshow(np.squeeze(np.clip(image, 0, 1)), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def save(figure, path: Path) -> None:
    """Writes a figure to a file, whose folder it makes, and closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
