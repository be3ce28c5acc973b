"""Meta-gradients without derivatives, for meta-training on models that can only be called."""

import dataclasses
from collections.abc import Callable
from typing import Any

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
        leaves, structure = jax.tree.flatten(params)

        def pair(key):
            keys = jax.random.split(key, len(leaves))
            noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]

            def tried(sigma):
                return loss(structure.unflatten([x + sigma * e for x, e in zip(leaves, noise, strict=True)]))

            up, down = tried(self.sigma), tried(-self.sigma)
            slope = (up[0] - down[0]) / (2 * self.sigma)
            outputs = jax.tree.map(lambda a, b: (a + b) / 2, up, down)
            return outputs, structure.unflatten([slope.astype(e.dtype) * e for e in noise])

        every = jax.lax.map(pair, jax.random.split(key, self.pairs))
        return jax.tree.map(lambda x: jnp.mean(x, 0), every)
