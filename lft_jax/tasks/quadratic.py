"""Noisy quadratic tasks, whose trajectories and meta-gradients are known in closed form."""

import dataclasses

import jax
import jax.numpy as jnp

from lft_jax import base, oracles
from lft_jax.base import Episode, Oracle, TaskFamily

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuadraticFamily(TaskFamily):
    """Find a task's center from noisy sights of it: the loss is `mean_i sum(curvature * (theta - z_i)^2) / 2`.

    A task's center is `center * N(0, I)`, its examples are `z_i = center + noise * N(0, I)`, `[d]` each, so the
    gradient on n examples is that of the center plus noise of variance `(curvature * noise)^2 / n` in each coordinate.

    Attributes:
      curvature: `[d]`, above 0.
      center: standard deviation of the centers, at least 0.
      noise: standard deviation of the examples, at least 0.
      support: examples that are fine-tuned on.
      query: examples that are judged on.
    """

    curvature: jax.Array
    center: float = 1.0
    noise: float = 1.0
    support: int = dataclasses.field(default=10, metadata=_STATIC)
    query: int = dataclasses.field(default=10, metadata=_STATIC)

    def sample(self, key: jax.Array) -> Episode:
        """Examples `[support, d]` and `[query, d]` of one center."""
        key_center, key_examples = jax.random.split(key)
        shape, dtype = self.curvature.shape, self.curvature.dtype
        center = self.center * jax.random.normal(key_center, shape, dtype)
        noise = jax.random.normal(key_examples, (self.support + self.query, *shape), dtype)
        examples = center[None] + self.noise * noise
        return Episode(examples[: self.support], examples[self.support :])

    def init(self, key: jax.Array) -> jax.Array:
        """Zeros `[d]`."""
        del key
        return jnp.zeros_like(self.curvature)

    def oracle(self, support: jax.Array) -> Oracle:
        """The exact gradient of the support loss, and its spread over the examples."""

        def example_losses(thetas):
            return jnp.sum(self.curvature[None] * (thetas - support) ** 2, axis=-1) / 2

        return oracles.per_example_gradient(example_losses, num_examples=len(support))

    def loss(self, theta: jax.Array, data: jax.Array) -> jax.Array:
        """`[]`."""
        return jnp.mean(jnp.sum(self.curvature[None] * (theta[None] - data) ** 2, axis=-1)) / 2

    def project(self, theta: jax.Array) -> jax.Array:
        """The identity."""
        return theta

    def metrics(self, theta: jax.Array, data: jax.Array) -> dict[str, jax.Array]:
        """The loss."""
        return {"loss": self.loss(theta, data)}


def quadratic_family(
    curvature: jax.Array, *, center: float = 1.0, noise: float = 1.0, support: int = 10, query: int = 10
) -> QuadraticFamily:
    """A `QuadraticFamily`; raises a ValueError for numbers out of its ranges."""
    curvature = jnp.asarray(curvature)
    if curvature.ndim != 1 or not jnp.issubdtype(curvature.dtype, jnp.floating) or not bool(jnp.all(curvature > 0)):
        raise ValueError(f"curvature must be a vector of numbers above 0, got {curvature}.")
    for name, value, minimum in (
        ("center", center, 0),
        ("noise", noise, 0),
        ("support", support, 1),
        ("query", query, 1),
    ):
        base.check_at_least(name, value, minimum)
    return QuadraticFamily(curvature, center, noise, support, query)
