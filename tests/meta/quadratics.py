"""Quadratic tasks, whose trajectories and meta-gradients are known, for tests of meta-training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import oracles
from lft_jax.base import Episode, TaskFamily

KEY = jax.random.key(3)
RATE = 0.3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quadratic(TaskFamily):
    """Losses `sum(curvature * (theta - goal)^2) / 2`, the goals of support and query `[d]` apart.

    Attributes:
      support, query: `[d]` goals of the two sets.
      curvature: `[d]`.
      noise: standard deviation of an offset that is added to both goals, drawn for each task.
      fault: probability that a task's data are NaN.
      tag: families of different tags do not stack.
    """

    support: jax.Array
    query: jax.Array
    curvature: jax.Array
    noise: float = 0.0
    fault: float = 0.0
    tag: str = dataclasses.field(default="", metadata={"static": True})

    def sample(self, key):
        shift = self.noise * jax.random.normal(key, self.query.shape, self.query.dtype)
        shift = jnp.where(jax.random.bernoulli(key, self.fault), jnp.nan, shift)
        return Episode((self.support + shift)[None], (self.query + shift)[None])

    def init(self, key):
        return jnp.zeros_like(self.query)

    def oracle(self, support):
        return oracles.gradient(lambda theta: self.loss(theta, support))

    def loss(self, theta, data):
        return jnp.sum(self.curvature * (theta - data[0]) ** 2) / 2

    def project(self, theta):
        return theta

    def metrics(self, theta, data):
        return {"loss": self.loss(theta, data)}


def quadratic(seed, size=3, **options):
    support, query, curvature = np.random.default_rng(seed).uniform(0.5, 2, (3, size))
    return Quadratic(*(jnp.asarray(x, jnp.result_type(float)) for x in (support, query, curvature)), **options)


def meta_gradient(trainer, state):
    """The meta-gradient, from a trainer whose meta-optimizer is `optax.sgd(1.0)`, and the metrics."""
    after, metrics = trainer.step(state)
    return jax.tree.map(lambda a, b: np.asarray(a - b), state.params, after.params), metrics


def maml_closed_form(family, params, second_order):
    """The loss and the meta-gradient after one step of descent."""
    support, query, curvature = (np.float64(x) for x in (family.support, family.query, family.curvature))
    off = params - RATE * curvature * (params - support) - query
    grad = (1 - RATE * curvature if second_order else 1) * curvature * off
    return np.sum(curvature * off**2) / 2, grad
