"""Sampling a task's images inside jit, from a padded class table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import base


@dataclasses.dataclass(frozen=True)
class TaskSize:
    """How many images a task has: N-way, M-shot.

    Attributes:
      ways: classes of a task, at least 1.
      shots: support images per class, at least 1.
      query_shots: query images per class, disjoint from the support images, at least 1.

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
        """Images of one class that a task needs."""
        return self.shots + self.query_shots


def draw_rows(key: jax.Array, table: jax.Array, counts: jax.Array, size: TaskSize) -> tuple[jax.Array, jax.Array]:
    """Support rows `[ways, shots]` and query rows `[ways, query_shots]`: random classes, distinct images of each.

    Args:
      key: PRNG key.
      table: `[classes, most]` int32, see `class_table`.
      counts: `[classes]` int32; a class of fewer than `size.per_class` images is not drawn.
      size: of the task.
    """
    key_classes, key_images = jax.random.split(key)
    # The largest of uniform scores are a sample without replacement, even where some entries are excluded.
    scores = jnp.where(counts >= size.per_class, jax.random.uniform(key_classes, counts.shape), -1)
    classes = jax.lax.top_k(scores, size.ways)[1]
    real = jnp.arange(table.shape[1])[None] < counts[classes][:, None]
    scores = jnp.where(real, jax.random.uniform(key_images, real.shape), -1)
    columns = jax.lax.top_k(scores, size.per_class)[1]
    rows = jnp.take_along_axis(table[classes], columns, axis=1)
    return rows[:, : size.shots], rows[:, size.shots :]


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Images `[N, H, W, C]` scaled to `[N, size, size, C]`, bilinearly and without aliasing, in their own dtype.

    Raises:
      ValueError: for a size below 1.
    """
    base.check_at_least("size", size, 1)
    images = np.asarray(images)
    if images.shape[1:3] == (size, size):
        return images
    parts = []
    for part in np.split(images, range(1000, len(images), 1000)):  # a set as floating-point numbers may be large
        shape = (len(part), size, size, part.shape[-1])
        scaled = jax.image.resize(part.astype(np.float32), shape, "bilinear")
        scaled = jnp.round(scaled) if images.dtype == np.uint8 else jnp.clip(scaled, 0, 1)
        parts.append(np.asarray(scaled).astype(images.dtype))
    return np.concatenate(parts)
