"""Hand-designed optimizers for perturbations, and the grids that they are tuned over (PROTOCOL 2).

Each is a `Learner` whose `params` are its hyperparameters, traced: a whole grid runs through one compilation. Step
sizes are in units of the constraint's scale (epsilon, for an linf ball), except SGD's, which multiplies raw gradients.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lft_jax import learners
from lft_jax.base import Learner, PyTree
from lft_jax.tasks.perturbation import AttackLoss

#: The losses of the grids: the loss can matter more than the step (PROTOCOL 2).
GRID_LOSSES = (AttackLoss("hinge"), AttackLoss("hinge", kappa=5.0), AttackLoss("cross_entropy"))


class Setting(NamedTuple):
    """One entry of a grid: the hyperparameters, and the loss that is minimised on the support images."""

    params: dict[str, float]
    support_loss: AttackLoss


class Baseline(NamedTuple):
    """A hand-designed optimizer: how it runs, its customary untuned setting, and the grid it is tuned over."""

    learner: Learner
    default: Setting
    grid: tuple[Setting, ...]


def _step_of_scale(direction: optax.GradientTransformation, step, final) -> optax.GradientTransformation:
    """Steps of `step * scale` along `direction`, falling linearly with the progress to `final` times that."""
    direction = optax.with_extra_args_support(direction)

    def update(grads, state, theta=None, *, scale=1.0, progress=0.0, **extra_args):
        updates, state = direction.update(grads, state, theta, **extra_args)
        size = -step * scale * (1 - (1 - final) * progress)
        return jax.tree.map(lambda u: (size * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(direction.init, update)


def projected_gradient(step: float, decay: float = 0.0, final: float = 1.0) -> optax.GradientTransformation:
    """PGD for an linf ball: steps along the sign of the gradient's momentum (the ball is `fine_tune`'s to enforce).

    Args:
      step: in units of the scale.
      decay: of the momentum; 0 for plain PGD.
      final: the last step's size relative to the first's.
    """
    return _step_of_scale(optax.chain(optax.trace(decay), optax.scale_by_sign()), step, final)


def normalized_gradient(step: float, decay: float = 0.0, final: float = 1.0) -> optax.GradientTransformation:
    """PGD for an l2 ball: steps of root mean square `step` (in units of the scale) along the gradient's momentum."""

    def direction(updates, theta=None):
        del theta
        norm = optax.tree.norm(updates)
        rms = norm / optax.tree.size(updates) ** 0.5
        return jax.tree.map(lambda u: u / jnp.where(rms > 0, rms, 1), updates)

    return _step_of_scale(optax.chain(optax.trace(decay), optax.stateless(direction)), step, final)


def adam(step: float, b1: float = 0.9, final: float = 1.0) -> optax.GradientTransformation:
    """Adam with its step in units of the scale."""
    return _step_of_scale(optax.scale_by_adam(b1=b1), step, final)


def adamm(step: float, b1: float = 0.9, final: float = 1.0) -> optax.GradientTransformation:
    """AMSGrad with its step in units of the scale: ZO-AdaMM under zeroth-order gradients (Chen et al. 2019).

    Its projection under a Mahalanobis norm is the plain one for an linf ball, coordinate by coordinate. Both moments
    are corrected for their bias, as optax does it and the authors do not.
    """
    return _step_of_scale(optax.scale_by_amsgrad(b1=b1), step, final)


def sgd(learning_rate: float, decay: float = 0.0) -> optax.GradientTransformation:
    """Plain gradient descent, with momentum if `decay` is not 0."""
    return optax.chain(optax.trace(decay), optax.scale_by_learning_rate(learning_rate))


def _grid(losses, **values) -> tuple[Setting, ...]:
    names = tuple(values)
    return tuple(
        Setting(dict(zip(names, combination, strict=True)), loss)
        for loss in losses
        for combination in itertools.product(*values.values())
    )


@functools.cache
def make_baselines(norm: str) -> dict[str, Baseline]:
    """The baselines of PROTOCOL 2 for a ball or a penalty of the given norm, by name.

    Under zeroth-order gradients "pgd" is ZO-signSGD, "sgd" is ZO-SGD, "adam" is ZO-Adam, and "adamm" is ZO-AdaMM.
    """
    hinge, entropy = GRID_LOSSES[0], GRID_LOSSES[-1]
    steepest = normalized_gradient if norm == "l2" else projected_gradient
    pgd = learners.fixed("pgd", steepest)
    steps, finals = (0.05, 0.1, 0.2, 0.4, 0.8), (1.0, 0.1)
    clamped = tuple(AttackLoss("cross_entropy", beta=beta) for beta in (3.0, 6.0, 12.0, 24.0))
    return {
        "pgd": Baseline(
            pgd,
            Setting({"step": 0.1, "decay": 0.0, "final": 1.0}, hinge),
            _grid(GRID_LOSSES, step=steps, decay=(0.0,), final=finals),
        ),
        "momentum_pgd": Baseline(
            pgd,
            Setting({"step": 0.1, "decay": 0.9, "final": 1.0}, hinge),
            _grid(GRID_LOSSES, step=(0.1, 0.2, 0.4, 0.8), decay=(0.5, 0.9), final=finals),
        ),
        "sgd": Baseline(
            learners.fixed("sgd", sgd),
            Setting({"learning_rate": 0.1, "decay": 0.0}, hinge),
            _grid(GRID_LOSSES, learning_rate=(0.01, 0.1, 1.0, 10.0, 100.0), decay=(0.0, 0.9)),
        ),
        "adam": Baseline(
            learners.fixed("adam", adam),
            Setting({"step": 0.1, "b1": 0.9, "final": 1.0}, hinge),
            _grid(GRID_LOSSES, step=steps, b1=(0.5, 0.9), final=(1.0,)),
        ),
        "adamm": Baseline(
            learners.fixed("adamm", adamm),
            Setting({"step": 0.1, "b1": 0.9, "final": 1.0}, hinge),
            _grid(GRID_LOSSES, step=steps, b1=(0.5, 0.9), final=(1.0,)),
        ),
        "uap_sgd": Baseline(
            pgd,
            Setting({"step": 0.8, "decay": 0.0, "final": 1.0}, entropy),
            _grid(clamped, step=(0.2, 0.4, 0.8), decay=(0.0,), final=finals),
        ),
    }


def from_start(baseline: Baseline, theta: PyTree) -> Baseline:
    """The baseline, started from `theta` instead of the family's start."""
    learner = dataclasses.replace(
        baseline.learner,
        name=f"{baseline.learner.name} from a start",
        start=lambda params, family, key: family.project(theta),
    )
    return baseline._replace(learner=learner)
