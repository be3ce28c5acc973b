"""Hand-designed optimizers for perturbations, and the grids that they are tuned over (PROTOCOL 2).

Each is a `Learner` whose `params` are its hyperparameters, traced: a whole grid runs through one compilation. Step
sizes are in units of the constraint's scale (epsilon, for an linf ball), except SGD's, which multiplies raw gradients.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

from lft_jax.base import Learner, PyTree
from lft_jax.meta import learners
from lft_jax.optimizers.hand_designed import adam, adamm, normalized_gradient, projected_gradient, sgd
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
