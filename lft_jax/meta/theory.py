"""The gap between the meta-gradients of LFT and L2O, measured.

LFT and L2O differ only in the examples of their outer loss: the query set, or the support set. With J_k the derivative
of theta_k with respect to the meta-parameters, their meta-gradients on one task differ by::

    sum_k w_k J_k^T (grad f(theta_k; query set) - grad f(theta_k; support set))

Both gradients estimate the same expectation: the query set is independent of theta_k, while theta_k was fine-tuned on
the support set. So the gap is bounded by the variances of the two gradients, and should vanish as both sets grow: on
one task with the square root of their size. In the mean over many tasks, what remains is the bias of the support
gradient, which falls with the size itself. See docs/method.md, "LFT against L2O".
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, Real

from lft_jax import base
from lft_jax._bounded import BoundedJit
from lft_jax._deprecation import renamed
from lft_jax.base import Learner, PyTree, TaskFamily
from lft_jax.meta import outer_loss
from lft_jax.meta.outer_loss import run_task


class MetaGradientGap(NamedTuple):
    """Result of `meta_gradient_gap` on T tasks. Norms are l2 norms.

    Attributes:
      gaps: `[T]` norm of the difference of the two meta-gradients on each task.
      norms: `[T]` norm of the LFT's meta-gradient on each task.
      mean_gap: `[]` norm of the mean difference.
      mean_norm: `[]` norm of the LFT's mean meta-gradient.
      support_variance: `[T]` variance of the gradient of the support loss at the last optimizee, summed over
        coordinates: the sample variance over examples, divided by their number. NaN for a single example.
      query_variance: `[T]` the same for the query loss.
    """

    gaps: jax.Array
    norms: jax.Array
    mean_gap: jax.Array
    mean_norm: jax.Array
    support_variance: jax.Array
    query_variance: jax.Array


@renamed(weights="step_weights")
def meta_gradient_gap(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    keys: Key[Array, " T"],
    *,
    num_steps: int,
    step_weights: str = "uniform",
    batch_size: int = 10,
) -> MetaGradientGap:
    """Compares the meta-gradients of LFT and L2O at the same meta-parameters, on the same tasks.

    Args:
      learner: what fine-tunes. Its own objective is ignored.
      params: the meta-parameters.
      family: task family, whose loss must be a mean over examples.
      keys: `[T]` PRNG keys, one per task.
      num_steps: fine-tuning steps K, at least 1.
      step_weights: weights of the steps in the outer loss, see `lft_jax.Unroll`.
      batch_size: tasks that are vmapped together.

    Returns:
      Norms and variances, per task and of means over tasks.

    Raises:
      ValueError: for `num_steps` below 1, or unknown step weights.
    """
    outer_loss.step_weights(step_weights, num_steps)  # raises before anything is compiled
    return _gap(learner, params, family, keys, num_steps, step_weights, min(batch_size, len(keys)))


@functools.partial(BoundedJit, static=(0, 4, 5, 6))
def _gap(learner, params, family, keys, num_steps, step_weights, batch_size):
    def task(key):
        def optimizees(params):
            episode, trajectory = run_task(learner, params, family, key, num_steps=num_steps)
            return trajectory.thetas, episode

        thetas, pull_back, episode = jax.vjp(optimizees, params, has_aux=True)
        w = outer_loss.step_weights(step_weights, num_steps)

        def meta_gradient(data):
            # One optimizee at a time, so that the activations of one are in memory.
            grads = jax.lax.map(lambda theta: jax.grad(family.loss)(theta, data), thetas)
            (meta_grad,) = pull_back(jax.tree.map(lambda g: _along_first(w, g) * g, grads))
            return meta_grad

        support, query = map(meta_gradient, episode)
        last = jax.tree.map(lambda x: x[-1], thetas)
        variances = [_gradient_variance(family, last, data) for data in episode]
        return jax.tree.map(jnp.subtract, query, support), query, variances

    gaps, queries, (support_variance, query_variance) = jax.lax.map(task, keys, batch_size=batch_size)

    def mean_norm(trees):
        return optax.tree.norm(jax.tree.map(lambda x: jnp.mean(x, 0), trees))

    norms = jax.vmap(optax.tree.norm)
    return MetaGradientGap(
        norms(gaps), norms(queries), mean_norm(gaps), mean_norm(queries), support_variance, query_variance
    )


def _along_first(weights, x):
    return jnp.asarray(weights, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _gradient_variance(family, theta, data):
    """`[]`, the variance of the mean gradient, from the sample variance of the gradients of single examples."""
    count = len(jax.tree.leaves(data)[0])
    if count < 2:
        return jnp.full((), jnp.nan)

    def gradient(example):
        return jax.grad(family.loss)(theta, jax.tree.map(lambda x: x[None], example))

    gradients = jax.lax.map(gradient, data, batch_size=min(count, 10))
    return sum(jnp.sum(jnp.var(g, axis=0, ddof=1)) for g in jax.tree.leaves(gradients)) / count


class Decay(NamedTuple):
    """A power law `value ~ count^-exponent`.

    Attributes:
      exponent: the fitted exponent.
      low, high: its 95% interval.
    """

    exponent: float
    low: float
    high: float


def fit_decay(
    counts: Sequence[float] | Real[np.ndarray, " N"],
    values: Real[np.ndarray, "N T"],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Decay:
    """Fits a power law to the means of `values` over tasks, by least squares on logarithms.

    Args:
      counts: `[N]` numbers of examples, of which at least two differ.
      values: `[N, T]` values above 0, one row per count and one column per task.
      resamples: number of bootstrap samples of the tasks (columns), whose percentiles are the interval.
      seed: seed of the bootstrap.

    Raises:
      ValueError: for other shapes, or values or counts that are not above 0.

    Examples:
      >>> round(fit_decay([1, 4, 16], np.asarray([[4.0], [2.0], [1.0]]), resamples=10).exponent, 6)
      0.5
    """
    counts, values = np.asarray(counts, np.float64), np.asarray(values, np.float64)
    if counts.ndim != 1 or values.ndim != 2 or len(values) != len(counts) or len(set(counts.tolist())) < 2:
        raise ValueError(f"values must be [N, T] for N >= 2 different counts, got {values.shape} and {counts}.")
    if not (np.all(values > 0) and np.all(counts > 0)):
        raise ValueError("values and counts must be above 0.")
    base.check_at_least("resamples", resamples, 1)

    def exponent(means):
        return -np.polyfit(np.log(counts), np.log(means), 1)[0]

    generator, size = np.random.default_rng(seed), values.shape[1]
    draws = [exponent(values[:, generator.integers(0, size, size)].mean(1)) for _ in range(resamples)]
    low, high = np.percentile(draws, (2.5, 97.5))
    return Decay(float(exponent(values.mean(1))), float(low), float(high))
