"""Perturbations that repeat: averages over translations, and the pattern that an average stands for.

With period `p`, the pixels `(i, j)` of an image fall into `p * p` groups by `(i mod p, j mod p)`. The means of the
groups are a tile `[p, p, C]`; repeated, it is the image's projection onto the images that repeat with period `p`. Sides
need no multiple of `p`: groups may differ in size. As each period divides the next, the projections are nested.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

#: The periods in use, in pixels, each a divisor of the next. Those of at least a side of an image are left out.
PERIODS = (2, 4, 8, 16, 32)


class Period(NamedTuple):
    """A mean over examples, averaged over translations.

    Attributes:
      mean: `[p, p, C]`, or `[H, W, C]` without translations.
      error: of the same shape: the standard error of `mean`, from the variance over examples.
    """

    mean: Any
    error: Any


def periods_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The periods for images `(H, W, C)`."""
    return tuple(period for period in PERIODS if period < min(shape[:2]))


def group_sizes(shape: tuple[int, ...], period: int) -> np.ndarray:
    """Pixels of each group, float32 `[p, p, 1]`."""
    rows, columns = (np.bincount(np.arange(side) % period, minlength=period) for side in shape[:2])
    return (rows[:, None] * columns[None, :])[..., None].astype(np.float32)


def group_sums(images: Float[Array, "*batch H W C"], period: int) -> Float[Array, "*batch p p C"]:
    """The sum of each group."""
    *batch, height, width, channels = images.shape
    missing = [(-side) % period for side in (height, width)]
    if any(missing):
        images = jnp.pad(images, [(0, 0)] * len(batch) + [(0, missing[0]), (0, missing[1]), (0, 0)])
    rows, columns = ((side + more) // period for side, more in zip((height, width), missing, strict=True))
    return images.reshape(*batch, rows, period, columns, period, channels).sum((-5, -3))


def tile_of(image: Float[Array, "*batch H W C"], period: int) -> Float[Array, "*batch p p C"]:
    """The mean of each group.

    An image that is smaller than a tile has groups without pixels; their mean is 0.

    Examples:
      >>> tile_of(jnp.asarray([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).reshape(3, 2, 1), 2)[..., 0].tolist()
      [[3.0, 4.0], [3.0, 4.0]]
    """
    sizes = jnp.maximum(jnp.asarray(group_sizes(image.shape[-3:], period), image.dtype), 1)
    return group_sums(image, period) / sizes.reshape((1,) * (image.ndim - 3) + sizes.shape)


def repeated(tile: Float[Array, "p p C"], shape: tuple[int, ...]) -> Float[Array, "H W C"]:
    """The image `(H, W, C)` that a tile repeats over.

    Examples:
      >>> repeated(jnp.asarray([[[1.0], [2.0]]]), (1, 5, 1)).ravel().tolist()
      [1.0, 2.0, 1.0, 2.0, 1.0]
    """
    times = [-(-side // own) for side, own in zip(shape[:2], tile.shape[:2], strict=True)]
    return jnp.tile(tile, (*times, 1))[: shape[0], : shape[1]]


def summarized(copies: Float[Array, "S H W C"]) -> dict[int, Period]:
    """Means and standard errors over examples, for each period, and for 0 without translations.

    Args:
      copies: `[S, H, W, C]`, per-example gradients.

    Examples:
      >>> found = summarized(jnp.stack([jnp.zeros((4, 4, 1)), jnp.ones((4, 4, 1))]))
      >>> sorted(found), found[2].mean.shape, float(found[2].mean[0, 0, 0]), float(found[2].error[0, 0, 0])
      ([0, 2], (2, 2, 1), 0.5, 0.5)
    """
    shape = copies.shape[1:]
    found = {0: _period(copies)}
    periods = periods_of(shape)
    sums = copies
    for period in reversed(periods):  # each from the next longer one, whose groups it unites
        sums = group_sums(sums, period)
        sizes = jnp.asarray(group_sizes(shape, period), copies.dtype)
        found[period] = _period(sums / sizes[None])
    return found


def _period(copies):
    variance = jnp.var(copies, axis=0) / max(len(copies) - 1, 1)
    positive = variance > 0
    return Period(jnp.mean(copies, axis=0), jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0))


def shrunk(summary: dict[int, Period], shape: tuple[int, ...]) -> Float[Array, "H W C"]:
    """The mean with each band of periods weighted by its signal: the empirical Wiener filter over nested periods.

    The band of a period is what its tile adds to that of the next shorter period. With `E` the energy of a band of the
    mean and `N` that of its error, the weight is `max(E - N, 0) / E`.

    Args:
      summary: what `summarized` returns for images of this shape.
      shape: `(H, W, C)`.

    Examples:
      What two examples share passes, what differs between them does not:

      >>> shared, differs = jnp.asarray([1.0, -1.0, 1.0, -1.0]), jnp.asarray([0.5, 0.5, -0.5, -0.5])
      >>> examples = jnp.stack([shared + differs, shared - differs])[:, None, :, None]
      >>> shrunk(summarized(jnp.tile(examples, (1, 4, 1, 1))), (4, 4, 1))[0, :, 0].tolist()
      [1.0, -1.0, 1.0, -1.0]
    """
    tile = estimate = jnp.zeros((1, 1, shape[-1]), summary[0].mean.dtype)
    energy_before, noise_before = jnp.zeros((), tile.dtype), jnp.zeros((), tile.dtype)
    for period in (*periods_of(shape), 0):
        mean, error = summary[period]
        sizes = jnp.ones((1, 1, 1), mean.dtype) if not period else jnp.asarray(group_sizes(shape, period), mean.dtype)
        energy, noise = jnp.sum(sizes * mean**2), jnp.sum(sizes * error**2)
        own = jnp.maximum(energy - energy_before, 0)
        weight = jnp.maximum(own - jnp.maximum(noise - noise_before, 0), 0) / jnp.where(own > 0, own, 1)
        # Both are tiles of the shorter period; repeated, they are images of this one.
        estimate = repeated(estimate, mean.shape) + weight * (mean - repeated(tile, mean.shape))
        tile = mean
        energy_before, noise_before = energy, noise
    return estimate
