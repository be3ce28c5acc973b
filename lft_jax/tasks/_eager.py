"""`jax.lax.map` and `jax.lax.scan` one element at a time, for functions that JAX cannot trace."""

import jax
import jax.numpy as jnp


def eager_map(function, inputs):
    """`jax.lax.map`; `inputs` is a pytree of arrays, the result of `function` an array."""
    return jnp.stack([function(x) for x in _elements(inputs)])


def eager_scan(step, carry, inputs):
    """`jax.lax.scan` of a step whose second output is None."""
    for x in _elements(inputs):
        carry, _ = step(carry, x)
    return carry, None


def _elements(inputs):
    length = len(jax.tree.leaves(inputs)[0])
    return (jax.tree.map(lambda leaf: leaf[i], inputs) for i in range(length))  # noqa: B023
