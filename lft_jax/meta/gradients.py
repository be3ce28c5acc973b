"""The meta-gradient of one family's tasks: by backpropagation within a memory budget, or by trying changes."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import _memory
from lft_jax.base import Learner, PyTree, TaskFamily
from lft_jax.meta.evolution import EvolutionStrategies, Particles, PersistentEvolutionStrategies
from lft_jax.meta.outer_loss import UNROLL, Scored, Unroll, losses_of_part, outer_losses, run_task, step_weights
from lft_jax.optimizers.fine_tuning import Part, Paused, block_length

#: `(params, family, keys [T], particles, window) -> ((loss, last step's loss), grads), particles`; `window` is `[]`
#: int32, the place of an episode's window among its windows, 0 where there is but one.
FamilyGradient = Callable[..., tuple[tuple[tuple[jax.Array, jax.Array], PyTree], PyTree]]

_BESIDE_TASKS = 1000  # folded into a task's key it gives one that `run_task` does not split off


class MemoryPlan(NamedTuple):
    """How a family's share of a meta-step is cut up.

    Attributes:
      remat: whether the recurrence is stored at every sqrt(K)-th step only (of a window at a time, if there is one).
      tasks: tasks at a time, a divisor of all.
      steps: fine-tuning steps of those tasks whose query losses are computed at a time.
    """

    remat: bool
    tasks: int
    steps: int


def memory_plan(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    num_tasks: int,
    *,
    num_steps: int,
    steps: int,
    unroll: Unroll = UNROLL,
) -> MemoryPlan:
    """The plan of fewest parts of which neither the recurrence nor the query losses store more than the budget.

    That is what can be told without compiling; a compiled meta-step has been seen to take up to twice as much.

    Args:
      learner, params, family: what is meta-trained, and on what.
      num_tasks: tasks of the family on one device.
      num_steps: K.
      steps: how many of the steps have a weight in the outer loss.
      unroll: the budget, the window, and whether to rematerialise.
    """

    def one_step(params, key):
        return run_task(learner, params, family, key, num_steps=1)

    key = jax.eval_shape(lambda: jax.random.key(0))
    episode, trajectory = jax.eval_shape(one_step, params, key)
    data = episode.query if learner.objective == "query" else episode.support
    theta = jax.eval_shape(lambda thetas: jax.tree.map(lambda x: x[0], thetas), trajectory.thetas)
    step_bytes = _memory.stored_bytes(lambda params: one_step(params, jax.random.key(0))[1].thetas, params)
    scored = learner.objective != "teacher"
    loss_bytes = _memory.stored_bytes(family.loss, theta, data) if scored else 0
    remat = unroll.remat
    if remat is None:  # not before one task alone is too much: to take fewer at a time costs no computing
        remat = num_steps * step_bytes > unroll.memory_mib * 2**20
    span = min(unroll.window or num_steps, num_steps)  # cut up on its own
    block = block_length(span)
    stored_steps = block + math.ceil(num_steps / span) * math.ceil(span / block) if remat else num_steps
    tasks = _memory.fitting(num_tasks, max(stored_steps * step_bytes, loss_bytes), unroll.memory_mib)
    tasks = max(n for n in range(1, tasks + 1) if num_tasks % n == 0)
    return MemoryPlan(remat, tasks, _memory.fitting(steps, tasks * loss_bytes, unroll.memory_mib))


def family_gradient(
    learner: Learner,
    *,
    num_steps: int,
    unroll: Unroll,
    meta_gradient: EvolutionStrategies | PersistentEvolutionStrategies | None,
) -> FamilyGradient:
    """The gradient of the mean outer loss over tasks of one family.

    Args:
      learner: what is meta-trained.
      num_steps: K.
      unroll: weights of the steps, window, memory.
      meta_gradient: evolution strategies, or None for backpropagation.
    """
    weights = step_weights(unroll.step_weights, num_steps)
    if isinstance(meta_gradient, PersistentEvolutionStrategies):
        return _persistent(learner, num_steps, weights, meta_gradient)
    steps = np.flatnonzero(weights)

    def mean_losses(params, family, keys, **options):
        losses = outer_losses(learner, params, family, keys, num_steps=num_steps, steps=steps, **options)
        return _weighted(losses, weights[steps])

    def evolved(params, family, keys, particles, _):
        # Nothing is stored: one step's query losses at a time.
        loss = functools.partial(mean_losses, family=family, keys=keys, steps_at_once=1, differentiable=False)
        return meta_gradient(loss, params, jax.random.fold_in(keys[0], _BESIDE_TASKS)), particles

    def backpropagated(params, family, keys, particles, _):
        plan = memory_plan(learner, params, family, len(keys), num_steps=num_steps, steps=len(steps), unroll=unroll)
        options = {"unroll": dataclasses.replace(unroll, remat=plan.remat), "steps_at_once": plan.steps}

        def gradient(keys):
            loss = functools.partial(mean_losses, family=family, keys=keys, **options)
            return jax.value_and_grad(loss, has_aux=True)(params)

        if plan.tasks == len(keys):
            return gradient(keys), particles
        parts = jax.lax.map(gradient, keys.reshape(-1, plan.tasks))
        return jax.tree.map(lambda x: jnp.mean(x, 0), parts), particles

    return backpropagated if meta_gradient is None else evolved


def first_particles(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    shape: tuple[int, int],
    strategies: PersistentEvolutionStrategies,
) -> Particles:
    """Particles before the first episode of so many families like this one, of so many tasks each.

    Inner states are zeros, which the episode replaces.
    """

    def begun(params, key):
        theta = learner.start(params, family, key)
        return theta, learner.optimizer(params).init(theta)

    num_families, num_tasks = shape
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_tasks))
    particles = strategies.init(params, jax.eval_shape(jax.vmap(begun, in_axes=(None, 0)), params, keys))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_families, *x.shape)), particles)


def _persistent(learner, num_steps, weights, strategies):
    length, windows = strategies.window, num_steps // strategies.window
    # Each window's loss on the scale of the episode's, so that the mean of the windows' gradients is its gradient.
    weights = windows * weights.reshape(windows, length)

    def gradient(params, family, keys, particles, window):
        def loss(params, carried):
            losses, carried = losses_of_part(
                learner,
                params,
                family,
                keys,
                num_steps=num_steps,
                scored=Scored(np.arange(length), at_once=1, differentiable=False),
                part=Part(length, Paused(*carried, window * length)),
            )
            return _weighted(losses, jnp.asarray(weights)[window]), carried

        key = jax.random.fold_in(jax.random.fold_in(keys[0], _BESIDE_TASKS), window)
        return strategies(loss, params, particles, key, begins=window == 0)

    return gradient


def _weighted(losses, weights):
    """The outer loss of losses `[T, steps]`, and that of the last step alone."""
    return jnp.mean(losses @ weights.astype(losses.dtype)), jnp.mean(losses[:, -1])
