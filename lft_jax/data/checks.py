"""What every labelled set of images must satisfy, and the table that episodes are drawn with."""

import jax
import jax.numpy as jnp
import numpy as np


def check_images_labels(images, labels, num_classes: int | None = None) -> None:
    """Raises a ValueError unless this is a set of labelled images.

    Args:
      images: `[N, H, W, C]`, uint8, or floating-point within [0, 1].
      labels: `[N]`, integers within [0, num_classes).
      num_classes: None if any label from 0 will do.

    Raises:
      ValueError: for another rank, dtype or range, a NaN, no image, or lengths that differ.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be [N, H, W, C] with no axis of length 0, got shape {images.shape}.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be [N] = ({len(images)},) like the images, got shape {labels.shape}.")
    # bfloat16 is no numpy floating type, but compares like one.
    if images.dtype != np.uint8:
        if not (np.issubdtype(images.dtype, np.floating) or images.dtype.name == "bfloat16"):
            raise ValueError(f"images must be uint8 or floating-point, got {images.dtype}.")
        low, high = images.min(), images.max()
        if not (low >= 0 and high <= 1):  # true of NaN as well
            raise ValueError(f"images must lie in [0, 1] if floating-point, got values from {low} to {high}.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    _check_labels(labels, num_classes)


def class_table(labels, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the examples of each class are.

    Args:
      labels: `[N]` integers within [0, num_classes).
      num_classes: rows of the table.

    Returns:
      `(table, counts)`: `[num_classes, most]` int32, row c holding the positions of class c in increasing order, then
      zeros; `[num_classes]` int32, how many entries of each row count.

    Raises:
      ValueError: for labels out of range.
    """
    labels = np.asarray(labels)
    _check_labels(labels, num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    order = np.argsort(labels, kind="stable")
    rows = labels[order]
    columns = np.arange(len(labels)) - (np.cumsum(counts) - counts)[rows]
    table = np.zeros((num_classes, counts.max(initial=0)), np.int32)
    table[rows, columns] = order
    return table, counts.astype(np.int32)


def _check_labels(labels, num_classes):
    low, high = labels.min(initial=0), labels.max(initial=0)
    if low < 0 or (num_classes is not None and high >= num_classes):
        expected = "at least 0" if num_classes is None else f"within [0, {num_classes})"
        raise ValueError(f"labels must be {expected}, got values from {low} to {high}.")


def unit_range(images: jax.Array) -> jax.Array:
    """uint8 images as float32 in [0, 1]; floating-point images as they are."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
