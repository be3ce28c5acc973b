"""Types that all packages share, and checks of arguments.

How the pieces compose::

    key --family.sample--> Episode --family.oracle(support)--> Oracle
    (optimizer, oracle, theta0) --fine_tune--> Trajectory --family.loss(query)--> outer loss

The optimizee `theta` is any pytree of floating-point arrays; for a universal perturbation it is one array `[H, W, C]`.

Letters in shapes: `K` fine-tuning steps, `S` support examples, `Q` query examples, `d` coordinates of `theta`, all its
leaves together.
"""

import abc
import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

PyTree = Any


class Episode(NamedTuple):
    """The data of one task.

    Attributes:
      support: pytree with leading axis `[S]`: the examples that the optimizee is fine-tuned on.
      query: pytree with leading axis `[Q]`: the examples that it is judged on, disjoint from the support set.
    """

    support: PyTree
    query: PyTree


class Estimate(NamedTuple):
    """The answer of an oracle at one `theta`.

    Attributes:
      value: `[]`, the loss at `theta`, or an estimate of it from an oracle that does not evaluate `theta` itself.
      grads: like `theta`, the gradient or an estimate of it.
      queries: `[]` int32, the number of queries (evaluations of the model on one example) that the answer took.
      extras: further results, which are passed to the optimizer as extra arguments. Names in use are:

        - `spread`: like `theta`, the standard deviation of the per-example gradients.
        - `scale`: `[]`, the size of a coordinate in the feasible set.
        - `context`: like `theta` with a leading axis `[2]`, mean and standard deviation of the support examples at
          each coordinate.
        - `periods`: means and errors of the per-example gradients over translations (`lft_jax.optimizers.periodic`).
        - `noise`: the variance of the mean gradient at each frequency (`lft_jax.optimizers.spectral`).
    """

    value: jax.Array
    grads: PyTree
    queries: jax.Array
    extras: dict[str, PyTree]


#: `(theta, key) -> Estimate`. First-order oracles ignore the key. Zeroth-order ones also take the keywords `deviation`
#: and `subspace`, which set the covariance of their random directions (`lft_jax.oracles._covariance`).
Oracle = Callable[..., Estimate]


class Trajectory(NamedTuple):
    """The result of fine-tuning.

    Attributes:
      thetas: like `theta` with a leading axis `[K]`, the optimizee after each step.
      values: `[K]`, the oracle's loss before each step.
      queries: `[K]` int32, queries used up to and including each step.
      state: the optimizer's state after the last step.
      watched: pytree with a leading axis `[K]`: what the `watch` of `fine_tune` returned after each step.
    """

    thetas: PyTree
    values: jax.Array
    queries: jax.Array
    state: PyTree
    watched: PyTree = ()


class TaskFamily(abc.ABC):
    """Tasks that share one model and all shapes, so that they can be vmapped.

    Subclass it as a frozen dataclass that is registered with `jax.tree_util.register_dataclass`. A family is then
    itself a pytree, and an argument of the jitted programs: its arrays (data, weights of the model) are leaves, all
    other fields are static. Families that differ only in the values of their arrays share one compiled program. All
    methods must be traceable by JAX. docs/own_tasks.md has complete families.

    Examples:
      >>> from lft_jax.tasks.quadratic import QuadraticFamily
      >>> family = QuadraticFamily(jnp.ones(3), support=5)  # find the center of 5 points in 3 dimensions
      >>> episode = jax.eval_shape(family.sample, jax.random.key(0))
      >>> episode.support.shape, episode.query.shape
      ((5, 3), (10, 3))
    """

    def refreshed(self) -> "TaskFamily":
        """The family as evaluation uses it now. The default returns itself.

        A family whose model reads weights that are no arrays of the family returns one that is compiled again if they
        have changed.
        """
        return self

    def drawn(self, key: PRNGKeyArray) -> "TaskFamily":
        """The family of one task, if tasks differ in more than their data: in the radius of a ball, for example.

        The default returns itself. Start, oracle and projection of the task are those of the family that is returned;
        its data and losses are those of the family itself.
        """
        del key
        return self

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray) -> Episode:
        """Draws the data of one task."""

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray) -> PyTree:
        """Returns the initial optimizee `theta` of a task."""

    def warm_start(self, theta: PyTree, support: PyTree, key: PRNGKeyArray) -> tuple[PyTree, int]:
        """Improves a learner's start with the support set, before the first step.

        The default keeps the start, at no cost.

        Args:
          theta: the learner's start.
          support: the support set, with leading axis `[S]`.
          key: PRNG key, for searches that are random.

        Returns:
          The start to use, and the number of queries that it took to find.
        """
        del support, key
        return theta, 0

    @abc.abstractmethod
    def oracle(self, support: PyTree) -> Oracle:
        """Returns the oracle that fine-tuning gets its gradients from, given the support set."""

    @abc.abstractmethod
    def loss(self, theta: PyTree, data: PyTree) -> Float[Array, ""]:
        """The objective on a support or a query set. The outer loss is made from it."""

    @abc.abstractmethod
    def project(self, theta: PyTree) -> PyTree:
        """Projects `theta` onto the feasible set; idempotent."""

    @abc.abstractmethod
    def metrics(self, theta: PyTree, data: PyTree) -> dict[str, Shaped[Array, ""]]:
        """Named scalars that evaluation reports for `theta` on a support or a query set."""


@dataclasses.dataclass(frozen=True)
class Learner:
    """What is meta-learned, and how a fine-tuning run follows from its meta-parameters `params`.

    `lft_jax.learners` builds the usual ones.

    Attributes:
      name: name in tables.
      init: `(key, families) -> params`, the initial meta-parameters. Raises a ValueError if the families do not fit
        the learner.
      optimizer: `params -> optax transformation` that fine-tunes.
      start: `(params, family, key) -> theta`, the initial optimizee of a task.
      objective: the outer loss. "query": the loss on the query set (LFT, MAML). "support": the loss on the support set
        (L2O). "end": half the squared distance between a learned start and the last optimizee (Reptile). "teacher":
        the distance between the learner's updates and those of another optimizer (`lft_jax.meta.imitation`).
      second_order: whether meta-gradients flow through the inner gradients.
      adaptation_steps: number of gradient steps by which `params` themselves are first adapted to the support set of a
        task.
      adaptation_rate: learning rate of these steps.
    """

    name: str
    init: Callable[[jax.Array, tuple[TaskFamily, ...]], PyTree]
    optimizer: Callable[[PyTree], optax.GradientTransformation]
    start: Callable[[PyTree, TaskFamily, jax.Array], PyTree]
    objective: str = "query"
    second_order: bool = False
    adaptation_steps: int = 0
    adaptation_rate: float = 0.0


def safe_sqrt(x: Float[Array, "*shape"] | float) -> Float[Array, "*shape"]:
    """Square root whose derivative at 0 is 0.

    The true derivative is infinite there, and becomes NaN when it is multiplied by 0.

    Examples:
      >>> float(jax.grad(safe_sqrt)(0.0))
      0.0
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def check_name(argument: str, value: Any, known: Iterable[str]) -> str:
    """Returns `value` if it is one of `known`, else raises a ValueError that suggests similar names."""
    known = sorted(known)
    if value in known:
        return value
    near = difflib.get_close_matches(str(value), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"{argument}: unknown name {value!r}.{hint} Known: {', '.join(known)}.")


def check_at_least(argument: str, value: Any, minimum: float) -> None:
    """Raises a ValueError unless `value >= minimum`."""
    if not value >= minimum:
        raise ValueError(f"{argument} must be at least {minimum}, got {value!r}.")


def check_count(argument: str, value: Any, minimum: int) -> None:
    """Raises a ValueError unless `value` is a whole number of at least `minimum`.

    Examples:
      >>> check_count("steps", 2.5, 1)
      Traceback (most recent call last):
      ValueError: steps must be a whole number of at least 1, got 2.5.
    """
    check_at_least(argument, value, minimum)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{argument} must be a whole number of at least {minimum}, got {value!r}.")


def check_positive(argument: str, value: Any) -> None:
    """Raises a ValueError unless `value` is finite and above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{argument} must be a finite number above 0, got {value!r}.")
