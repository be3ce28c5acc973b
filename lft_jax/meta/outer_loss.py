"""Tasks and their outer losses, used by meta-training, evaluation and `lft_jax.meta.theory`.

From the PRNG key of a task to its outer loss::

    key --sample--> support set, query set --fine-tune on the support set--> thetas --loss on the query set--> losses
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from lft_jax import _memory, base
from lft_jax.base import Episode, Learner, PyTree, TaskFamily, Trajectory
from lft_jax.optimizers.fine_tuning import Part, Paused, fine_tune


def _few(k):
    """A quarter of the way, half of it, and the end, which counts for three."""
    last = k[-1]
    parts = ((last // 4, 1), (last // 2, 1), (last, 3))
    return sum((weight * (k == max(step, 1)) for step, weight in parts), np.zeros_like(k))


STEP_WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uniform": np.ones_like,
    "linear": lambda k: k,
    "few": _few,
    "final": lambda k: (k == k[-1]).astype(k.dtype),
}

_WARM_START = 1  # folded into the key of the start, which `learner.start` uses itself
_DRAWN = 1  # folded into the key of the episode, which `family.sample` uses itself


@dataclasses.dataclass(frozen=True)
class Unroll:
    """How the K unrolled fine-tuning steps enter the outer loss, and how they are differentiated.

    Attributes:
      step_weights: weights w_k of the outer loss `sum_k w_k f(theta_k; query set)`: "uniform", "linear" (w_k ~ k) or
        "final" (only k = K).
      window: steps of truncated backpropagation, see `fine_tune`. None for all K.
      remat: whether to recompute steps in the backward pass to save memory, see `fine_tune`. None: only if one task
        does not fit into `memory_mib` otherwise.
      memory_mib: memory in MiB, above 0, that one device may store for a backward pass. Tasks, and the outer losses of
        their steps, are computed in as few parts as fit into it; the smallest part is one task and one step.

    Raises:
      ValueError: for a field out of range.

    References:
      Finn et al. 2017, arXiv 1703.03400: MAML has the weights "final".

    Examples:
      >>> Unroll(step_weights="linear", window=5).window
      5
    """

    step_weights: str = "uniform"
    window: int | None = None
    remat: bool | None = None
    memory_mib: float = _memory.DEFAULT_MIB

    def __post_init__(self):
        base.check_name("step_weights", self.step_weights, STEP_WEIGHTS)
        if self.window is not None:
            base.check_at_least("window", self.window, 1)
        base.check_positive("memory_mib", self.memory_mib)


#: The default: uniform weights, backpropagation through all steps, 512 MiB.
UNROLL = Unroll()


def step_weights(name: str, num_steps: int) -> Float[np.ndarray, " K"]:
    """Returns the weights w_k of the fine-tuning steps in the outer loss, which sum to 1.

    Args:
      name: "uniform" (w_k = 1/K), "linear" (w_k ~ k), "few" (steps K/4, K/2 and K in the ratio 1:1:3, which takes a
        fraction of the time) or "final" (w_K = 1, the others 0).
      num_steps: K, at least 1.

    Raises:
      ValueError: for an unknown name, or `num_steps` below 1.

    Examples:
      >>> step_weights("linear", 3).round(3).tolist()
      [0.167, 0.333, 0.5]
      >>> step_weights("few", 5).round(3).tolist()
      [0.2, 0.2, 0.0, 0.0, 0.6]
    """
    base.check_at_least("num_steps", num_steps, 1)
    weights = STEP_WEIGHTS[base.check_name("step_weights", name, STEP_WEIGHTS)](np.arange(1.0, num_steps + 1))
    return weights / weights.sum()


def run_task(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    key: PRNGKeyArray,
    *,
    num_steps: int,
    unroll: Unroll = UNROLL,
    part: Part | None = None,
    watch: Callable[[PyTree], PyTree] = lambda state: (),
) -> tuple[Episode, Trajectory]:
    """Samples one task and fine-tunes on its support set.

    Args:
      learner: what fine-tunes, from `lft_jax.learners`.
      params: its meta-parameters.
      family: task family.
      key: PRNG key of the task: of its data, its start and its oracle.
      num_steps: fine-tuning steps K, at least 1.
      unroll: how the steps are differentiated. `remat=None` means False here.
      part, watch: see `fine_tune`.

    Returns:
      The episode, and the trajectory of its K steps. The trajectory's `queries` include those of the family's warm
      start and of the learner's adaptation.

    Raises:
      ValueError: for a number out of range, see `fine_tune`.

    Examples:
      >>> import optax
      >>> from lft_jax.meta import learners
      >>> from lft_jax.tasks.quadratic import QuadraticFamily
      >>> learner, family = learners.maml(optax.sgd(0.1)), QuadraticFamily(jnp.ones(3), support=2, query=4)
      >>> task = jax.jit(lambda key: run_task(learner, jnp.zeros(3), family, key, num_steps=5))
      >>> episode, trajectory = task(jax.random.key(0))
      >>> episode.support.shape, episode.query.shape, trajectory.thetas.shape
      ((2, 3), (4, 3), (5, 3))
    """
    key_sample, key_start, key_tune = jax.random.split(key, 3)
    episode = family.sample(key_sample)
    family = family.drawn(jax.random.fold_in(key_sample, _DRAWN))

    def tuned(params, key, second_order, part, **options):
        start, queries = _start(learner, params, family, episode, key_start, part)
        trajectory = fine_tune(
            learner.optimizer(params),
            family.oracle(episode.support),
            start,
            key,
            num_steps=num_steps,
            project=family.project,
            second_order=second_order,
            part=part,
            **options,
        )
        return trajectory._replace(queries=trajectory.queries + queries)

    params, key_tune, spent = _adapted(learner, params, family, episode, key_tune, tuned)
    options = {"remat": bool(unroll.remat), "window": unroll.window, "watch": watch}
    trajectory = tuned(params, key_tune, learner.second_order, part, **options)
    return episode, trajectory._replace(queries=trajectory.queries + spent)


def _start(learner, params, family, episode, key, part):
    """The start of a task after its family's warm start, and the queries of that; parts after the first skip it."""
    start = learner.start(params, family, key)

    def warm(start):
        start, queries = family.warm_start(start, episode.support, jax.random.fold_in(key, _WARM_START))
        return start, jnp.asarray(queries, jnp.int32)

    if part is None or part.paused is None:
        return warm(start)
    return jax.lax.cond(part.paused.done > 0, lambda start: (start, jnp.int32(0)), warm, start)


def _adapted(learner, params, family, episode, key, tuned):
    """The meta-parameters after the learner's adaptation steps, the key for fine-tuning, and the queries of that."""
    if not learner.adaptation_steps:
        return params, key, 0

    def support_loss(params, key):
        trajectory = tuned(params, key, False, None)
        losses = jax.lax.map(lambda theta: family.loss(theta, episode.support), trajectory.thetas)
        # The loss after a step costs as many queries as the step.
        return jnp.mean(losses), 2 * trajectory.queries[-1]

    spent = 0
    key, key_adaptation = jax.random.split(key)  # so that adaptation and fine-tuning share no key
    for key_step in jax.random.split(key_adaptation, learner.adaptation_steps):
        grads, queries = jax.grad(support_loss, has_aux=True)(jax.lax.stop_gradient(params), key_step)
        # The gradient is a constant, as in first-order MAML.
        params = jax.tree.map(lambda p, g: p - learner.adaptation_rate * jax.lax.stop_gradient(g), params, grads)
        spent += queries
    return params, key, spent


def outer_losses(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    keys: Key[Array, " T"],
    *,
    num_steps: int,
    steps: Int[np.ndarray, " steps"],
    unroll: Unroll = UNROLL,
    steps_at_once: int | None = None,
    differentiable: bool = True,
) -> Float[Array, "T steps"]:
    """Samples T tasks, fine-tunes on each, and returns the outer loss after each of `steps`.

    The outer losses are computed in batches after the fine-tuning scan. With constant inner gradients, only the
    optimizer's recurrence is then differentiated through time.

    Args:
      learner: what fine-tunes; its `objective` says what the outer loss is.
      params: its meta-parameters.
      family: task family.
      keys: `[T]` PRNG keys, one per task.
      num_steps: fine-tuning steps K.
      steps: indices of the steps after which the loss is computed, from 0.
      unroll: how the steps are differentiated.
      steps_at_once: steps of all tasks whose losses are computed together. None for all.
      differentiable: True computes the gradient with respect to each optimizee along with the loss, and stores it
        instead of activations; the losses can then be differentiated once, not twice. False takes no gradient.

    Returns:
      `[T, steps]` losses.
    """
    scored = Scored(steps, steps_at_once, differentiable)
    return losses_of_part(learner, params, family, keys, num_steps=num_steps, scored=scored, unroll=unroll)[0]


@dataclasses.dataclass(frozen=True)
class Scored:
    """The steps whose outer loss is computed, and how.

    Attributes:
      steps, differentiable: see `outer_losses`.
      at_once: its `steps_at_once`.
    """

    steps: np.ndarray
    at_once: int | None = None
    differentiable: bool = True


def losses_of_part(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    keys: Key[Array, " T"],
    *,
    num_steps: int,
    scored: Scored,
    unroll: Unroll = UNROLL,
    part: Part | None = None,
) -> tuple[Float[Array, "T steps"], tuple[PyTree, PyTree]]:
    """`outer_losses` of a part of the tasks' K steps, and the state from which the next part continues.

    Args:
      learner, params, family, keys, num_steps, unroll: see `outer_losses`.
      scored: steps whose loss is computed; its `steps` are counted from the beginning of the part.
      part: the part. The optimizee and the state in its `paused` have a leading axis `[T]`.

    Returns:
      `[T, steps]` losses, and `(optimizees, optimizer states)` after the part, with a leading axis `[T]`.
    """
    # Sample and fine-tune.
    episodes, trajectories = _run_tasks(learner, params, family, keys, num_steps, unroll, part)
    # The outer loss after each step.
    if learner.objective == "teacher":
        losses = trajectories.watched[:, scored.steps]
    elif learner.objective == "end":
        start = _straight_through_start(learner, params, family, keys[0])
        distances = _distances_to_the_end(start, trajectories.thetas)
        losses = jnp.broadcast_to(distances[:, None], (len(keys), len(scored.steps)))
    else:
        data = episodes.query if learner.objective == "query" else episodes.support
        losses = _losses_on(data, family, trajectories.thetas, scored)
    last = jax.tree.map(lambda x: x[:, -1], trajectories.thetas)
    return losses, (last, trajectories.state)


def _run_tasks(learner, params, family, keys, num_steps, unroll, part):
    """`run_task` for each key: episodes and trajectories with a leading axis `[T]`."""
    watch = {"watch": lambda state: state.distance} if learner.objective == "teacher" else {}

    def task(key, part):
        return run_task(learner, params, family, key, num_steps=num_steps, unroll=unroll, part=part, **watch)

    if part is None or part.paused is None:
        return jax.vmap(lambda key: task(key, part))(keys)
    length, (thetas, states, done) = part.length, part.paused
    return jax.vmap(lambda key, theta, state: task(key, Part(length, Paused(theta, state, done))))(keys, thetas, states)


def _losses_on(data, family, thetas, scored):
    """`[T, steps]`, the loss of optimizees `[T, K, ...]` on the data of their tasks."""
    loss = functools.partial(_loss_and_its_gradient, family.loss) if scored.differentiable else family.loss
    thetas = jax.tree.map(lambda x: jnp.moveaxis(x[:, scored.steps], 1, 0), thetas)
    losses = jax.lax.map(
        lambda thetas: jax.vmap(loss)(thetas, data), thetas, batch_size=scored.at_once or len(scored.steps)
    )
    return losses.T


def _straight_through_start(learner, params, family, key):
    """The start, as a function of the meta-parameters with derivative 1 (that of the projection is ignored)."""
    start = learner.start(params, family, key)
    return jax.tree.map(lambda p, s: p + jax.lax.stop_gradient(s - p), params, start)


def _distances_to_the_end(start, thetas):
    """`[T]`, half the squared distance from the start to the last of `thetas` `[T, K, ...]`, which is a constant."""

    def distance(start, end):
        offsets = start[None] - jax.lax.stop_gradient(end)
        return jnp.sum(offsets.reshape(len(end), -1) ** 2, axis=1) / 2

    distances = jax.tree.map(lambda s, x: distance(s, x[:, -1]), start, thetas)
    return functools.reduce(operator.add, jax.tree.leaves(distances))


def _loss_and_its_gradient(loss, theta, data):
    """`loss(theta, data)`, whose gradient by `theta` is computed and stored at once. Higher derivatives are wrong."""
    value, grads = jax.value_and_grad(loss)(jax.lax.stop_gradient(theta), data)
    return jax.tree.reduce(
        lambda total, part: total + part,
        jax.tree.map(lambda g, x: jnp.sum(g * (x - jax.lax.stop_gradient(x))), grads, theta),
        value,
    )
