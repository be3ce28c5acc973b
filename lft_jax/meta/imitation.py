"""Imitation: an update rule learns at first what a hand-made optimizer would do, from a dense signal at every step."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lft_jax import base
from lft_jax.base import Learner, PyTree


@dataclasses.dataclass(frozen=True)
class Imitation:
    """The first meta-steps of a run, in which the outer loss is the distance from a teacher's updates.

    Attributes:
      teacher: the optimizer that is imitated, of tuned settings (for perturbations see `lft_jax.evaluation.baselines`).
      meta_steps: how many of the run's first meta-steps, at least 1.

    References:
      Chen et al. 2020, Training stronger baselines for learning to optimize.
    """

    teacher: optax.GradientTransformation
    meta_steps: int

    def __post_init__(self):
        base.check_at_least("meta_steps", self.meta_steps, 1)


class ImitationState(NamedTuple):
    """The states of a learner's optimizer and of its teacher, and `[]`, the distance of their latest updates."""

    learner: PyTree
    teacher: PyTree
    distance: jax.Array


def imitating(learner: Learner, teacher: optax.GradientTransformation) -> Learner:
    """The learner, whose outer loss after each step is how far its update was from the teacher's.

    The learner leads: the teacher is shown the same optimizees and gradients, and what it would do is a constant.
    The distance is the mean over coordinates of the squared difference of the two updates, before any projection, in
    units of the scale that the oracle tells (1 if none). No derivative of the model is taken unless the learner is
    second-order.

    Args:
      learner: of an update rule; an initialization alone learns nothing from it.
      teacher: any optax transformation.

    Raises:
      ValueError: for a learner without an outer loss (Reptile).
    """
    if learner.objective == "end":
        raise ValueError(f"learner: {learner.name} has no update rule that could imitate one.")
    return dataclasses.replace(
        learner, optimizer=lambda params: _beside(learner.optimizer(params), teacher), objective="teacher"
    )


def _beside(optimizer, teacher):
    optimizer, teacher = (optax.with_extra_args_support(tx) for tx in (optimizer, teacher))

    def init(theta):
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(theta)))
        return ImitationState(optimizer.init(theta), teacher.init(theta), zero)

    def update(grads, state, theta=None, **extra_args):
        updates, of_learner = optimizer.update(grads, state.learner, theta, **extra_args)
        taught, of_teacher = jax.lax.stop_gradient(teacher.update(grads, state.teacher, theta, **extra_args))
        scale = extra_args.get("scale", 1.0)
        squares = jax.tree.map(lambda u, t: jnp.sum(((u - t) / scale) ** 2), updates, taught)
        distance = sum(jax.tree.leaves(squares)) / optax.tree.size(updates)
        return updates, ImitationState(of_learner, of_teacher, distance.astype(state.distance.dtype))

    return optax.GradientTransformationExtraArgs(init, update)
