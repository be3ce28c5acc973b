"""Imitation: for the first meta-steps, an update rule is trained to match the updates of a hand-designed optimizer."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lft_jax import base
from lft_jax.base import Learner, PyTree


@dataclasses.dataclass(frozen=True)
class Imitation:
    """Imitation of a teacher: for the first meta-steps the outer loss is the distance from its updates.

    Attributes:
      teacher: optimizer that is imitated, with tuned settings (for perturbations see `lft_jax.evaluation.baselines`).
      meta_steps: number of meta-steps, from the first one, at least 1.

    Raises:
      ValueError: if `meta_steps` is below 1.

    References:
      Chen et al. 2020, Training stronger baselines for learning to optimize, arXiv 2010.09089.

    Examples:
      >>> from lft_jax.meta import Stages
      >>> Stages(imitation=Imitation(optax.sgd(0.1), meta_steps=50)).imitation.meta_steps
      50
    """

    teacher: optax.GradientTransformation
    meta_steps: int

    def __post_init__(self):
        base.check_at_least("meta_steps", self.meta_steps, 1)


class ImitationState(NamedTuple):
    """State of an optimizer that imitates a teacher.

    Attributes:
      learner: state of the learner's optimizer.
      teacher: state of the teacher.
      distance: `[]` distance between their latest updates.
    """

    learner: PyTree
    teacher: PyTree
    distance: jax.Array


def imitating(learner: Learner, teacher: optax.GradientTransformation) -> Learner:
    """Returns the learner with another outer loss: the distance of its update from the teacher's, after each step.

    With the updates `u` of the learner and `t` of the teacher, before any projection::

        distance = mean over coordinates of ((u - t) / scale)^2

    The learner's updates are applied. The teacher sees the same optimizees and gradients, and its updates are
    constants in the backward pass. `scale` is the one that the oracle reports, or 1. No derivative of the model is
    taken unless the learner is second-order.

    Args:
      learner: learner of an update rule. One of an initialization alone would learn nothing.
      teacher: any optax transformation.

    Raises:
      ValueError: for a learner without an outer loss (Reptile).
    """
    if learner.objective == "end":
        raise ValueError(f"learner: {learner.name} has no update rule that could imitate a teacher.")
    return dataclasses.replace(
        learner, optimizer=lambda params: _with_teacher(learner.optimizer(params), teacher), objective="teacher"
    )


def _with_teacher(optimizer, teacher):
    """The optimizer, whose state also holds the distance from the teacher's update."""
    optimizer, teacher = (optax.with_extra_args_support(tx) for tx in (optimizer, teacher))

    def init(params):
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(params)))
        return ImitationState(optimizer.init(params), teacher.init(params), zero)

    def update(updates, state, params=None, **extra_args):
        own, learner_state = optimizer.update(updates, state.learner, params, **extra_args)
        taught, teacher_state = jax.lax.stop_gradient(teacher.update(updates, state.teacher, params, **extra_args))
        scale = extra_args.get("scale", 1.0)
        squares = jax.tree.map(lambda u, t: jnp.sum(((u - t) / scale) ** 2), own, taught)
        distance = jnp.asarray(sum(jax.tree.leaves(squares)) / optax.tree.size(own), state.distance.dtype)
        return own, ImitationState(learner_state, teacher_state, distance)

    return optax.GradientTransformationExtraArgs(init, update)
