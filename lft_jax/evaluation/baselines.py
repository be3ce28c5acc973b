"""Hand-designed baselines, and the grids that they are tuned over (docs/protocol.md).

Each baseline is a `Learner` whose `params` are its hyperparameters. They are traced, so a whole grid shares one
compilation. Step sizes are in units of the constraint's scale (epsilon for an linf ball), except for the learning rate
of SGD, which multiplies raw gradients.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

from lft_jax.base import Learner, PyTree
from lft_jax.meta import learners
from lft_jax.optimizers.hand_designed import adam, adamm, normalized_gradient, projected_gradient, sgd
from lft_jax.tasks.perturbation import AttackLoss

#: The losses that grids try; the choice of the loss can matter more than that of the step size.
GRID_LOSSES = (AttackLoss("hinge"), AttackLoss("hinge", kappa=5.0), AttackLoss("cross_entropy"))


class Setting(NamedTuple):
    """One entry of a grid.

    Attributes:
      params: hyperparameters of the optimizer, by name.
      support_loss: the loss that is minimized on the support images.
    """

    params: dict[str, float]
    support_loss: AttackLoss


class Baseline(NamedTuple):
    """A hand-designed optimizer for comparison.

    Attributes:
      learner: runs the optimizer; its `params` are the hyperparameters.
      default: the customary untuned setting.
      grid: the settings to tune over.
    """

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
    """The baselines for a ball or a penalty, with their grids.

    With zeroth-order gradients "pgd" is ZO-signSGD, "sgd" is ZO-SGD, "adam" is ZO-Adam and "adamm" is ZO-AdaMM.

    Args:
      norm: "linf", "l2" or "l1". For "l2" PGD steps along the normalized gradient, else along its sign.

    Returns:
      `{name: Baseline}`.

    Examples:
      >>> baselines = make_baselines("linf")
      >>> sorted(baselines)
      ['adam', 'adamm', 'momentum_pgd', 'pgd', 'sgd', 'uap_sgd']
      >>> baselines["pgd"].default.params, len(baselines["pgd"].grid)
      ({'step': 0.1, 'decay': 0.0, 'final': 1.0}, 30)

    References:
      ZO-AdaMM: Chen et al. 2019, arXiv 1910.06513. UAP-SGD: Shafahi et al. 2020, arXiv 1811.11304.
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
    """The same baseline with the start `theta`, projected, instead of the family's own."""
    learner = dataclasses.replace(
        baseline.learner,
        name=f"{baseline.learner.name} from a start",
        start=lambda params, family, key: family.project(theta),
    )
    return baseline._replace(learner=learner)
