"""Small classifiers whose weights are the optimizee: plain functions, fast where each of many tasks has its own.

Weights are `{"body": [layer, ...], "head": {"weight": [in, ways], "bias": [ways]}}`; a layer of "conv4" is `{"kernel",
"scale", "bias"}`, one of "mlp" `{"weight", "bias"}`. No layer looks at other images of a batch, so an image's logits do
not depend on what it is asked with.
"""

import math

import jax
import jax.numpy as jnp

from lft_jax import base
from lft_jax._layers import conv_by_patches, max_pool
from lft_jax.base import PyTree

#: Customary widths: maps of a convolution, units of a hidden layer.
WIDTHS = {"linear": 0, "mlp": 32, "conv4": 16}
_BLOCKS = 4
_EPSILON = 1e-5


def init_network(architecture: str, width: int, shape: tuple[int, ...], ways: int, key: jax.Array, dtype) -> PyTree:
    """Weights for images of `shape` `[H, W, C]`: normal with variance 1 / inputs (2 / inputs before a relu), biases 0.

    Args:
      architecture: "linear" (the head alone), "mlp" (a hidden layer), or "conv4" (Vinyals et al. 2016: four blocks of
        a 3x3 convolution, normalisation, relu and 2x2 pooling; here normalised over each image's own maps and
        positions, not over a batch, and pooled first, as long as there are two pixels to pool).
      width: of the hidden layer, or maps of each convolution; "linear" has none.
      shape: of an image.
      ways: outputs.
      key: of the draw.
      dtype: of the weights.
    """
    key_head, *keys = jax.random.split(key, 1 + _BLOCKS)

    def drawn(key, inputs, shape, gain):
        return jax.random.normal(key, shape, dtype) * math.sqrt(gain / inputs)

    body, features = [], math.prod(shape)
    if architecture == "mlp":
        body.append({"weight": drawn(keys[0], features, (features, width), 2), "bias": jnp.zeros(width, dtype)})
        features = width
    if architecture == "conv4":
        height, length, channels = shape
        for layer_key in keys:
            kernel = drawn(layer_key, 9 * channels, (3, 3, channels, width), 2)
            body.append({"kernel": kernel, "scale": jnp.ones(width, dtype), "bias": jnp.zeros(width, dtype)})
            channels = width
            if min(height, length) > 1:
                height, length = height // 2, length // 2
        features = height * length * width
    head = {"weight": drawn(key_head, features, (features, ways), 1), "bias": jnp.zeros(ways, dtype)}
    return {"body": body, "head": head}


def apply_network(theta: PyTree, images: jax.Array) -> jax.Array:
    """Logits `[N, ways]` of images `[N, H, W, C]` in [0, 1]; the weights tell which architecture it is."""
    x = images
    for layer in theta["body"]:
        if "kernel" in layer:
            # Pooled before anything else: XLA computes what is elementwise anew wherever it is read, with other
            # rounding, and the gradient of a maximum that is found nowhere is NaN. Less is left to normalise, too.
            x = conv_by_patches(x, layer["kernel"])
            x = _normalised(max_pool(x) if min(x.shape[1:3]) > 1 else x)
            x = jax.nn.relu(x * layer["scale"][None, None, None] + layer["bias"][None, None, None])
        else:
            x = jax.nn.relu(_affine(layer, x.reshape(len(x), -1)))
    return _affine(theta["head"], x.reshape(len(x), -1))


def check_network(architecture: str, width: int | None) -> int:
    """The width, or the customary one for None; raises a ValueError for an unknown architecture or a bad width."""
    base.check_name("architecture", architecture, WIDTHS)
    if architecture == "linear":
        if width is not None:
            raise ValueError(f"width: 'linear' has no hidden layer to be {width!r} wide; leave it out.")
        return 0
    width = WIDTHS[architecture] if width is None else width
    base.check_at_least("width", width, 1)
    return width


def _affine(layer, x):
    return x @ layer["weight"] + layer["bias"][None]


def _normalised(x):
    offset = x - jnp.mean(x, (1, 2, 3), keepdims=True)
    return offset * jax.lax.rsqrt(jnp.mean(offset**2, (1, 2, 3), keepdims=True) + _EPSILON)
