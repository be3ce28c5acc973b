"""The types that every room speaks, and the checks that they share.

How the pieces compose::

    key --family.sample--> Episode --family.oracle(support)--> Oracle
    (optimizer, oracle, theta0) --fine_tune--> Trajectory --family.loss(query)--> outer loss

Letters in shape comments: `K` fine-tuning steps, `S` support examples, `Q` query examples, `d` coordinates of
the optimizee `theta` (any pytree of floating-point arrays; for a universal perturbation one array `[H, W, C]`).
"""

import abc
import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class Episode(NamedTuple):
    """One task's data.

    Attributes:
      support: pytree with leading axis `[S]`, what the optimizee is fine-tuned on.
      query: pytree with leading axis `[Q]`, disjoint from the support set, what it is judged on.
    """

    support: PyTree
    query: PyTree


class Estimate(NamedTuple):
    """What an oracle answers at one `theta`.

    Attributes:
      value: `[]` the loss at `theta` (for an oracle that does not evaluate `theta` itself, its best estimate).
      grads: like `theta`, the gradient or an estimate of it.
      queries: `[]` int32, how many example evaluations of the model the answer cost.
      extras: what else the oracle knows, passed on to the optimizer as optax extra arguments. Names in use:
        `spread` (like `theta`, standard deviation of the per-example gradients), `scale` (`[]`, the size of a
        coordinate that the feasible set suggests), `second` (like `theta`, the gradient of one of two losses that
        `grads` is of the sum of), `context` (like `theta` with one more, leading axis `[2]`: mean
        and standard deviation of the support examples at each coordinate).
    """

    value: jax.Array
    grads: PyTree
    queries: jax.Array
    extras: dict[str, PyTree]


#: `(theta, key) -> Estimate`. First-order oracles ignore the key. Zeroth-order ones also take keywords, how their
#: directions are spread (`lft_jax.oracles.covariance`).
Oracle = Callable[[PyTree, jax.Array], Estimate]


class Trajectory(NamedTuple):
    """What fine-tuning leaves behind.

    Attributes:
      thetas: like `theta` with a leading axis `[K]`: the optimizee after each step.
      values: `[K]` the oracle's loss at the point that each step started from.
      queries: `[K]` int32, example evaluations used up to and including each step.
      state: the optimizer's state after the last step.
      watched: with a leading axis `[K]`: what `fine_tune` was told to keep of the optimizer's state after each step.
    """

    thetas: PyTree
    values: jax.Array
    queries: jax.Array
    state: PyTree
    watched: PyTree = ()


class TaskFamily(abc.ABC):
    """Tasks that share shapes and a model: a bucket that is vmapped.

    Subclass it as a frozen dataclass registered with `jax.tree_util.register_dataclass`, so that a family is itself
    a pytree: its arrays (datasets, model weights) are leaves, the rest is static. A family is then an argument of the
    jitted programs, and families that differ only in the values of their arrays share one compilation.
    """

    @abc.abstractmethod
    def sample(self, key: jax.Array) -> Episode:
        """One task's data; traceable."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> PyTree:
        """The initial optimizee `theta` of a task."""

    def warm_start(self, theta: PyTree, support: PyTree, key: jax.Array) -> tuple[PyTree, int]:
        """What is made of a learner's start once the support set is known, and the example evaluations it costs.

        By default the start itself, at no cost.
        """
        del support, key
        return theta, 0

    @abc.abstractmethod
    def oracle(self, support: PyTree) -> Oracle:
        """How the optimizee's gradient is obtained from the support set while fine-tuning."""

    @abc.abstractmethod
    def loss(self, theta: PyTree, data: PyTree) -> jax.Array:
        """`[]`, the objective on a support or a query set, which the outer loss is made of."""

    @abc.abstractmethod
    def project(self, theta: PyTree) -> PyTree:
        """`theta` projected onto the feasible set; idempotent."""

    @abc.abstractmethod
    def metrics(self, theta: PyTree, data: PyTree) -> dict[str, jax.Array]:
        """`{name: []}`, what evaluation reports."""


@dataclasses.dataclass(frozen=True)
class Learner:
    """What is meta-learned, and how its meta-parameters `params` turn into a fine-tuning run.

    Attributes:
      name: as printed in tables.
      init: `(key, families) -> params`. Raises ValueError if the families do not fit the learner.
      optimizer: `params -> optax transformation` that fine-tunes.
      start: `(params, family, key) -> theta`, the initial optimizee of a task.
      objective: the outer loss: "query" (LFT, MAML: validation data) or "support" (L2O: training data), PAPER "The
        method", "end", half the squared distance of a learned start from where fine-tuning ends (Reptile), or
        "teacher", the distance of its updates from another's (`lft_jax.meta.imitation`).
      second_order: whether meta-gradients flow through the inner gradients.
      adaptation_steps: gradient steps that the meta-parameters themselves take on a task's support set first.
      adaptation_rate: learning rate of those.
    """

    name: str
    init: Callable[[jax.Array, tuple[TaskFamily, ...]], PyTree]
    optimizer: Callable[[PyTree], optax.GradientTransformation]
    start: Callable[[PyTree, TaskFamily, jax.Array], PyTree]
    objective: str = "query"
    second_order: bool = False
    adaptation_steps: int = 0
    adaptation_rate: float = 0.0


def safe_sqrt(x: jax.Array) -> jax.Array:
    """sqrt with derivative 0 at 0 (where it would be infinite, and NaN once multiplied by 0)."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def check_name(argument: str, value: str, known: Iterable[str]) -> str:
    """Returns `value` if it is one of `known`, else raises a ValueError that lists the near matches."""
    known = sorted(known)
    if value in known:
        return value
    near = difflib.get_close_matches(str(value), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"{argument}: unknown name {value!r}.{hint} Known: {', '.join(known)}.")


def check_at_least(argument: str, value: float, minimum: float) -> None:
    """Raises a ValueError unless `value >= minimum`."""
    if not value >= minimum:
        raise ValueError(f"{argument} must be at least {minimum}, got {value!r}.")


def check_positive(argument: str, value: float) -> None:
    """Raises a ValueError unless `value` is a finite number above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{argument} must be a finite number above 0, got {value!r}.")
