"""Images that stand for those of a data set that is not there."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


@functools.partial(jax.jit, static_argnums=(1, 2))
def synthetic_images(key: PRNGKeyArray, number: int, shape: tuple[int, int, int]) -> Float[Array, "number H W C"]:
    """Clouds of noise."""
    return jax.lax.map(lambda key: _cloud(key, shape), jax.random.split(key, number))


def _cloud(key, shape):
    height, width, channels = shape
    k1, k2, k3, k4, k5 = jax.random.split(key, 5)
    a = jax.random.uniform(k2, (), minval=0.5, maxval=2.0)
    f = jnp.sqrt(jnp.fft.fftfreq(height)[:, None] ** 2 + jnp.fft.rfftfreq(width)[None] ** 2)
    f = jnp.where(f == 0, 1.0, f)
    z = jnp.fft.rfft2(jax.random.normal(k1, shape), axes=(0, 1)) * (f**-a).astype(jnp.complex64)[..., None]
    x = jnp.fft.irfft2(z, s=(height, width), axes=(0, 1))
    x = (x - x.mean((0, 1), keepdims=True)) / jnp.maximum(x.std((0, 1), keepdims=True), 1e-6)
    common = x.mean(-1, keepdims=True)
    x = 0.7 * common * channels**0.5 + 0.5 * (x - common)
    con = jax.random.uniform(k3, (), minval=0.1, maxval=0.3)
    y = jax.random.uniform(k4, (1, 1, 1)) + 0.2 * jax.random.uniform(k5, (1, 1, channels), minval=-1, maxval=1)
    return jnp.clip(jnp.clip(y, 0, 1) * 0.6 + 0.2 + con * x, 0, 1)
