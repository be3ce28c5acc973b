"""Victims: image classifiers to be attacked, their training and their store."""

from lft_jax.victims.models import MODELS, build_model
from lft_jax.victims.store import Victim, load_victim, save_victim
from lft_jax.victims.training import (
    AUGMENTATIONS,
    EpochRecord,
    VictimConfig,
    apply_function,
    clean_accuracy,
    train_victim,
)

__all__ = [
    "AUGMENTATIONS",
    "MODELS",
    "EpochRecord",
    "Victim",
    "VictimConfig",
    "apply_function",
    "build_model",
    "clean_accuracy",
    "load_victim",
    "save_victim",
    "train_victim",
]
