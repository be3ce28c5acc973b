"""One task from beginning to end, and its outer loss: what meta-training, evaluation and theory share.

key --sample--> support, query --fine-tune on support--> thetas --loss on query--> outer losses
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import _memory, base
from lft_jax.base import Episode, Learner, PyTree, TaskFamily, Trajectory
from lft_jax.optimizers.fine_tuning import Part, fine_tune

STEP_WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uniform": np.ones_like,
    "linear": lambda k: k,
    "final": lambda k: (k == k[-1]).astype(k.dtype),
}

_WARM = 1  # folded into the key of the start


@dataclasses.dataclass(frozen=True)
class Unroll:
    """How the unrolled fine-tuning steps weigh in the outer loss and are differentiated.

    Attributes:
      step_weights: w_k of the outer loss `sum_k w_k f(theta_k; query)`: "uniform", "linear" (w_k ~ k) or "final".
      window: steps of truncated backpropagation, see `fine_tune`; None for all K.
      remat: trade time for memory, see `fine_tune`. None: only if one task does not fit into `memory_mib` without.
      memory_mib: MiB that one device may store for a backward pass, above 0. Tasks and query passes are run in as few
        parts as it allows (at least one task, and one of its steps, at a time).

    Raises:
      ValueError: for a field out of range.

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


#: All steps weigh alike, are differentiated through, and may take 512 MiB.
UNROLL = Unroll()


def step_weights(name: str, num_steps: int) -> np.ndarray:
    """`[K]`, the weights w_k of the outer loss, which sum to 1: "uniform", "linear" (w_k ~ k) or "final".

    Examples:
      >>> step_weights("linear", 3).round(3).tolist()
      [0.167, 0.333, 0.5]
    """
    base.check_at_least("num_steps", num_steps, 1)
    weights = STEP_WEIGHTS[base.check_name("step_weights", name, STEP_WEIGHTS)](np.arange(1.0, num_steps + 1))
    return weights / weights.sum()


def run_task(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    key: jax.Array,
    *,
    num_steps: int,
    unroll: Unroll = UNROLL,
    part: Part | None = None,
    watch: Callable[[PyTree], PyTree] = lambda state: (),
) -> tuple[Episode, Trajectory]:
    """Samples one task and fine-tunes on its support set.

    Args:
      learner: what fine-tunes.
      params: its meta-parameters.
      family: of the task.
      key: PRNG key of the task: its data, its start, its oracle.
      num_steps: K.
      unroll: how the steps are differentiated; a `remat` of None is False here.
      part, watch: see `fine_tune`.

    Returns:
      The episode, and the trajectory, whose `queries` hold those of a family's warm start and a learner's adaptation.
    """
    key_sample, key_start, key_tune = jax.random.split(key, 3)
    episode = family.sample(key_sample)

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

    params, key_tune, used = _adapted(learner, params, family, episode, key_tune, tuned)
    options = {"remat": bool(unroll.remat), "window": unroll.window, "watch": watch}
    trajectory = tuned(params, key_tune, learner.second_order, part, **options)
    return episode, trajectory._replace(queries=trajectory.queries + used)


def _start(learner, params, family, episode, key, part):
    """The start of a task after its family's warm start, which a part that goes on skips, and the queries it cost."""
    start = learner.start(params, family, key)

    def warm(start):
        start, queries = family.warm_start(start, episode.support, jax.random.fold_in(key, _WARM))
        return start, jnp.asarray(queries, jnp.int32)

    if part is None or part.paused is None:
        return warm(start)
    return jax.lax.cond(part.paused.done > 0, lambda start: (start, jnp.int32(0)), warm, start)


def _adapted(learner, params, family, episode, key, tuned):
    """The meta-parameters after the learner's own steps on the support loss, the key left, and the queries used."""
    if not learner.adaptation_steps:
        return params, key, 0

    def support_loss(params, key):
        trajectory = tuned(params, key, False, None)
        losses = jax.lax.map(lambda theta: family.loss(theta, episode.support), trajectory.thetas)
        # Judging the optimizee of a step costs as much as the step.
        return jnp.mean(losses), 2 * trajectory.queries[-1]

    used = 0
    key, key_adaptation = jax.random.split(key)  # first, so that no key serves an adaptation and a step
    for key_step in jax.random.split(key_adaptation, learner.adaptation_steps):
        grads, queries = jax.grad(support_loss, has_aux=True)(jax.lax.stop_gradient(params), key_step)
        # First order: the gradient is a constant, as in first-order MAML.
        params = jax.tree.map(lambda p, g: p - learner.adaptation_rate * jax.lax.stop_gradient(g), params, grads)
        used += queries
    return params, key, used


def outer_losses(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    keys: jax.Array,
    *,
    num_steps: int,
    steps: np.ndarray,
    unroll: Unroll = UNROLL,
    steps_at_once: int | None = None,
    differentiable: bool = True,
) -> jax.Array:
    """`[T, len(steps)]`, the loss that the learner's objective asks for after each of `steps`, of `T` tasks.

    Tasks and steps are scored in batched calls after the scan: with constant inner gradients only the recurrence is
    differentiated through time.

    Args:
      learner, params, family: what fine-tunes, and on what.
      keys: `[T]`, one per task.
      num_steps: K.
      steps: numbers of the steps to score, from 0.
      unroll: how the steps are differentiated.
      steps_at_once: steps of all tasks that are scored together; None for all.
      differentiable: the gradient with respect to each optimizee is taken at once and kept instead of what it was
        computed from, so that the losses can be differentiated once only. If False, it is not taken at all.
    """
    scored = Scored(steps, steps_at_once, differentiable)
    return losses_of_part(learner, params, family, keys, num_steps=num_steps, scored=scored, unroll=unroll)[0]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Which steps are scored, and how; the fields are arguments of `outer_losses`."""

    steps: np.ndarray
    at_once: int | None = None
    differentiable: bool = True


def losses_of_part(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    keys: jax.Array,
    *,
    num_steps: int,
    scored: Scored,
    unroll: Unroll = UNROLL,
    part: Part | None = None,
) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
    """`outer_losses` of a part of the tasks' K steps, and what the next part goes on from.

    Args:
      learner, params, family, keys, num_steps, unroll: as of `outer_losses`.
      scored: its `steps` are numbers of steps within the part.
      part: whose `paused` has an optimizee and a state with a leading axis `[T]`.

    Returns:
      `[T, len(steps)]`, and the optimizees and the optimizer's states at the end of the part, with leading axes `[T]`.
    """
    imitates = learner.objective == "teacher"
    watch = {"watch": lambda state: state.distance} if imitates else {}
    length, paused = (None, None) if part is None else part

    def task(key, paused):
        part = None if length is None else Part(length, paused)
        return run_task(learner, params, family, key, num_steps=num_steps, unroll=unroll, part=part, **watch)

    axes = (0, None if paused is None else type(paused)(0, 0, None))
    episodes, trajectories = jax.vmap(task, in_axes=axes)(keys, paused)
    stopped = jax.tree.map(lambda x: x[:, -1], trajectories.thetas), trajectories.state
    if imitates:
        return trajectories.watched[:, scored.steps], stopped
    if learner.objective == "end":
        distances = _distances_to_the_end(
            _straight_through_start(learner, params, family, keys[0]), trajectories.thetas
        )
        return jnp.broadcast_to(distances[:, None], (len(keys), len(scored.steps))), stopped
    data = episodes.query if learner.objective == "query" else episodes.support
    loss = functools.partial(_loss_and_its_gradient, family.loss) if scored.differentiable else family.loss
    thetas = jax.tree.map(lambda x: jnp.moveaxis(x[:, scored.steps], 1, 0), trajectories.thetas)
    losses = jax.lax.map(
        lambda thetas: jax.vmap(loss)(thetas, data), thetas, batch_size=scored.at_once or len(scored.steps)
    )
    return losses.T, stopped


def _straight_through_start(learner, params, family, key):
    """The start, whose projection is not differentiated: its derivative is not 1 beyond the border of the ball."""
    start = learner.start(params, family, key)
    return jax.tree.map(lambda p, s: p + jax.lax.stop_gradient(s - p), params, start)


def _distances_to_the_end(start, thetas):
    """`[T]`, half the squared distances from a start to the last of thetas `[T, K, ...]`, which are constants."""

    def distance(start, end):
        offsets = start[None] - jax.lax.stop_gradient(end)
        return jnp.sum(offsets.reshape(len(end), -1) ** 2, axis=1) / 2

    return sum(jax.tree.leaves(jax.tree.map(lambda s, x: distance(s, x[:, -1]), start, thetas)))


def _loss_and_its_gradient(loss, theta, data):
    """`loss(theta, data)`, whose derivative is computed with it; only its first one is right."""
    value, grads = jax.value_and_grad(loss)(jax.lax.stop_gradient(theta), data)
    return jax.tree.reduce(
        lambda total, part: total + part,
        jax.tree.map(lambda g, x: jnp.sum(g * (x - jax.lax.stop_gradient(x))), grads, theta),
        value,
    )
