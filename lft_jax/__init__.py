"""Learned fine-tuners for incongruous few-shot learning, and the universal perturbations that they make.

How the packages compose::

    optimizers   what steps: learned rules as optax transformations, hand-designed ones, the fine-tuning loop
    oracles      gradients of a loss, exact or from evaluations alone, and what they cost
    data, tasks  image sources; task families, above all universal perturbations
    meta         what is meta-learned, from which outer loss, by which meta-gradient; runs on disk
    evaluation   metrics over tasks, baselines, the comparison table
    victims      classifiers to meta-train against
    models       adapters: a classifier of any framework
    pretrained   shipped rules
    attack       `universal_perturbation` of your own model
    auditing     `audit`: many such attacks, and a page that says what they found
    defence      training against such perturbations
    interop      attacks of other libraries, perturbations in files
    cli          the console scripts `lft-attack` and `lft-audit`

What is listed in an `__all__` is public, all else is private.
"""

import warnings
from typing import Any

from lft_jax import defence, interop, models
from lft_jax._version import __version__
from lft_jax.attack import UniversalPerturbation, attack_success_rate, fooling_rate, universal_perturbation
from lft_jax.auditing import AuditBudget, AuditReport, audit
from lft_jax.base import Episode, Estimate, Learner, Oracle, TaskFamily, Trajectory
from lft_jax.interop import load_perturbation, save_perturbation
from lft_jax.meta import (
    EvolutionStrategies,
    Imitation,
    MetaState,
    MetaTrainer,
    PersistentEvolutionStrategies,
    Stages,
    Unroll,
    clipped_adam,
    learners,
    meta_trainer,
)
from lft_jax.optimizers import (
    LearnedFineTunerState,
    MomentumUpdate,
    Rule,
    coordinate_lstm,
    fine_tune,
    fine_tune_step,
    learned_fine_tuner,
    spatial_lstm,
    spectral_lstm,
)
from lft_jax.oracles import ZerothOrder, zeroth_order_value_and_grad
from lft_jax.pretrained import list_pretrained, load_pretrained
from lft_jax.tasks import (
    AttackLoss,
    AttackRecipe,
    Augmentation,
    Constraint,
    PatternAttack,
    PatternSearch,
    Proxies,
    UapFamily,
    WaveSearch,
    uap_family,
)

__all__ = [
    "AttackLoss",
    "AttackRecipe",
    "AuditBudget",
    "AuditReport",
    "Augmentation",
    "Constraint",
    "Episode",
    "Estimate",
    "EvolutionStrategies",
    "Imitation",
    "LearnedFineTunerState",
    "Learner",
    "MetaState",
    "MetaTrainer",
    "MomentumUpdate",
    "Oracle",
    "PatternAttack",
    "PatternSearch",
    "PersistentEvolutionStrategies",
    "Proxies",
    "Rule",
    "Stages",
    "TaskFamily",
    "Trajectory",
    "UapFamily",
    "UniversalPerturbation",
    "Unroll",
    "WaveSearch",
    "ZerothOrder",
    "__version__",
    "attack_success_rate",
    "audit",
    "clipped_adam",
    "coordinate_lstm",
    "defence",
    "fine_tune",
    "fine_tune_step",
    "fooling_rate",
    "interop",
    "learned_fine_tuner",
    "learners",
    "list_pretrained",
    "load_perturbation",
    "load_pretrained",
    "meta_trainer",
    "models",
    "save_perturbation",
    "spatial_lstm",
    "spectral_lstm",
    "uap_family",
    "universal_perturbation",
    "zeroth_order_value_and_grad",
]

_RENAMED = {"MomentumStart": "MomentumUpdate"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"lft_jax.{name} is now lft_jax.{_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
        return globals()[_RENAMED[name]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
