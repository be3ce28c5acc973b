"""Task families: what a meta-training run draws its episodes from, and what an attack is made of.

How the pieces compose::

    AttackLoss, Constraint                                   what is minimised, what bounds it     `perturbation`
    Augmentation, WaveSearch --AttackRecipe--> oracle, start                                       `recipe`
    images, labels, model --uap_family--> UapFamily          few-shot universal perturbations      `uap`
    SingleImageFamily, SineFamily, ClassificationFamily, QuadraticFamily          other problems, one module each

A family subclasses `lft_jax.TaskFamily`, six methods; `docs/own_tasks.md` shows one in full.
"""

from lft_jax.tasks.augmentation import Augmentation
from lft_jax.tasks.classification import ClassificationFamily, classification_family
from lft_jax.tasks.perturbation import AttackLoss, Batch, Constraint, perturb
from lft_jax.tasks.quadratic import QuadraticFamily
from lft_jax.tasks.recipe import AttackRecipe
from lft_jax.tasks.regression import SineFamily, sine_family
from lft_jax.tasks.single_image import SingleImageFamily, single_image_family
from lft_jax.tasks.uap import UapFamily, uap_family
from lft_jax.tasks.waves import WaveSearch

__all__ = [
    "AttackLoss",
    "AttackRecipe",
    "Augmentation",
    "Batch",
    "ClassificationFamily",
    "Constraint",
    "QuadraticFamily",
    "SineFamily",
    "SingleImageFamily",
    "UapFamily",
    "WaveSearch",
    "classification_family",
    "perturb",
    "sine_family",
    "single_image_family",
    "uap_family",
]
