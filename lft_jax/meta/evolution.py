"""Meta-gradients by evolution strategies, which need values of the outer loss but no derivatives."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lft_jax import base
from lft_jax.base import PyTree


@dataclasses.dataclass(frozen=True)
class EvolutionStrategies:
    """Antithetic evolution strategies (ES): a meta-gradient from differences of the outer loss L.

    The loss is evaluated at mirrored pairs of points, along Gaussian random directions::

        grads = mean_i (L(params + s e_i) - L(params - s e_i)) / (2 s) e_i,     e_i ~ N(0, I)

    This estimates the gradient of the loss smoothed by that noise, without bias. For a linear loss with gradient g in
    d coordinates, the variance of the estimate, summed over coordinates, is `(d + 1) |g|^2 / pairs`.

    Attributes:
      pairs: number of random directions, at least 1. Each costs two evaluations of the outer loss.
      sigma: step `s` along a direction, above 0, in units of the meta-parameters.

    Raises:
      ValueError: for a field out of range.

    References:
      Salimans et al. 2017, Evolution strategies as a scalable alternative to reinforcement learning, arXiv 1703.03864.
      Metz et al. 2019, Understanding and correcting pathologies in the training of learned optimizers, arXiv
      1810.10180.

    Examples:
      >>> slope = jnp.asarray([3.0, -2.0])  # of a linear loss
      >>> strategies = EvolutionStrategies(pairs=2000, sigma=0.1)
      >>> gradient = jax.jit(lambda params, key: strategies(lambda x: (slope @ x, ()), params, key))
      >>> (value, aux), grads = gradient(jnp.zeros(2), jax.random.key(0))
      >>> [round(float(g)) for g in grads]
      [3, -2]
    """

    pairs: int = 16
    sigma: float = 0.01

    def __post_init__(self):
        base.check_at_least("pairs", self.pairs, 1)
        base.check_positive("sigma", self.sigma)

    def __call__(
        self, loss: Callable[[PyTree], tuple[Float[Array, ""], Any]], params: PyTree, key: PRNGKeyArray
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree]:
        """Estimates the gradient of `loss` at `params`.

        Args:
          loss: `params -> (value [], aux)`, where aux is a tree of floating-point arrays. It is not differentiated.
          params: tree of floating-point arrays.
          key: PRNG key of the random directions.

        Returns:
          `((value, aux), grads)`, as `jax.value_and_grad(loss, has_aux=True)(params)` returns. `value` and `aux` are
          means over all evaluations.
        """

        def pair(key):
            noise = _noise(key, params)
            up, down = loss(_moved(params, noise, self.sigma)), loss(_moved(params, noise, -self.sigma))
            return _mean(up, down), _along(noise, up, down, self.sigma)

        every = jax.lax.map(pair, jax.random.split(key, self.pairs))
        return jax.tree.map(lambda x: jnp.mean(x, 0), every)


class Particles(NamedTuple):
    """What persistent evolution strategies carry from one window to the next.

    Attributes:
      carried: inner states of the two particles of each pair, with leading axes `[pairs, 2]`.
      change: like the meta-parameters with a leading axis `[pairs]`: the sum of the pair's random directions in the
        episode so far. Its sign is that of the first particle; the second one has the opposite.
    """

    carried: PyTree
    change: PyTree


@dataclasses.dataclass(frozen=True)
class PersistentEvolutionStrategies:
    """Persistent evolution strategies (PES): a meta-update after each window of an episode, without truncation bias.

    An episode of K steps is cut into K / T windows. Each pair has two particles, which fine-tune from window to window
    with the meta-parameters `params + s e_i` and `params - s e_i`. The random directions `e_i` are drawn again in every
    window. With `E_i` the sum of a pair's directions in the episode so far, this window's included::

        grads = mean_i (L(first particle) - L(second particle)) / (2 s) E_i,     e_i ~ N(0, I)

    where L is the loss of the window. If `params` are constant, the sum over the windows of an episode is an unbiased
    estimate of the gradient of the episode's loss, smoothed by that noise. Its variance grows with the number of
    windows.

    Attributes:
      window: fine-tuning steps T between two meta-updates, at least 1. It must divide K.
      pairs: pairs of particles, at least 1. Each costs two windows, and stores two optimizees and two optimizer states
        per task.
      sigma: step `s` along a direction, above 0, in units of the meta-parameters.
      accumulate: False uses the direction `e_i` of the window instead of `E_i`. That is truncated ES, which is biased:
        it ignores how meta-parameters act on later windows. (Here, too, each particle continues its own episode; often
        truncated ES is run from a shared one.)

    Raises:
      ValueError: for a field out of range.

    References:
      Vicol, Metz and Sohl-Dickstein 2021, Unbiased gradient estimation in unrolled computation graphs with persistent
      evolution strategies, arXiv 2112.13835.

    Examples:
      Ten windows in an episode of 20 steps; pass it to `meta_trainer` as `meta_gradient=`.

      >>> strategies = PersistentEvolutionStrategies(window=2, pairs=8)
      >>> strategies.init(params=jnp.zeros(3), carried=jnp.zeros(5)).carried.shape
      (8, 2, 5)
    """

    window: int
    pairs: int = 16
    sigma: float = 0.01
    accumulate: bool = True

    def __post_init__(self):
        base.check_at_least("window", self.window, 1)
        base.check_at_least("pairs", self.pairs, 1)
        base.check_positive("sigma", self.sigma)

    def init(self, params: PyTree, carried: PyTree) -> Particles:
        """Returns the particles before the first window, all zeros.

        Args:
          params: the meta-parameters, or their shapes and dtypes.
          carried: inner state of one particle, or its shapes and dtypes.
        """
        return Particles(_zeros(carried, self.pairs, 2), _zeros(params, self.pairs))

    def __call__(
        self,
        loss: Callable[[PyTree, PyTree], tuple[tuple[Float[Array, ""], Any], PyTree]],
        params: PyTree,
        particles: Particles,
        key: PRNGKeyArray,
        *,
        begins: bool | Bool[Array, ""],
    ) -> tuple[tuple[tuple[Float[Array, ""], Any], PyTree], Particles]:
        """Estimates the gradient of one window.

        Args:
          loss: `(params, carried) -> ((value [], aux), carried)`: the loss of the window, and the inner state after it.
          params: tree of floating-point arrays.
          particles: result of the window before, or of `init`.
          key: PRNG key of the window's random directions.
          begins: `[]` whether this is the first window of an episode, where the sum of directions starts at 0.

        Returns:
          `((value, aux), grads)`, as for `EvolutionStrategies`, and the particles after the window.
        """

        def pair(inputs):
            key, carried, change = inputs
            noise = _noise(key, params)
            change = jax.tree.map(lambda sum_, e: jnp.where(begins, 0, sum_) + e, change, noise)
            ends = [
                loss(_moved(params, noise, sigma), jax.tree.map(lambda x, i=i: x[i], carried))
                for i, sigma in enumerate((self.sigma, -self.sigma))
            ]
            (up, carried_up), (down, carried_down) = ends
            grads = _along(change if self.accumulate else noise, up, down, self.sigma)
            carried = jax.tree.map(lambda a, b: jnp.stack([a, b]), carried_up, carried_down)
            return (_mean(up, down), grads), Particles(carried, change)

        every, after = jax.lax.map(pair, (jax.random.split(key, self.pairs), *particles))
        return jax.tree.map(lambda x: jnp.mean(x, 0), every), after


def _noise(key, params):
    """Standard normal numbers, shaped like `params`."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def _moved(params, noise, sigma):
    return jax.tree.map(lambda x, e: x + sigma * e, params, noise)


def _along(direction, up, down, sigma):
    """The direction times the slope of the loss along it; `up` and `down` are `(value, aux)` at the mirrored points."""
    slope = (up[0] - down[0]) / (2 * sigma)
    return jax.tree.map(lambda e: slope.astype(e.dtype) * e, direction)


def _mean(up, down):
    return jax.tree.map(lambda a, b: (a + b) / 2, up, down)


def _zeros(tree, *leading):
    return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), tree)
