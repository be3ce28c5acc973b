"""Building blocks of finite differences along random directions: points to evaluate, sums, and loops over chunks.

Letters in shape comments are those of `lft_jax.oracles`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax.oracles import _covariance
from lft_jax.oracles.directions import DRAW, UNIT_LENGTH


@functools.partial(jax.jit, static_argnames=("subspace", "directions", "antithetic"))
def probe(flat, seeds, smoothing, root, subspace, *, directions, antithetic):
    """Isotropic directions `[n, d]` and the points to evaluate: `[n, d]`, or `[2n, d]` with the mirrored ones last."""
    us = subspace.expand(jax.vmap(lambda seed: DRAW[directions](seed, subspace.size, flat.dtype))(seeds))
    steps = smoothing * _covariance.spread(us, jax.lax.stop_gradient(root))
    plus, minus = flat[None] + steps, flat[None] - steps
    return us, jnp.concatenate([plus, minus]) if antithetic else plus


@jax.jit
def accumulate(total, us, slopes, smoothing):
    """`total + sum_i slopes_i / smoothing * u_i`, `[d]`."""
    coefficients = slopes.astype(total.dtype) / smoothing
    # Not a matrix product: accelerators may compute those in lower precision.
    return total + jnp.sum(coefficients[:, None] * us, axis=0)


def factor(directions, subspace, num_directions):
    """The factor `c / q` of the estimate, see `lft_jax.oracles.zeroth_order`."""
    return (subspace.size if directions in UNIT_LENGTH else 1) / num_directions


def in_chunks(scan, step, total, seeds, chunk):
    """Scans `step` over seeds `[q]` in chunks of size `chunk`, then over the remainder; outputs are joined to `[q]`."""
    outputs = []
    if len(seeds) > chunk:
        whole = len(seeds) // chunk * chunk
        total, output = scan(step, total, seeds[:whole].reshape(-1, chunk, *seeds.shape[1:]))
        outputs.append(output.reshape(-1))
        seeds = seeds[whole:]
    if len(seeds):
        total, output = step(total, seeds)
        outputs.append(output)
    return total, jnp.concatenate(outputs)


def eager_scan(step, total, chunks):
    """`lax.scan` as a Python loop, for steps that cannot be traced."""
    outputs = []
    for chunk in chunks:
        total, output = step(total, chunk)
        outputs.append(output)
    return total, np.stack(outputs)


def on_numpy(batched_loss):
    """Wraps an opaque loss: it receives writable NumPy copies. The dtype of its result is kept, float64 included."""

    def called(points):
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(points)):
            raise ValueError("loss_fn is opaque: its oracle must be called eagerly, got a theta or key under tracing.")
        return np.asarray(batched_loss(jax.tree.map(np.array, points)))

    return called
