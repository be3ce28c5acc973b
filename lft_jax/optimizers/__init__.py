"""Optimizers for fine-tuning, learned and hand-designed, and the loop that runs them.

How the pieces compose::

    gradient --features--> inputs --Rule (a recurrent network)--> update        `features`, `rules`
    gradient --periods, weighed by signal to noise--> update                     `spectral`
    (params, rule) --learned_fine_tuner--> optax transformation                 `transform`
    optax transformation --learned_sampler, guided--> optax transformation
        that also sets the covariance of the next random directions             `sampling`
    pgd, adam, ... with steps in units of the feasible set                      `hand_designed`
    steps in the space of perturbations that repeat                             `periodic`
    (optax transformation, oracle, theta) --fine_tune--> Trajectory             `fine_tuning`

All optimizers are `optax.GradientTransformation`s. The rest of the package does not distinguish learned ones from
hand-designed ones.
"""

from lft_jax.optimizers.fine_tuning import Part, Paused, fine_tune, fine_tune_step
from lft_jax.optimizers.hand_designed import adam, adamm, normalized_gradient, projected_gradient, sgd
from lft_jax.optimizers.periodic import periodic, periodic_descent, shrink_periods
from lft_jax.optimizers.rules import (
    MomentumUpdate,
    Rule,
    UpdateRule,
    coordinate_lstm,
    rule_from_dict,
    rule_to_dict,
    spatial_lstm,
)
from lft_jax.optimizers.sampling import guided, learned_sampler
from lft_jax.optimizers.spectral import SpectralRule, spectral_lstm
from lft_jax.optimizers.transform import LearnedFineTunerState, learned_fine_tuner

__all__ = [
    "LearnedFineTunerState",
    "MomentumUpdate",
    "Part",
    "Paused",
    "Rule",
    "SpectralRule",
    "UpdateRule",
    "adam",
    "adamm",
    "coordinate_lstm",
    "fine_tune",
    "fine_tune_step",
    "guided",
    "learned_fine_tuner",
    "learned_sampler",
    "normalized_gradient",
    "periodic",
    "periodic_descent",
    "projected_gradient",
    "rule_from_dict",
    "rule_to_dict",
    "sgd",
    "shrink_periods",
    "spatial_lstm",
    "spectral_lstm",
]
