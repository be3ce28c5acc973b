"""One task fine-tuned, and the outer loss of it: what meta-training, evaluation and theory have in common."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import base
from lft_jax.base import Episode, Learner, PyTree, TaskFamily, Trajectory
from lft_jax.optimizers.fine_tuning import Paused, fine_tune

STEP_WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uniform": np.ones_like,
    "linear": lambda k: k,
    "final": lambda k: (k == k[-1]).astype(k.dtype),
}


_WARM = 1  # folded into the key of the start


def step_weights(name: str, num_steps: int) -> np.ndarray:
    """`[K]`, the outer loss' weights w_k, summing to 1: "uniform", "linear" (w_k ~ k) or "final"."""
    base.check_at_least("num_steps", num_steps, 1)
    weights = STEP_WEIGHTS[base.check_name("weights", name, STEP_WEIGHTS)](np.arange(1.0, num_steps + 1))
    return weights / weights.sum()


def run_task(
    learner: Learner, params: PyTree, family: TaskFamily, key: jax.Array, *, num_steps: int, **options: Any
) -> tuple[Episode, Trajectory]:
    """Samples one task and fine-tunes on its support set: what meta-training and evaluation have in common.

    The options are those of `fine_tune`: `remat`, `window`, `paused`, `length`, `watch`. The trajectory's queries hold
    those of a family's warm start and of a learner's adaptation.
    """
    key_sample, key_start, key_tune = jax.random.split(key, 3)
    episode = family.sample(key_sample)

    def warm(start, paused):
        def begun(start):
            start, queries = family.warm_start(start, episode.support, jax.random.fold_in(key_start, _WARM))
            return start, jnp.asarray(queries, jnp.int32)

        if paused is None:
            return begun(start)
        return jax.lax.cond(paused.done > 0, lambda start: (start, jnp.int32(0)), begun, start)

    def tuned(params, key, **options):
        start = learner.start(params, family, key_start)
        start, queries = warm(start, options.get("paused"))
        trajectory = fine_tune(
            learner.optimizer(params),
            family.oracle(episode.support),
            start,
            key,
            num_steps=num_steps,
            project=family.project,
            **options,
        )
        return trajectory._replace(queries=trajectory.queries + queries)

    def support_loss(params, key):
        trajectory = tuned(params, key)
        losses = jax.lax.map(lambda theta: family.loss(theta, episode.support), trajectory.thetas)
        # Judging a step's optimizee costs as much as the step.
        return jnp.mean(losses), 2 * trajectory.queries[-1]

    used, keys_adaptation = 0, ()
    if learner.adaptation_steps:  # the split comes first, so that no key serves an adaptation and a step
        key_tune, key_adaptation = jax.random.split(key_tune)
        keys_adaptation = jax.random.split(key_adaptation, learner.adaptation_steps)
    for key_adapt in keys_adaptation:
        grads, queries = jax.grad(support_loss, has_aux=True)(jax.lax.stop_gradient(params), key_adapt)
        # First order: the gradient is a constant, as in first-order MAML.
        params = jax.tree.map(lambda p, g: p - learner.adaptation_rate * jax.lax.stop_gradient(g), params, grads)
        used += queries
    trajectory = tuned(params, key_tune, second_order=learner.second_order, **options)
    return episode, trajectory._replace(queries=trajectory.queries + used)


def outer_losses(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    keys: jax.Array,
    *,
    num_steps: int,
    steps: np.ndarray,
    remat: bool = False,
    window: int | None = None,
    steps_at_once: int | None = None,
    differentiable: bool = True,
) -> jax.Array:
    """`[T, len(steps)]`, the loss that the learner's objective asks for after each of `steps`, of `T` tasks.

    Tasks and steps are scored in batched calls after the scan, `steps_at_once` (all if None) steps of all tasks each:
    with constant inner gradients only the recurrence is differentiated through time. The gradient with respect to each
    optimizee is taken at once and kept instead of what it was computed from, so this can be differentiated once only;
    if not `differentiable` it is not taken at all.
    """
    options = {"remat": remat, "window": window, "steps_at_once": steps_at_once, "differentiable": differentiable}
    return losses_of_part(learner, params, family, keys, num_steps=num_steps, steps=steps, **options)[0]


def losses_of_part(
    learner: Learner,
    params: PyTree,
    family: TaskFamily,
    keys: jax.Array,
    *,
    num_steps: int,
    steps: np.ndarray,
    paused: Paused | None = None,
    length: int | None = None,
    steps_at_once: int | None = None,
    differentiable: bool = True,
    **options: Any,
) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
    """`outer_losses` of a part of the tasks' K steps, and what the next part goes on from.

    Args:
      learner, params, family, keys, num_steps, steps_at_once, differentiable: as of `outer_losses`.
      steps: numbers of steps within the part.
      paused: as of `fine_tune`, `theta` and `state` with a leading axis `[T]`.
      length: steps of the part, as of `fine_tune`.
      **options: `remat` and `window` of `fine_tune`.

    Returns:
      `[T, len(steps)]`, and the optimizees and the optimizer's states at the end of the part, with leading axes `[T]`.
    """
    loss = functools.partial(_loss_and_its_gradient, family.loss) if differentiable else family.loss
    imitates = learner.objective == "teacher"
    if imitates:
        options["watch"] = lambda state: state.distance

    def task(key, paused):
        return run_task(learner, params, family, key, num_steps=num_steps, paused=paused, length=length, **options)

    axes = (0, None if paused is None else Paused(0, 0, None))
    episodes, trajectories = jax.vmap(task, in_axes=axes)(keys, paused)
    stopped = jax.tree.map(lambda x: x[:, -1], trajectories.thetas), trajectories.state
    if imitates:
        return trajectories.watched[:, steps], stopped
    data = episodes.query if learner.objective == "query" else episodes.support
    if learner.objective == "end":
        start = learner.start(params, family, keys[0])
        # The projection moves the start, but is not differentiated: its derivative is not 1 beyond the ball's border.
        start = jax.tree.map(lambda p, s: p + jax.lax.stop_gradient(s - p), params, start)
        distances = _distances_to_the_end(start, trajectories.thetas)
        return jnp.broadcast_to(distances[:, None], (len(keys), len(steps))), stopped
    thetas = jax.tree.map(lambda x: jnp.moveaxis(x[:, steps], 1, 0), trajectories.thetas)

    def scored(thetas):
        return jax.vmap(loss)(thetas, data)

    return jax.lax.map(scored, thetas, batch_size=steps_at_once or len(steps)).T, stopped


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
