"""Noisy quadratic tasks, whose trajectories and meta-gradients are known in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lft_jax import base, oracles
from lft_jax.base import Episode, Oracle, TaskFamily

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuadraticFamily(TaskFamily):
    """Noisy quadratic tasks: find the center of a task from noisy observations of it.

    A task draws a center `c` and examples `z_i`, `[d]` each::

        c   = center * N(0, I)
        z_i = c + noise * N(0, I)

        loss(theta) = mean_i sum(curvature * (theta - z_i)^2) / 2

    So the gradient on n examples is that at the center, plus noise of variance `(curvature * noise)^2 / n` in each
    coordinate. `lft_jax.tasks.quadratic.quadratic_family` builds a family and checks its arguments.

    Attributes:
      curvature: `[d]`, above 0.
      center: standard deviation of the centers, at least 0.
      noise: standard deviation of the examples around their center, at least 0.
      support: number of support examples.
      query: number of query examples.

    Examples:
      >>> family = QuadraticFamily(jnp.asarray([1.0, 2.0]), support=5, query=8)
      >>> support, query = jax.eval_shape(family.sample, jax.random.key(0))
      >>> support.shape, query.shape
      ((5, 2), (8, 2))
      >>> float(family.loss(jnp.asarray([2.0, 1.0]), jnp.zeros((5, 2))))
      3.0
    """

    curvature: jax.Array
    center: float = 1.0
    noise: float = 1.0
    support: int = dataclasses.field(default=10, metadata=_STATIC)
    query: int = dataclasses.field(default=10, metadata=_STATIC)

    def sample(self, key: PRNGKeyArray) -> Episode:
        """Draws a center, and examples `[support, d]` and `[query, d]` of it."""
        key_center, key_examples = jax.random.split(key)
        shape, dtype = self.curvature.shape, self.curvature.dtype
        center = self.center * jax.random.normal(key_center, shape, dtype)
        noise = jax.random.normal(key_examples, (self.support + self.query, *shape), dtype)
        examples = center[None] + self.noise * noise
        return Episode(examples[: self.support], examples[self.support :])

    def init(self, key: PRNGKeyArray) -> Float[Array, " d"]:
        """The start: zeros `[d]`."""
        del key
        return jnp.zeros_like(self.curvature)

    def oracle(self, support: Float[Array, "S d"]) -> Oracle:
        """The exact gradient of the support loss, and its spread over the examples."""

        def example_losses(thetas):
            return jnp.sum(self.curvature[None] * (thetas - support) ** 2, axis=-1) / 2

        return oracles.per_example_gradient(example_losses, num_examples=len(support))

    def loss(self, theta: Float[Array, " d"], data: Float[Array, "n d"]) -> Float[Array, ""]:
        """The mean loss over the examples."""
        return jnp.mean(jnp.sum(self.curvature[None] * (theta[None] - data) ** 2, axis=-1)) / 2

    def project(self, theta: Float[Array, " d"]) -> Float[Array, " d"]:
        """The identity."""
        return theta

    def metrics(self, theta: Float[Array, " d"], data: Float[Array, "n d"]) -> dict[str, Float[Array, ""]]:
        """`loss`."""
        return {"loss": self.loss(theta, data)}


def quadratic_family(
    curvature: Float[Array | np.ndarray, " d"],
    *,
    center: float = 1.0,
    noise: float = 1.0,
    support: int = 10,
    query: int = 10,
) -> QuadraticFamily:
    """A family of noisy quadratic tasks; see `QuadraticFamily`.

    Args:
      curvature: `[d]`, above 0.
      center: standard deviation of the centers, at least 0.
      noise: standard deviation of the examples around their center, at least 0.
      support: number of support examples, at least 1.
      query: number of query examples, at least 1.

    Raises:
      ValueError: for an argument out of range.
    """
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
