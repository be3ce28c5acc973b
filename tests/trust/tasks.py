"""A small smooth task for every oracle and constraint."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lft_jax import Constraint, Episode, TaskFamily, ZerothOrder, oracles
from lft_jax._spectrum import noise_of_mean
from lft_jax.tasks.recipe import constrained_oracle

SHAPE, SUPPORT, QUERY = (4, 4, 1), 3, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnyConstraint:
    """One of several constraints, by a number that may be traced, so that one program serves them all."""

    number: jax.Array
    constraints: tuple[Constraint, ...]

    def _switched(self, method, theta):
        return jax.lax.switch(self.number, [getattr(c, method) for c in self.constraints], theta)

    def project(self, theta):
        return self._switched("project", theta)

    def cost(self, theta):
        return self._switched("cost", theta)

    def scale(self, theta):
        return self._switched("scale", theta)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bowl(TaskFamily):
    """Tasks of the loss `mean_i sum(cosh(theta - z_i))` plus a penalty, if any, for a `theta` of `SHAPE`.

    Attributes:
      constraint: the ball or the penalty.
      center: `[]`, where the examples `z_i` are.
      estimators: those that `kind` chooses from; None stands for exact gradients. Answers of all zeroth-order ones have
        a spread, of 0 if they tell none.
      kind: `[]` int32.
    """

    constraint: AnyConstraint
    center: jax.Array
    estimators: tuple[ZerothOrder | None, ...] = dataclasses.field(metadata={"static": True})
    kind: jax.Array

    def sample(self, key):
        examples = self.center + 0.5 * jax.random.normal(key, (SUPPORT + QUERY, *SHAPE), self.center.dtype)
        return Episode(examples[:SUPPORT], examples[SUPPORT:])

    def init(self, key):
        return jnp.zeros(SHAPE, self.center.dtype)

    def oracle(self, support):
        def one_of_them(theta, key):
            answers = [functools.partial(_answer, each) for each in self.estimators]
            return jax.lax.switch(self.kind, answers, self.constraint, support, theta, key)

        return one_of_them

    def loss(self, theta, data):
        return jnp.mean(_losses(theta[None] - data)) + self.constraint.cost(theta)

    def project(self, theta):
        return self.constraint.project(theta)

    def metrics(self, theta, data):
        return {"loss": self.loss(theta, data)}


def _losses(offsets):
    return jnp.sum(jnp.cosh(offsets), (1, 2, 3))


@functools.partial(jax.jit, static_argnums=0)  # traced once for all learners
def _answer(estimator, constraint, support, theta, key):
    def losses(theta):  # of one theta for all examples, or of a copy for each
        return _losses((theta if theta.ndim == support.ndim else theta[None]) - support)

    def attack(_):
        if estimator is not None:
            return functools.partial(_with_spread, estimator(losses, num_examples=SUPPORT))
        return oracles.per_example_gradient(
            losses,
            num_examples=SUPPORT,
            summarize=lambda copies: {"noise": noise_of_mean(copies)},
        )

    return constrained_oracle(attack, constraint, support)(theta, key)


def _with_spread(oracle, theta, key):
    estimate = oracle(theta, key)
    return estimate._replace(extras={"spread": jnp.zeros_like(theta), **estimate.extras})
