"""Images that stand for those of a data set that is not at hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lft_jax import base

#: Slopes of the amplitudes, from nearly noise to smooth fields, and contrasts.
_SLOPES, _CONTRASTS = (0.5, 2.0), (0.1, 0.3)


def synthetic_images(key: PRNGKeyArray, number: int, shape: tuple[int, int, int]) -> Float[Array, "number H W C"]:
    """Clouds: noise whose amplitude falls with the frequency `f` as `1 / f^a`, as that of photographs does.

    Each image has its own slope `a`, uniform in [0.5, 2], so that some are nearly noise and others smooth fields. It
    has its own color, and its own contrast, uniform in [0.1, 0.3]. Most of the noise is common to the channels.

    Args:
      key: PRNG key.
      number: number of images, at least 1.
      shape: `(H, W, C)` of an image, of any size.

    Returns:
      `[number, H, W, C]` in [0, 1].

    Raises:
      ValueError: for a number below 1, or a shape that is not three whole numbers of at least 1.

    Examples:
      >>> images = synthetic_images(jax.random.key(0), 10, (32, 32, 3))
      >>> images.shape, bool((images >= 0).all() and (images <= 1).all())
      ((10, 32, 32, 3), True)

    References:
      Attacks without data: Mopuri et al. 2018, GD-UAP, arXiv 1801.08092; from artificial images: Zhang et al. 2021,
      Data-free universal adversarial perturbation and black-box attack, ICCV; Liu et al. 2023, TRM-UAP, ICCV. Learning
      from noise with the spectrum of photographs: Baradad et al. 2021, arXiv 2106.05963, section 3.
    """
    base.check_count("number", number, 1)
    if len(shape) != 3 or any(not isinstance(side, int | np.integer) or side < 1 for side in shape):
        raise ValueError(f"shape must be (H, W, C), whole numbers of at least 1, got {shape!r}.")
    return _clouds(key, number, tuple(map(int, shape)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _clouds(key, number, shape):
    return jax.lax.map(lambda key: _cloud(key, shape), jax.random.split(key, number))


def _cloud(key, shape):
    """One image `[H, W, C]`."""
    height, width, channels = shape
    key_noise, key_slope, key_contrast, key_brightness, key_color = jax.random.split(key, 5)
    slope = jax.random.uniform(key_slope, minval=_SLOPES[0], maxval=_SLOPES[1])
    frequency = jnp.hypot(jnp.fft.fftfreq(height)[:, None], jnp.fft.rfftfreq(width)[None])
    gains = jnp.where(frequency > 0, frequency, 1.0) ** -slope
    noise = jnp.fft.rfft2(jax.random.normal(key_noise, shape), axes=(0, 1))
    noise = jnp.fft.irfft2(noise * gains.astype(noise.dtype)[..., None], s=(height, width), axes=(0, 1))
    noise -= jnp.mean(noise, (0, 1), keepdims=True)
    noise /= jnp.maximum(jnp.std(noise, (0, 1), keepdims=True), 1e-6)
    common = jnp.mean(noise, -1, keepdims=True)
    noise = 0.7 * channels**0.5 * common + 0.5 * (noise - common)
    contrast = jax.random.uniform(key_contrast, minval=_CONTRASTS[0], maxval=_CONTRASTS[1])
    color = jax.random.uniform(key_brightness, (1, 1, 1))
    color += 0.2 * jax.random.uniform(key_color, (1, 1, channels), minval=-1, maxval=1)
    return jnp.clip(0.2 + 0.6 * jnp.clip(color, 0, 1) + contrast * noise, 0, 1)
