"""The one inner loop: every optimizer, learned or hand-designed, fine-tunes here."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lft_jax import base
from lft_jax.base import Estimate, Oracle, Trajectory

PyTree = Any


class Paused(NamedTuple):
    """Where a run that is made in parts stopped.

    Attributes:
      theta: the optimizee.
      state: of the optimizer.
      done: `[]` int32, steps done, below K; at 0 the run begins, and `theta` and `state` are ignored.
    """

    theta: PyTree
    state: PyTree
    done: jax.Array


class Part(NamedTuple):
    """A part of a run: together, the parts of a run give what it gives in one go.

    Attributes:
      length: steps of the part, from 1, which must not lead beyond K; static.
      paused: where the part before, of equal arguments, stopped; None to begin.
    """

    length: int
    paused: Paused | None = None


def fine_tune_step(
    optimizer: optax.GradientTransformation,
    oracle: Oracle,
    theta: PyTree,
    state: PyTree,
    key: jax.Array,
    *,
    progress: float | jax.Array,
    project: Callable[[PyTree], PyTree] = lambda theta: theta,
    second_order: bool = False,
) -> tuple[PyTree, PyTree, Estimate]:
    """One step: ask the oracle, update, project. Arguments as for `fine_tune`; `progress` is k/K.

    Returns:
      The new `theta`, the optimizer's new state, and the oracle's estimate at the old `theta`.
    """
    sampling = getattr(state, "sampling", {})
    if second_order:
        estimate = oracle(theta, key, **sampling)
    else:
        answer = oracle(jax.lax.stop_gradient(theta), key, **sampling)
        estimate = jax.tree.map(jax.lax.stop_gradient, answer)
        if sampling:  # how the directions were spread is the optimizer's doing: that much is no constant
            estimate = estimate._replace(grads=answer.grads)
    optimizer = optax.with_extra_args_support(optimizer)
    extras = {"value": estimate.value, "progress": progress, **estimate.extras}
    updates, state = optimizer.update(estimate.grads, state, theta, **extras)
    return project(optax.apply_updates(theta, updates)), state, estimate


def fine_tune(
    optimizer: optax.GradientTransformation,
    oracle: Oracle,
    theta: PyTree,
    key: jax.Array,
    *,
    num_steps: int,
    project: Callable[[PyTree], PyTree] = lambda theta: theta,
    second_order: bool = False,
    remat: bool = False,
    window: int | None = None,
    part: Part | None = None,
    watch: Callable[[PyTree], PyTree] = lambda state: (),
) -> Trajectory:
    """Fine-tunes `theta` for `num_steps` (K) steps in one `jax.lax.scan` (PAPER "The method").

    Args:
      optimizer: any optax transformation; as extra arguments it is given the oracle's `value` and extras, and
        `progress` (k/K). If its state has a field `sampling`, a dict, the oracle is given its entries as keyword
        arguments (`lft_jax.oracles.covariance`; of lft_jax's own oracles `zeroth_order` takes them).
      oracle: `(theta, key) -> Estimate`.
      theta: initial optimizee, any pytree of floating-point arrays.
      key: split over the steps, for oracles that sample.
      num_steps: K, at least 1.
      project: applied after each step.
      second_order: let derivatives flow through the oracle's answers. By default they are constants (as in
        Andrychowicz et al. 2016), so that only the recurrence is differentiated through time and no derivative
        of the model is taken inside the scan; what an estimate owes to the state's `sampling` is no constant.
      remat: store the state only after every sqrt(K)-th step and compute the steps between again in the backward pass:
        memory grows with sqrt(K) instead of K, for one more forward pass.
      window: T, of truncated backpropagation: after every T-th step `theta` and the optimizer's state go on as
        constants, so that no derivative spans more than T steps. None for K.
      part: the part of the run to make; None for all K steps.
      watch: `optimizer state -> tree of arrays`, called after each step.

    Returns:
      The trajectory, of this part alone.

    Raises:
      ValueError: if `num_steps`, `window` or the length of the part is below 1, or that length is above `num_steps`.
    """
    base.check_at_least("num_steps", num_steps, 1)
    if window is not None:
        base.check_at_least("window", window, 1)
    if part is not None and not 1 <= part.length <= num_steps:
        raise ValueError(f"part: its length must be from 1 to num_steps = {num_steps}, got {part.length!r}.")

    def step(carry, xs):
        theta, state = carry
        k, step_key = xs
        theta, state, estimate = fine_tune_step(
            optimizer,
            oracle,
            theta,
            state,
            step_key,
            progress=k / num_steps,
            project=project,
            second_order=second_order,
        )
        return (theta, state), (theta, estimate.value, estimate.queries, watch(state))

    xs = (jnp.arange(num_steps, dtype=jnp.float32), jax.random.split(key, num_steps))
    state = optimizer.init(theta)
    if part is not None and part.paused is not None:
        *stopped, done = part.paused
        theta, state = jax.tree.map(lambda s, begun: jnp.where(done > 0, s, begun), tuple(stopped), (theta, state))
        xs = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, done, part.length), xs)
    elif part is not None:
        xs = jax.tree.map(lambda x: x[: part.length], xs)
    scan = _nested_scan if remat else jax.lax.scan
    if window is not None and window < len(xs[0]):
        scan = functools.partial(_truncated_scan, scan, window)
    (_, state), (thetas, values, queries, watched) = scan(step, (theta, state), xs)
    return Trajectory(thetas, values, jnp.cumsum(queries), state, watched)


def block_length(num_steps: int) -> int:
    """Steps between two stored states with `remat`: the square root of K, rounded up."""
    return math.isqrt(num_steps - 1) + 1


def _nested_scan(step, carry, xs):
    """`jax.lax.scan` in blocks, whose insides are not stored."""
    return _in_blocks(jax.checkpoint(functools.partial(jax.lax.scan, step)), block_length(len(xs[0])), carry, xs)


def _truncated_scan(scan, window, step, carry, xs):
    """`scan` in blocks, which no derivative leaves."""

    def steps(carry, xs):
        carry, outputs = scan(step, carry, xs)
        return jax.lax.stop_gradient(carry), outputs

    return _in_blocks(steps, window, carry, xs)


def _in_blocks(steps, block, carry, xs):
    """Scans `steps`, which takes `block` inputs at a time, the last time what is left."""
    length = len(xs[0])
    whole = length // block * block
    blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, block, *x.shape[1:]), xs)
    carry, outputs = jax.lax.scan(steps, carry, blocks)
    outputs = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), outputs)
    if whole == length:
        return carry, outputs
    carry, rest = steps(carry, jax.tree.map(lambda x: x[whole:], xs))
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, rest)
