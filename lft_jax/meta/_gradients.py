"""The meta-gradient on tasks of one family: backpropagation within a memory budget, or evolution strategies."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lft_jax import _memory
from lft_jax.base import Learner, PyTree, TaskFamily
from lft_jax.meta.evolution import EvolutionStrategies, Particles, PersistentEvolutionStrategies
from lft_jax.meta.outer_loss import UNROLL, Scored, Unroll, losses_of_part, outer_losses, run_task, step_weights
from lft_jax.optimizers.fine_tuning import Part, Paused, block_length

#: `(params, family, keys [T], particles, window) -> ((loss, loss after the last step), grads), particles`, where
#: `window` is the `[]` int32 index of the window in its episode, 0 without persistent evolution strategies.
FamilyGradient = Callable[..., tuple[tuple[tuple[Float[Array, ""], Float[Array, ""]], PyTree], PyTree]]

_DIRECTIONS = 1000  # folded into a task's key; `run_task` only splits it, so its keys are different


class MemoryPlan(NamedTuple):
    """How the tasks of one family in a meta-step are divided so that they fit into memory.

    Attributes:
      remat: whether the recurrence is stored only at every sqrt(K)-th step (with truncation: within each window).
      tasks: number of tasks computed together, a divisor of the number of tasks.
      steps: number of fine-tuning steps of these tasks whose outer losses are computed together.
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
    """Returns the plan with the fewest parts that fits into the memory budget.

    Neither the recurrence nor the outer losses of a part then store more than the budget. This is an estimate made
    without compiling; compiled meta-steps have taken up to twice as much.

    Args:
      learner: what is meta-trained.
      params: its meta-parameters.
      family: task family.
      num_tasks: tasks of the family on one device.
      num_steps: fine-tuning steps K.
      steps: number of steps with a weight above 0 in the outer loss.
      unroll: memory budget, truncation window, and whether to rematerialise.
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
    if remat is None:  # only if one task alone is too large: fewer tasks at a time need no extra computation
        remat = num_steps * step_bytes > unroll.memory_mib * 2**20
    span = min(unroll.window or num_steps, num_steps)  # each window has blocks of its own
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
    """Returns a function that computes the gradient of the mean outer loss over tasks of one family.

    Args:
      learner: what is meta-trained.
      num_steps: fine-tuning steps K, at least 1.
      unroll: weights of the steps, truncation window, memory budget.
      meta_gradient: evolution strategies, or None for backpropagation.
    """
    weights = step_weights(unroll.step_weights, num_steps)
    if isinstance(meta_gradient, PersistentEvolutionStrategies):
        return _persistent(learner, num_steps, weights, meta_gradient)
    steps = np.flatnonzero(weights)

    def outer_loss(params, family, keys, **options):
        # Samples a task for each key, fine-tunes on its support set, and takes the loss after each step.
        losses = outer_losses(learner, params, family, keys, num_steps=num_steps, steps=steps, **options)
        return _weighted(losses, weights[steps])

    if meta_gradient is not None:
        return _evolved(outer_loss, meta_gradient)
    return _backpropagated(outer_loss, learner, num_steps, len(steps), unroll)


def _backpropagated(outer_loss, learner, num_steps, num_scored, unroll):
    """The gradient of the outer loss by backpropagation, over as many tasks at a time as fit into memory."""

    def gradient(params, family, keys, particles, _):
        plan = memory_plan(learner, params, family, len(keys), num_steps=num_steps, steps=num_scored, unroll=unroll)
        options = {"unroll": dataclasses.replace(unroll, remat=plan.remat), "steps_at_once": plan.steps}

        def of_tasks(keys):
            return jax.value_and_grad(outer_loss, has_aux=True)(params, family, keys, **options)

        if plan.tasks == len(keys):
            return of_tasks(keys), particles
        parts = jax.lax.map(of_tasks, keys.reshape(-1, plan.tasks))
        return jax.tree.map(lambda x: jnp.mean(x, 0), parts), particles

    return gradient


def _evolved(outer_loss, strategies):
    """The gradient of the outer loss by evolution strategies."""

    def gradient(params, family, keys, particles, _):
        def loss(params):
            # No backward pass, so little memory is needed if the losses of one step at a time are computed.
            return outer_loss(params, family, keys, steps_at_once=1, differentiable=False)

        return strategies(loss, params, jax.random.fold_in(keys[0], _DIRECTIONS)), particles

    return gradient


def _persistent(learner, num_steps, weights, strategies):
    """The gradient of one window's outer loss by persistent evolution strategies."""
    length, windows = strategies.window, num_steps // strategies.window
    # Scaled so that the mean, not the sum, of the windows' losses is the outer loss of the episode.
    weights = windows * weights.reshape(windows, length)
    scored = Scored(np.arange(length), at_once=1, differentiable=False)

    def gradient(params, family, keys, particles, window):
        def loss(params, carried):
            thetas, states = carried
            part = Part(length, Paused(thetas, states, window * length))
            options = {"num_steps": num_steps, "scored": scored, "part": part}
            losses, carried = losses_of_part(learner, params, family, keys, **options)
            return _weighted(losses, jnp.asarray(weights)[window]), carried

        key = jax.random.fold_in(jax.random.fold_in(keys[0], _DIRECTIONS), window)
        return strategies(loss, params, particles, key, begins=window == 0)

    return gradient


def mean_gradient(of_family, max_norm, params, groups, turns, keys, particles, window):
    """The mean of the meta-gradients `of_family` over the families whose turn it is.

    Args:
      of_family: a `FamilyGradient`.
      max_norm: norm that the meta-gradient of a family is clipped to, or None.
      params: the meta-parameters.
      groups: stacked families.
      turns: of each group, `[families]` bool, or None for all.
      keys: `[families, tasks]` PRNG keys, for each group.
      particles: of each group, with a leading axis `[families]`; `()` without persistent evolution strategies.
      window: `[]` int32, index of the window in its episode.

    Returns:
      `(losses, losses after the last step)` `[families]`, in the order of the groups; the meta-gradient; particles.
    """
    losses, last, after, total = [], [], [], jax.tree.map(jnp.zeros_like, params)
    for group, *inputs in zip(groups, turns, keys, particles, strict=True):

        def taken(member, keys, particles, group=group):
            (of_member, grads), carried = of_family(params, group.member(member), keys, particles, window)
            return (of_member, grads if max_norm is None else _clipped(grads, max_norm)), carried

        def member_gradient(inputs, taken=taken):
            member, turn, *inputs = inputs
            if turn is None:
                return taken(member, *inputs)
            return jax.lax.cond(turn, taken, functools.partial(_left_out, taken), member, *inputs)

        ((group_losses, group_last), grads), carried = jax.lax.map(member_gradient, (group.stacked, *inputs))
        total = jax.tree.map(lambda t, g: t + jnp.sum(g, 0), total, grads)
        losses.append(group_losses)
        last.append(group_last)
        after.append(carried)
    counts = [group.size if turn is None else jnp.sum(turn) for group, turn in zip(groups, turns, strict=True)]
    mean = jax.tree.map(lambda t: t / jnp.asarray(sum(counts), t.dtype), total)
    return (jnp.concatenate(losses), jnp.concatenate(last)), mean, tuple(after)


def _clipped(grads, max_norm):
    """The gradients, or what has the same direction and this norm if theirs is larger."""
    norm = optax.tree.norm(grads)
    return jax.tree.map(lambda g: g * (max_norm / jnp.maximum(norm, max_norm)), grads)


def _left_out(taken, member, keys, particles):
    """What `taken` returns, for a family whose turn it is not: losses of NaN, no gradient, its particles."""
    (of_member, grads), _ = jax.eval_shape(taken, member, keys, particles)
    losses = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), of_member)
    return (losses, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), grads)), particles


def first_particles(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    shape: tuple[int, int],
    strategies: PersistentEvolutionStrategies,
) -> Particles:
    """Returns the particles before the first episode, with zeros for inner states, which the episode replaces.

    Args:
      learner: what is meta-trained.
      params: its meta-parameters.
      family: task family, for the shapes of the inner states.
      shape: `(number of families like this one, tasks per family)`; the former is the leading axis of the result.
      strategies: persistent evolution strategies.
    """

    def inner_state(params, key):
        theta = learner.start(params, family, key)
        return theta, learner.optimizer(params).init(theta)

    num_families, num_tasks = shape
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_tasks))
    particles = strategies.init(params, jax.eval_shape(jax.vmap(inner_state, in_axes=(None, 0)), params, keys))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_families, *x.shape)), particles)


def _weighted(losses, weights):
    """The outer loss, and the loss after the last step, as means over tasks of losses `[T, steps]`."""
    return jnp.mean(losses @ weights.astype(losses.dtype)), jnp.mean(losses[:, -1])
