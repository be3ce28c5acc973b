"""How far learning to optimize is from learning to fine-tune: the gap between their meta-gradients, measured.

LFT and L2O differ in the examples of their outer loss alone (PAPER "The method"). With J_k the derivative of the k-th
optimizee with respect to the meta-parameters, their meta-gradients on one task differ by::

    sum_k w_k J_k^T (grad f(theta_k; query) - grad f(theta_k; support))

Both gradients are estimates of one: by independent examples in the query set, and by those that theta_k was made from
in the support set. So the gap is bounded by what the two vary (PAPER "Theory"), and vanishes as both sets grow: on one
task with the root of their size. In the mean over many tasks what is left is the bias of the support gradient, which
falls with the size itself.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax import base
from lft_jax.base import Learner, PyTree, TaskFamily
from lft_jax.meta import outer_loss
from lft_jax.meta.outer_loss import run_task


class MetaGradientGap(NamedTuple):
    """What `meta_gradient_gap` found on `T` tasks.

    Attributes:
      gaps: `[T]`, the norm of the difference of the two meta-gradients on each task.
      norms: `[T]`, the norm of the LFT's meta-gradient on each.
      mean_gap: `[]`, the norm of the mean difference.
      mean_norm: `[]`, the norm of the LFT's mean meta-gradient.
      support_variance: `[T]`, of the gradient of the support loss at the last optimizee, summed over its coordinates:
        the sample variance over the examples divided by their number. NaN if there is one example only.
      query_variance: `[T]`, the same of the query loss.
    """

    gaps: jax.Array
    norms: jax.Array
    mean_gap: jax.Array
    mean_norm: jax.Array
    support_variance: jax.Array
    query_variance: jax.Array


def meta_gradient_gap(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    keys: jax.Array,
    *,
    num_steps: int,
    step_weights: str = "uniform",
    batch_size: int = 10,
) -> MetaGradientGap:
    """Compares the meta-gradients of LFT and L2O at the same meta-parameters, on the same tasks.

    Args:
      learner: what fine-tunes; its own objective does not matter.
      params: the meta-parameters.
      family: the tasks. Their loss must be a mean over examples.
      keys: `[T]`, one a task.
      num_steps: K.
      step_weights: of the steps in the outer loss, see `lft_jax.Unroll`.
      batch_size: tasks side by side.

    Raises:
      ValueError: for `num_steps` below 1, or unknown step weights.
    """
    outer_loss.step_weights(step_weights, num_steps)  # so that a bad one is refused before anything is compiled
    return _gap(learner, params, family, keys, num_steps, step_weights, min(batch_size, len(keys)))


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _gap(learner, params, family, keys, num_steps, step_weights, batch_size):
    def task(key):
        def optimizees(params):
            episode, trajectory = run_task(learner, params, family, key, num_steps=num_steps)
            return trajectory.thetas, episode

        thetas, pull_back, episode = jax.vjp(optimizees, params, has_aux=True)
        w = outer_loss.step_weights(step_weights, num_steps)

        def meta_gradient(data):
            # The optimizees one by one, so that only one has its examples' activations in memory.
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
    """`[]`, the variance of the mean gradient, from the spread of the examples' own."""
    count = len(jax.tree.leaves(data)[0])
    if count < 2:
        return jnp.full((), jnp.nan)

    def gradient(example):
        return jax.grad(family.loss)(theta, jax.tree.map(lambda x: x[None], example))

    gradients = jax.lax.map(gradient, data, batch_size=min(count, 10))
    return sum(jnp.sum(jnp.var(g, axis=0, ddof=1)) for g in jax.tree.leaves(gradients)) / count


class Decay(NamedTuple):
    """A power law `value ~ count^-exponent`: the exponent, and the ends of its 95% interval."""

    exponent: float
    low: float
    high: float


def fit_decay(counts: np.ndarray, values: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> Decay:
    """Fits a power law to the means of values over tasks, by least squares of logarithms.

    Args:
      counts: `[N]`, numbers of examples, at least two different ones.
      values: `[N, T]`, above 0, of T tasks at each count; a column is one task, resampled as a whole.
      resamples: bootstrap samples of the tasks, whose percentiles are the interval.
      seed: of the bootstrap.

    Raises:
      ValueError: for other shapes, or values that are not above 0.
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
