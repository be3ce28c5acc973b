"""Drawing a task's images inside jit, from a padded class table."""

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import base


def draw_rows(key: jax.Array, table: jax.Array, counts: jax.Array, ways: int, per_class: int) -> jax.Array:
    """`[ways, per_class]`: classes drawn at random, in random order, and different images of each.

    Args:
      key: of the draw.
      table: `[classes, most]`, see `class_table`.
      counts: `[classes]`; a class of fewer than `per_class` images is not drawn.
      ways: classes.
      per_class: images of each.
    """
    key_classes, key_images = jax.random.split(key)
    # The largest of uniform scores are a sample without replacement, also where some entries are barred.
    scores = jnp.where(counts >= per_class, jax.random.uniform(key_classes, counts.shape), -1)
    classes = jax.lax.top_k(scores, ways)[1]
    real = jnp.arange(table.shape[1])[None] < counts[classes][:, None]
    scores = jnp.where(real, jax.random.uniform(key_images, real.shape), -1)
    columns = jax.lax.top_k(scores, per_class)[1]
    return jnp.take_along_axis(table[classes], columns, axis=1)


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
