"""Perturbations by frequency, and how frequencies belong to periods.

An image `[H, W, C]` is padded with zeros to `[Y, X, C]`, so that the longest of `lft_jax._periods.PERIODS` divides
both sides, and has the discrete Fourier transform `[Y, X // 2 + 1, C]`. Then the images that repeat with a period `p`
are those whose frequencies are multiples of `1 / p` cycles per pixel, at every size.

A frequency's *group* is the shortest period that has it: an entry of `GROUPS`, with 0 for those that no period has.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from lft_jax._periods import PERIODS, periods_of

#: The groups of frequencies, by period in pixels; 1 for the mean, 0 for frequencies of no period.
GROUPS = (1, *PERIODS, 0)


class Frequencies(NamedTuple):
    """The frequencies of images of one size.

    Attributes:
      group: int32 `[Y, X // 2 + 1]`, the index of each frequency's group in `GROUPS`.
      copies: float32 `[Y, X // 2 + 1]`, 1 or 2: the half-spectrum of a real image has most frequencies once instead of
        twice.
      counts: float32 `[7]`, frequencies of each group, with copies; 0 for groups that the size does not have.
    """

    group: np.ndarray
    copies: np.ndarray
    counts: np.ndarray


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """The sides `(Y, X)` of an image `(H, W, C)` after padding."""
    longest = max(periods_of(shape), default=1)
    height, width = (-(-side // longest) * longest for side in shape[:2])
    return height, width


@functools.lru_cache
def frequencies(shape: tuple[int, ...]) -> Frequencies:
    """The frequencies of images `(H, W, C)`.

    Examples:
      >>> frequencies((4, 4, 3)).group.tolist()  # the mean, multiples of 1/2, and the others
      [[0, 6, 1], [6, 6, 6], [1, 6, 1], [6, 6, 6]]
    """
    height, width = sides(shape)
    group = np.full((height, width // 2 + 1), GROUPS.index(0), np.int32)
    rows, columns = np.arange(height), np.arange(width // 2 + 1)
    for period in (*reversed(periods_of(shape)), 1):
        whole = (rows * period % height == 0)[:, None] & (columns * period % width == 0)[None]
        group[whole] = GROUPS.index(period)
    once = (columns == 0) | (2 * columns == width)
    copies = np.broadcast_to(np.where(once, 1, 2).astype(np.float32), group.shape)
    counts = np.bincount(group.ravel(), copies.ravel(), len(GROUPS)).astype(np.float32)
    return Frequencies(group, copies, counts)


def transformed(images: Float[Array, "*batch H W C"]) -> Complex[Array, "*batch Y X_half C"]:
    """The discrete Fourier transform of real images, padded."""
    return jnp.fft.rfft2(images, s=sides(images.shape[-3:]), axes=(-3, -2))


def image_of(spectrum: Complex[Array, "Y X_half C"], shape: tuple[int, ...]) -> Float[Array, "H W C"]:
    """The inverse of `transformed` for images of this shape.

    Examples:
      >>> image = jnp.arange(12.0).reshape(3, 4, 1)
      >>> bool(jnp.allclose(image_of(transformed(image), image.shape), image, atol=1e-5))
      True
    """
    return jnp.fft.irfft2(spectrum, s=sides(shape), axes=(0, 1))[: shape[0], : shape[1]]


def power(spectrum: Complex[Array, "*batch Y X_half C"]) -> Float[Array, "*batch Y X_half"]:
    """The squared absolute values, summed over channels."""
    return jnp.sum(jnp.real(spectrum) ** 2 + jnp.imag(spectrum) ** 2, -1)


def noise_of_mean(copies: Float[Array, "S H W C"]) -> Float[Array, "Y X_half"]:
    """The variance of the mean over examples at each frequency: what the power of the mean is without any signal.

    Args:
      copies: `[S, H, W, C]`, per-example gradients. Of a single one the variance is unknown; the result is then 0.

    Examples:
      >>> opposite = jnp.stack([jnp.ones((2, 2, 1)), -jnp.ones((2, 2, 1))])
      >>> noise_of_mean(opposite).tolist()  # of the mean of the image alone
      [[16.0, 0.0], [0.0, 0.0]]
    """
    # The mean of the squares minus the square of the mean loses digits where examples agree. Real numbers are quicker
    # to subtract than their transforms.
    deviations = copies - jnp.mean(copies, 0, keepdims=True)
    return jnp.mean(power(transformed(deviations)), 0) / max(len(copies) - 1, 1)


def group_sums(values: Float[Array, "Y X_half"], of: Frequencies) -> Float[Array, " groups"]:
    """The sum of a quantity over each group of frequencies, with copies."""
    counted = values * jnp.asarray(of.copies, values.dtype)
    return jnp.stack([jnp.sum(jnp.where(of.group == number, counted, 0)) for number in range(len(GROUPS))])
