"""The network of a rule: dense layers, LSTM cells and 3x3 convolutions, on arrays `[channels, *shape]`.

Channels lead and coordinates trail, so that matrix products have the long axis last.
"""

import math

import jax
import jax.numpy as jnp


def affine(layer, x):
    """`[in, n] -> [out, n]` by one matrix product, in the dtype of `x`."""
    return layer["weight"].astype(x.dtype) @ x + layer["bias"].astype(x.dtype)[:, None]


def lstm(cell, x, carry):
    hidden, memory = carry
    weight = jnp.concatenate([cell["weight"], cell["bias"][:, None]], axis=1).astype(x.dtype)
    # The bias is one more input. Rows are concatenated under an axis of size 1; otherwise XLA splits the product in two
    # and adds the results, and arrays as large as the gates are slow to write and read.
    rows = [part[:, None] for part in (x, hidden, jnp.ones((1, x.shape[1]), x.dtype))]
    hidden, memory = _gated(weight @ jnp.concatenate(rows).reshape(weight.shape[1], x.shape[1]), memory)
    return hidden, (hidden, memory)


@jax.custom_vjp
def _gated(gates, memory):
    """Next hidden state and memory of an LSTM, from gates `[4 hidden, n]` and memory `[hidden, n]`."""
    write, forget, read, candidate = _activations(gates)
    memory = forget * memory + write * candidate
    return read * jnp.tanh(memory), memory


def _activations(gates):
    *gates, candidate = jnp.split(gates, 4)
    return *map(jax.nn.sigmoid, gates), jnp.tanh(candidate)


def _gated_backward(saved, cotangents):
    # Autodiff would store each activation. Recomputing them from the gates is twice as fast: in a scan, storing costs
    # more than arithmetic.
    gates, memory = saved
    d_hidden, d_memory = cotangents
    write, forget, read, candidate = _activations(gates)
    squashed = jnp.tanh(forget * memory + write * candidate)
    d_memory += d_hidden * read * (1 - squashed**2)
    d_gates = [
        d_memory * candidate * write * (1 - write),
        d_memory * memory * forget * (1 - forget),
        d_hidden * squashed * read * (1 - read),
        d_memory * write * (1 - candidate**2),
    ]
    return jnp.concatenate(d_gates), d_memory * forget


_gated.defvjp(lambda gates, memory: (_gated(gates, memory), (gates, memory)), _gated_backward)


def convolution(layer, x):
    """A 3x3 convolution with zero padding, `[in, *shape] -> [out, *shape]`, of images as in `spatial_lstm`."""
    weight, bias = layer["weight"].astype(x.dtype), layer["bias"].astype(x.dtype)
    return _weighted_neighbours(weight, x) + bias.reshape(-1, *[1] * (x.ndim - 1))


@jax.custom_vjp
def _weighted_neighbours(weight, x):
    """`weight [out, 9 in]` times the neighbourhoods of `x [in, *shape]`: `[out, *shape]`.

    This makes a convolution a matrix product, whose gradients are fast inside `lax.scan` on every backend.
    """
    return (weight @ flat(_neighbours(x))).reshape(weight.shape[0], *x.shape[1:])


def _weighted_neighbours_backward(saved, cotangent):
    # Only x is stored, not its neighbourhoods, which are 9 times as large. Both gradients use those of the cotangent.
    weight, x = saved
    around = flat(_neighbours(cotangent))
    by_offset = weight.reshape(weight.shape[0], 9, -1)[:, ::-1]  # for the input, offsets are mirrored
    d_x = by_offset.transpose(2, 1, 0).reshape(x.shape[0], -1) @ around
    d_weight = (around @ flat(x).T).reshape(9, weight.shape[0], -1)[::-1]
    return d_weight.swapaxes(0, 1).reshape(weight.shape), d_x.reshape(x.shape)


_weighted_neighbours.defvjp(
    lambda weight, x: (_weighted_neighbours(weight, x), (weight, x)), _weighted_neighbours_backward
)


def flat(x):
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _neighbours(x):
    """The 3x3 neighbourhood of each pixel, zero padded, `[channels, *shape] -> [9 channels, *shape]`."""
    shape = x.shape[1:]
    height, width = shape[:2] if len(shape) in (2, 3) else (1, math.prod(shape))
    depth = shape[2] if len(shape) == 3 else 1
    image = x.reshape(x.shape[0], height, width, depth)
    padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted).reshape(9 * x.shape[0], *shape)
