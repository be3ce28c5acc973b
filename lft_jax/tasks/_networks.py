"""Small classifiers whose weights are the optimizee, as plain functions that are fast under `jax.vmap` over tasks.

Weights are `{"body": [layer, ...], "head": {"weight": [in, ways], "bias": [ways]}}`. A layer of "conv4" is `{"kernel",
"scale", "bias"}`, one of "conv4_strided" is `{"strided_kernel", "scale", "bias"}`, one of "mlp" is `{"weight",
"bias"}`. Only "conv4_strided" mixes the images of a batch: it normalizes by their statistics. In the other networks the
logits of an image do not depend on the rest of its batch.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lft_jax import base
from lft_jax._layers import conv_by_patches, max_pool
from lft_jax.base import PyTree

#: Default widths: channels of each convolution, or units of the hidden layer.
WIDTHS = {"linear": 0, "mlp": 32, "conv4": 16, "conv4_strided": 64}
_BLOCKS = 4
_EPSILON = 1e-5


def init_network(
    architecture: str, width: int, shape: tuple[int, ...], ways: int, key: PRNGKeyArray, dtype: jax.typing.DTypeLike
) -> PyTree:
    """Random weights: normal with variance 1 / inputs, or 2 / inputs before a relu; biases are 0.

    Args:
      architecture: "linear" is the head alone, "mlp" has one hidden layer. "conv4" has four blocks of a 3x3
        convolution, 2x2 pooling (while both sides exceed one pixel), normalization and relu, after Vinyals et al. 2016;
        it normalizes each image over its own channels and positions, not over a batch. "conv4_strided" is the network
        that Finn et al. 2017 (arXiv 1703.03400, section 5.2) use for Omniglot: convolutions of stride 2 without
        pooling, each channel normalized over the batch that it is given, also at test time, and a mean over positions
        before the head.
      width: units of the hidden layer, or channels of each convolution; "linear" ignores it.
      shape: `(H, W, C)` of an image.
      ways: number of outputs.
      key: PRNG key of the draw.
      dtype: dtype of the weights.
    """
    key_head, *keys = jax.random.split(key, 1 + _BLOCKS)

    def drawn(key, inputs, shape, gain):
        return jax.random.normal(key, shape, dtype) * math.sqrt(gain / inputs)

    body, features = [], math.prod(shape)
    if architecture == "mlp":
        body.append({"weight": drawn(keys[0], features, (features, width), 2), "bias": jnp.zeros(width, dtype)})
        features = width
    if architecture in ("conv4", "conv4_strided"):
        name = "kernel" if architecture == "conv4" else "strided_kernel"
        height, length, channels = shape
        for layer_key in keys:
            kernel = drawn(layer_key, 9 * channels, (3, 3, channels, width), 2)
            body.append({name: kernel, "scale": jnp.ones(width, dtype), "bias": jnp.zeros(width, dtype)})
            channels = width
            if min(height, length) > 1:
                height, length = height // 2, length // 2
        features = height * length * width if architecture == "conv4" else width
    head = {"weight": drawn(key_head, features, (features, ways), 1), "bias": jnp.zeros(ways, dtype)}
    return {"body": body, "head": head}


def apply_network(theta: PyTree, images: Float[Array, "N H W C"]) -> Float[Array, "N ways"]:
    """Logits of images in [0, 1]; the structure of the weights determines the architecture."""
    x = images
    for layer in theta["body"]:
        if "kernel" in layer:
            # Pool right after the convolution. XLA may recompute elementwise results wherever they are read, with
            # different rounding; pooling would then find no entry equal to the maximum, and its gradient is NaN.
            # There is also less to normalize.
            x = conv_by_patches(x, layer["kernel"])
            x = _scaled(layer, _normalized(max_pool(x) if min(x.shape[1:3]) > 1 else x, (1, 2, 3)))
        elif "strided_kernel" in layer:
            x = _scaled(layer, _normalized(conv_by_patches(x, layer["strided_kernel"], stride=2), (0, 1, 2)))
            x = jnp.mean(x, (1, 2), keepdims=True) if layer is theta["body"][-1] else x
        else:
            x = jax.nn.relu(_affine(layer, x.reshape(len(x), -1)))
    return _affine(theta["head"], x.reshape(len(x), -1))


def check_network(architecture: str, width: int | None) -> int:
    """The width, or the default one of the architecture for None.

    Raises:
      ValueError: for an unknown architecture or a width out of range.
    """
    base.check_name("architecture", architecture, WIDTHS)
    if architecture == "linear":
        if width is not None:
            raise ValueError(f"width: 'linear' has no hidden layer, got {width!r}; leave it out.")
        return 0
    width = WIDTHS[architecture] if width is None else width
    base.check_at_least("width", width, 1)
    return width


def _affine(layer, x):
    return x @ layer["weight"] + layer["bias"][None]


def _scaled(layer, x):
    return jax.nn.relu(x * layer["scale"][None, None, None] + layer["bias"][None, None, None])


def _normalized(x, axes):
    offset = x - jnp.mean(x, axes, keepdims=True)
    return offset * jax.lax.rsqrt(jnp.mean(offset**2, axes, keepdims=True) + _EPSILON)
