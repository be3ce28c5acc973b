"""The fine-tuning loop, the same for all optimizers, learned or hand-designed."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from lft_jax import base
from lft_jax._deprecation import old_keywords
from lft_jax.base import Estimate, Oracle, PyTree, Trajectory


class Paused(NamedTuple):
    """Where a run that is computed in parts has stopped.

    Attributes:
      theta: the optimizee.
      state: the optimizer's state.
      done: `[]` int32, number of steps done, below `num_steps`. At 0 the run begins, and `theta` and `state` are
        ignored.
    """

    theta: PyTree
    state: PyTree
    done: jax.Array | int


class Part(NamedTuple):
    """A part of a fine-tuning run, for `fine_tune(part=)`. All parts together equal the whole run.

    Attributes:
      length: number of steps of this part, static; at least 1, and at most the number of steps that are left.
      paused: where the previous part, which had the same arguments, stopped. None for the first part.

    Examples:
      >>> from lft_jax import oracles
      >>> oracle = oracles.gradient(lambda theta: theta**2)
      >>> options = dict(num_steps=4, part=Part(3))
      >>> first = fine_tune(optax.sgd(0.25), oracle, jnp.ones(()), jax.random.key(0), **options)
      >>> first.thetas.tolist()
      [0.5, 0.25, 0.125]
      >>> rest = Part(1, Paused(first.thetas[-1], first.state, done=3))
    """

    length: int
    paused: Paused | None = None


def fine_tune_step(
    optimizer: optax.GradientTransformation,
    oracle: Oracle,
    theta: PyTree,
    state: PyTree,
    key: PRNGKeyArray,
    *,
    progress: float | Float[Array, ""],
    project: Callable[[PyTree], PyTree] = lambda theta: theta,
    second_order: bool = False,
) -> tuple[PyTree, PyTree, Estimate]:
    """One fine-tuning step: evaluates the oracle, updates and projects.

    Args:
      optimizer: any optax transformation, see `fine_tune`.
      oracle: `(theta, key) -> Estimate`.
      theta: the optimizee, any pytree of floating-point arrays.
      state: the optimizer's state.
      key: PRNG key, for oracles that sample.
      progress: fraction of the run that is done, k / K in step k = 0 ... K - 1.
      project: applied to the updated optimizee.
      second_order: whether derivatives flow through the oracle's estimate.

    Returns:
      The next `theta`, the next state of the optimizer, and the oracle's estimate at the given `theta`.

    Examples:
      >>> from lft_jax import oracles
      >>> optimizer, theta = optax.sgd(0.25), jnp.array([2.0])
      >>> oracle = oracles.gradient(lambda theta: jnp.sum(theta**2))
      >>> state, key = optimizer.init(theta), jax.random.key(0)
      >>> theta, state, estimate = fine_tune_step(optimizer, oracle, theta, state, key, progress=0.0)
      >>> theta.tolist(), float(estimate.value)
      ([1.0], 4.0)
    """
    sampling = getattr(state, "sampling", {})
    if second_order:
        estimate = oracle(theta, key, **sampling)
    else:
        traced = oracle(jax.lax.stop_gradient(theta), key, **sampling)
        estimate = jax.tree.map(jax.lax.stop_gradient, traced)
        if sampling:  # the optimizer chose the covariance of the directions, so derivatives flow through that part
            estimate = estimate._replace(grads=traced.grads)
    optimizer = optax.with_extra_args_support(optimizer)
    extras = {"value": estimate.value, "progress": progress, **estimate.extras}
    updates, state = optimizer.update(estimate.grads, state, theta, **extras)
    return project(optax.apply_updates(theta, updates)), state, estimate


def _present_keywords(old, kwargs):
    length, paused = old.get("length"), old.get("paused")
    if length is None and paused is not None:
        raise ValueError("length must be given with paused; write part=Part(length, paused).")
    return kwargs if length is None else {**kwargs, "part": Part(length, paused)}


@old_keywords(_present_keywords, paused="part=Part(length, paused)", length="part=Part(length)")
def fine_tune(
    optimizer: optax.GradientTransformation,
    oracle: Oracle,
    theta: PyTree,
    key: PRNGKeyArray,
    *,
    num_steps: int,
    project: Callable[[PyTree], PyTree] = lambda theta: theta,
    second_order: bool = False,
    remat: bool = False,
    window: int | None = None,
    part: Part | None = None,
    watch: Callable[[PyTree], PyTree] = lambda state: (),
) -> Trajectory:
    """Fine-tunes `theta` for `num_steps` (K) steps in one `jax.lax.scan`.

    In step k = 1 ... K, with `g_k` from the oracle at `theta_(k-1)`:

        theta_k = project(theta_(k-1) + optimizer update for g_k)

    Args:
      optimizer: any optax transformation. Its extra arguments are the oracle's `value` and extras, and `progress`, the
        fraction of the run that is done. If its state has a field `sampling`, a dict, the entries are passed to the
        oracle as keyword arguments (`guided`, `learned_sampler`); zeroth-order oracles take them.
      oracle: `(theta, key) -> Estimate`.
      theta: initial optimizee, any pytree of floating-point arrays.
      key: PRNG key, split over the steps, for oracles that sample.
      num_steps: K, at least 1.
      project: applied to the optimizee after each step.
      second_order: whether derivatives flow through the oracle's estimates. By default these are constants: only the
        recurrence is differentiated, and no second derivative of the model is taken. Derivatives with respect to
        `sampling` are always kept.
      remat: stores the state only after every sqrt(K)-th step, and recomputes the steps between in the backward pass.
        Memory then grows with sqrt(K) instead of K, for one more forward pass.
      window: T of truncated backpropagation: `theta` and the optimizer's state become constants after every T-th step,
        so that derivatives span at most T steps. None for no truncation.
      part: the part of the run to compute; None for all steps.
      watch: `optimizer state -> pytree of arrays`, recorded after each step.

    Returns:
      The trajectory of the steps that were computed.

    Raises:
      ValueError: if `num_steps`, `window` or `part.length` is below 1, or if `part.length` is above `num_steps`.

    Examples:
      >>> from lft_jax import oracles
      >>> oracle = oracles.gradient(lambda theta: jnp.sum(theta**2))
      >>> trajectory = fine_tune(optax.sgd(0.25), oracle, jnp.ones(2), jax.random.key(0), num_steps=3)
      >>> trajectory.thetas.tolist()
      [[0.5, 0.5], [0.25, 0.25], [0.125, 0.125]]
      >>> trajectory.values.tolist(), trajectory.queries.tolist()
      ([2.0, 0.5, 0.125], [1, 2, 3])

    References:
      Andrychowicz et al. 2016, Learning to learn by gradient descent by gradient descent, arXiv 1606.04474, section 2
      (constant inner gradients).
    """
    base.check_at_least("num_steps", num_steps, 1)
    if window is not None:
        base.check_at_least("window", window, 1)
    if part is not None and not 1 <= part.length <= num_steps:
        raise ValueError(f"part.length must be between 1 and num_steps = {num_steps}, got {part.length!r}.")

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
    """Number of steps between two stored states with `remat`: the square root of K, rounded up."""
    return math.isqrt(num_steps - 1) + 1


def _nested_scan(step, carry, xs):
    """`jax.lax.scan` in blocks; states within a block are recomputed, not stored."""
    return _in_blocks(jax.checkpoint(functools.partial(jax.lax.scan, step)), block_length(len(xs[0])), carry, xs)


def _truncated_scan(scan, window, step, carry, xs):
    """`scan` in blocks; derivatives stop at the end of a block."""

    def steps(carry, xs):
        carry, outputs = scan(step, carry, xs)
        return jax.lax.stop_gradient(carry), outputs

    return _in_blocks(steps, window, carry, xs)


def _in_blocks(steps, block, carry, xs):
    """Scans `steps`, which takes `block` inputs at a time; the last block may be shorter."""
    length = len(xs[0])
    whole = length // block * block
    blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, block, *x.shape[1:]), xs)
    carry, outputs = jax.lax.scan(steps, carry, blocks)
    outputs = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), outputs)
    if whole == length:
        return carry, outputs
    carry, rest = steps(carry, jax.tree.map(lambda x: x[whole:], xs))
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, rest)
