"""Victims: small image classifiers to attack and to meta-train against, their training, and their storage.

How the pieces compose::

    architecture, num_classes --build_model--> flax module                                       `models`
    VictimConfig, ImageSource (train, validation) --train_victim--> variables, training curve    `training`
    Victim (variables, card) --save_victim--> directory --load_victim--> Victim                  `store`
    Victim.logits_fn, images, labels --clean_accuracy--> fraction correct                        `training`
    norm, source --default_epsilon--> radius of the attack                                       `radii`

A new architecture is a flax module of images `[N, H, W, C]` in [0, 1] to logits, and an entry in `models.MODELS`.
"""

from lft_jax.victims.models import MODELS, build_model
from lft_jax.victims.radii import DEFAULT_EPSILON, default_epsilon
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
    "DEFAULT_EPSILON",
    "MODELS",
    "EpochRecord",
    "Victim",
    "VictimConfig",
    "apply_function",
    "build_model",
    "clean_accuracy",
    "default_epsilon",
    "load_victim",
    "save_victim",
    "train_victim",
]
