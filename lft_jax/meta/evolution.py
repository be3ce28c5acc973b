"""Meta-gradients without derivatives, for meta-training on models that can only be called."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lft_jax import base
from lft_jax.base import PyTree


@dataclasses.dataclass(frozen=True)
class EvolutionStrategies:
    """Antithetic evolution strategies (ES): the outer loss is tried at pairs of mirrored Gaussian changes of `params`.

    With `e_i ~ N(0, I)` the estimate is `mean_i (L(params + s e_i) - L(params - s e_i)) / (2 s) e_i`, the gradient of
    the loss smoothed by that noise. For a linear loss of gradient g it is unbiased, and its variance, summed over d
    coordinates, is `(d + 1) |g|^2 / pairs`.

    Attributes:
      pairs: of changes, at least 1; each costs two outer losses.
      sigma: `s`, above 0, in units of the meta-parameters.

    References:
      Salimans et al. 2017, Evolution strategies as a scalable alternative to reinforcement learning.
      Metz et al. 2019, Understanding and correcting pathologies in the training of learned optimizers.
    """

    pairs: int = 16
    sigma: float = 0.01

    def __post_init__(self):
        base.check_at_least("pairs", self.pairs, 1)
        base.check_positive("sigma", self.sigma)

    def __call__(
        self, loss: Callable[[PyTree], tuple[jax.Array, Any]], params: PyTree, key: jax.Array
    ) -> tuple[tuple[jax.Array, Any], PyTree]:
        """`((value, aux), grads)` as of `jax.value_and_grad(loss, has_aux=True)`; value and aux are means of all tries.

        Args:
          loss: `params -> ([], aux)`, aux a tree of floating-point arrays. It is called, never differentiated.
          params: floating-point arrays.
          key: of the changes.
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
      carried: with leading axes `[pairs, 2]`, the inner states of each pair's two particles.
      change: like the meta-parameters with a leading axis `[pairs]`, the sum of the pair's changes in the episode so
        far, in units of sigma; of opposite sign for the second particle.
    """

    carried: PyTree
    change: PyTree


@dataclasses.dataclass(frozen=True)
class PersistentEvolutionStrategies:
    """Persistent evolution strategies (PES): a meta-update after each window of an episode, and yet no truncation bias.

    An episode of K steps is cut into K / T windows. Each of a pair of particles has an episode of its own, which it
    goes on with from window to window; in each, the pair's meta-parameters are changed anew, by `s e` and `-s e`. The
    window's gradient is `mean_i (L+ - L-) / (2 s) E_i`, where `E_i` is the sum of the episode's changes `e` so far,
    those that led to where the window began included. With `params` held fixed, the sum over an episode's windows is an
    unbiased estimate of the gradient of the episode's loss, smoothed by that noise. Its variance grows with the number
    of windows.

    Attributes:
      window: `T`, fine-tuning steps between two meta-updates, at least 1; it divides K.
      pairs: of particles, at least 1; each costs two windows and keeps two optimizees and two optimizer's states for
        every task.
      sigma: `s`, above 0, in units of the meta-parameters.
      accumulate: if False, the window's own change stands for `E_i`: truncated ES, which is biased, since it does not
        see how meta-parameters act on later windows. (Each particle goes on with its own episode here too, where
        truncated ES is often run from one that is shared.)

    References:
      Vicol, Metz and Sohl-Dickstein 2021, Unbiased gradient estimation in unrolled computation graphs with persistent
      evolution strategies.
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
        """Particles before the first window.

        Args:
          params: the meta-parameters, or their shapes and dtypes.
          carried: one particle's inner state, or its shapes and dtypes.
        """
        return Particles(_zeros(carried, self.pairs, 2), _zeros(params, self.pairs))

    def __call__(
        self,
        loss: Callable[[PyTree, PyTree], tuple[tuple[jax.Array, Any], PyTree]],
        params: PyTree,
        particles: Particles,
        key: jax.Array,
        *,
        begins: bool | jax.Array,
    ) -> tuple[tuple[tuple[jax.Array, Any], PyTree], Particles]:
        """`((value, aux), grads)` of one window, as of `EvolutionStrategies`, and the particles after it.

        Args:
          loss: `(params, carried) -> (([], aux), carried)`, the window's loss and the inner state that it ends in.
          params: floating-point arrays.
          particles: from the window before, or of `init`.
          key: of the window's changes.
          begins: `[]` whether the window is an episode's first, so that no earlier change counts.
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
    """Standard normal numbers like `params`."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def _moved(params, noise, sigma):
    return jax.tree.map(lambda x, e: x + sigma * e, params, noise)


def _along(direction, up, down, sigma):
    """The direction times the slope between the values of two mirrored tries."""
    slope = (up[0] - down[0]) / (2 * sigma)
    return jax.tree.map(lambda e: slope.astype(e.dtype) * e, direction)


def _mean(up, down):
    return jax.tree.map(lambda a, b: (a + b) / 2, up, down)


def _zeros(tree, *leading):
    return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), tree)
