"""Learned fine-tuners for incongruous few-shot learning, and the universal perturbations that they craft."""

from lft_jax.attack import UniversalPerturbation, attack_success_rate, universal_perturbation
from lft_jax.base import Episode, Estimate, Learner, Oracle, TaskFamily, Trajectory
from lft_jax.meta import learners
from lft_jax.meta.evolution import EvolutionStrategies, PersistentEvolutionStrategies
from lft_jax.meta.imitation import Imitation
from lft_jax.meta.trainer import MetaState, MetaTrainer, clipped_adam, meta_trainer
from lft_jax.optimizers.fine_tuning import fine_tune, fine_tune_step
from lft_jax.optimizers.rules import MomentumUpdate, Rule, coordinate_lstm, spatial_lstm
from lft_jax.optimizers.transform import LearnedFineTunerState, learned_fine_tuner
from lft_jax.oracles import zeroth_order_value_and_grad
from lft_jax.pretrained import list_pretrained, load_pretrained
from lft_jax.tasks import AttackLoss, AttackRecipe, Augmentation, Constraint, UapFamily, WaveSearch, uap_family

__all__ = [
    "AttackLoss",
    "AttackRecipe",
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
    "PersistentEvolutionStrategies",
    "Rule",
    "TaskFamily",
    "Trajectory",
    "UapFamily",
    "UniversalPerturbation",
    "WaveSearch",
    "attack_success_rate",
    "clipped_adam",
    "coordinate_lstm",
    "fine_tune",
    "fine_tune_step",
    "learned_fine_tuner",
    "learners",
    "list_pretrained",
    "load_pretrained",
    "meta_trainer",
    "spatial_lstm",
    "uap_family",
    "universal_perturbation",
    "zeroth_order_value_and_grad",
]
