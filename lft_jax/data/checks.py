"""Checks of labelled images, and the class table that episodes are drawn from."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int32, Integer, UInt8

#: How far outside of [0, 1] rounding may put an image.
ROUNDING = 1e-6
#: Largest number of classes of images in files: tables have a row for each class.
MOST_CLASSES = 1_000_000
#: Numbers of channels by which images with the channels first are told.
CHANNELS = (1, 3, 4)


def check_images_labels(images: ArrayLike, labels: ArrayLike, num_classes: int | None = None) -> None:
    """Raises a ValueError unless images and labels are valid.

    Args:
      images: `[N, H, W, C]`, uint8 in [0, 255] or floating-point in [0, 1].
      labels: `[N]`, integers in [0, num_classes).
      num_classes: number of classes; None for no upper limit on the labels.

    Raises:
      ValueError: for another rank, dtype or range, channels first, a NaN, an axis of length 0, or lengths that differ.

    Examples:
      >>> check_images_labels(np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 3]), num_classes=4)
      >>> check_images_labels(np.full((2, 8, 8, 1), 1.5), np.array([0, 3]))
      Traceback (most recent call last):
          ...
      ValueError: images must lie in [0, 1] if floating-point, got values from 1.5 to 1.5.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be [N, H, W, C] with no axis of length 0, got shape {images.shape}.")
    if images.shape[1] in CHANNELS and images.shape[3] > max(CHANNELS):
        raise ValueError(
            f"images must be [N, H, W, C] with the channels last, got shape {images.shape}; pass "
            "images.transpose(0, 2, 3, 1), and channels='first' to the adapter of a model that takes [N, C, H, W]."
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be [N] = ({len(images)},) like the images, got shape {labels.shape}.")
    # bfloat16 is not a floating type to numpy, but compares like one.
    if images.dtype != np.uint8:
        if not (np.issubdtype(images.dtype, np.floating) or images.dtype.name == "bfloat16"):
            raise ValueError(f"images must be uint8 or floating-point, got {images.dtype}.")
        low, high = images.min(), images.max()
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # also true for NaN
            hint = " Divide them by 255?" if 2 < high <= 255 and low >= 0 else ""
            raise ValueError(f"images must lie in [0, 1] if floating-point, got values from {low} to {high}.{hint}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    _check_labels(labels, num_classes)


def class_table(
    labels: Integer[Array | np.ndarray, " N"], num_classes: int
) -> tuple[Int32[np.ndarray, "classes most"], Int32[np.ndarray, " classes"]]:
    """The positions of the examples of each class, as a padded table.

    Args:
      labels: `[N]`, integers in [0, num_classes).
      num_classes: number of rows of the table.

    Returns:
      `(table, counts)`. Row c of `table`, `[num_classes, most]` int32, has the positions of class c in increasing
      order, padded with zeros. `counts`, `[num_classes]` int32, has the number of examples of each class.

    Raises:
      ValueError: for labels out of range.

    Examples:
      >>> table, counts = class_table(np.array([1, 0, 1]), num_classes=3)
      >>> table.tolist(), counts.tolist()
      ([[1, 0], [0, 2], [0, 0]], [1, 2, 0])
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


def unit_range(images: UInt8[Array, "*shape"] | Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Converts uint8 images to float32 in [0, 1]; returns floating-point images unchanged.

    Args:
      images: of any shape, uint8 in [0, 255] or floating-point in [0, 1].

    Returns:
      Floating-point images of the same shape.

    Examples:
      >>> unit_range(jnp.array([0, 255], jnp.uint8)).tolist()
      [0.0, 1.0]
    """
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
