"""Sampling the images of a task under jit, from a padded class table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray, UInt8

from lft_jax import base


@dataclasses.dataclass(frozen=True)
class TaskSize:
    """Number of images of a task.

    Attributes:
      ways: number of classes of a task, at least 1.
      shots: support images per class, at least 1.
      query_shots: query images per class, disjoint from the support images, at least 1.

    Raises:
      ValueError: for a number below 1.

    Examples:
      >>> TaskSize(ways=10, shots=1, query_shots=5).per_class
      6
    """

    ways: int
    shots: int
    query_shots: int

    def __post_init__(self):
        for name in ("ways", "shots", "query_shots"):
            base.check_at_least(name, getattr(self, name), 1)

    @property
    def per_class(self) -> int:
        """Images per class, `shots + query_shots`."""
        return self.shots + self.query_shots


def draw_rows(
    key: PRNGKeyArray,
    table: Integer[Array | np.ndarray, "classes most"],
    counts: Integer[Array | np.ndarray, " classes"],
    size: TaskSize,
) -> tuple[Integer[Array, "ways shots"], Integer[Array, "ways query_shots"]]:
    """Draws the support and query images of a task, as positions in a data set.

    Classes are drawn without replacement, and so are the images of a class. Traceable.

    Args:
      key: PRNG key of the draw.
      table: `[classes, most]`, see `class_table`.
      counts: `[classes]`, number of images per class; classes of fewer than `size.per_class` images are not drawn. At
        least `size.ways` classes must have as many.
      size: number of images of the task.

    Returns:
      `(support, query)`: positions `[ways, shots]` and `[ways, query_shots]`. A row is of one class.

    Examples:
      >>> from lft_jax.data import class_table
      >>> labels = np.repeat(np.arange(4), 6)
      >>> table, counts = class_table(labels, num_classes=4)
      >>> support, query = draw_rows(jax.random.key(0), table, counts, TaskSize(ways=2, shots=1, query_shots=3))
      >>> support.shape, query.shape
      ((2, 1), (2, 3))
      >>> bool(np.all(labels[support] == labels[query]))
      True
    """
    key_classes, key_images = jax.random.split(key)
    # The largest of uniform scores are a sample without replacement; excluded entries have the score -1.
    scores = jnp.where(counts >= size.per_class, jax.random.uniform(key_classes, counts.shape), -1)
    classes = jax.lax.top_k(scores, size.ways)[1]
    real = jnp.arange(table.shape[1], dtype=counts.dtype)[None] < counts[classes][:, None]
    scores = jnp.where(real, jax.random.uniform(key_images, real.shape), -1)
    columns = jax.lax.top_k(scores, size.per_class)[1]
    rows = jnp.take_along_axis(table[classes], columns, axis=1)
    return rows[:, : size.shots], rows[:, size.shots :]


def resized(
    images: UInt8[Array | np.ndarray, "N H W C"] | Float[Array | np.ndarray, "N H W C"], size: int
) -> UInt8[np.ndarray, "N {size} {size} C"] | Float[np.ndarray, "N {size} {size} C"]:
    """Resizes images bilinearly, with antialiasing.

    Args:
      images: `[N, H, W, C]`, uint8 in [0, 255] or floating-point in [0, 1].
      size: height and width of the result, at least 1.

    Returns:
      `[N, size, size, C]`, of the same dtype; `images` itself, as a NumPy array, if they have that size.

    Raises:
      ValueError: for a size below 1.

    Examples:
      >>> resized(np.full((1, 4, 4, 1), 7, np.uint8), 2).ravel().tolist()
      [7, 7, 7, 7]
    """
    base.check_at_least("size", size, 1)
    images = np.asarray(images)
    if images.shape[1:3] == (size, size):
        return images
    parts = []
    for part in np.split(images, range(1000, len(images), 1000)):  # in parts: a whole data set in float32 may be large
        shape = (len(part), size, size, part.shape[-1])
        scaled = jax.image.resize(part.astype(np.float32), shape, "bilinear")
        scaled = jnp.round(scaled) if images.dtype == np.uint8 else jnp.clip(scaled, 0, 1)
        parts.append(np.asarray(scaled).astype(images.dtype))
    return np.concatenate(parts)
