"""Task families, and the parts of a universal attack.

How the modules fit together::

    AttackLoss, Constraint                                   the loss and the bound of a perturbation   `perturbation`
    Augmentation or Proxies, PatternSearch or WaveSearch --AttackRecipe--> oracle, start                `recipe`
    PatternAttack --model, labels--> a perturbation          an attack by queries alone                 `pattern_attack`
    key --synthetic_images--> images                         support images where there are none        `synthetic`
    images, labels, model --uap_family--> UapFamily          few-shot universal perturbations           `uap`
    SingleImageFamily, SineFamily, ClassificationFamily, QuadraticFamily       other problems, one module each

A family subclasses `lft_jax.TaskFamily` and implements its six abstract methods; see `docs/own_tasks.md`.
"""

from lft_jax.tasks.augmentation import Augmentation
from lft_jax.tasks.classification import ClassificationFamily, classification_family
from lft_jax.tasks.pattern_attack import PatternAttack
from lft_jax.tasks.patterns import PatternSearch
from lft_jax.tasks.perturbation import AttackLoss, Batch, Constraint, perturb
from lft_jax.tasks.proxies import Proxies
from lft_jax.tasks.quadratic import QuadraticFamily
from lft_jax.tasks.recipe import AttackRecipe
from lft_jax.tasks.regression import SineFamily, sine_family
from lft_jax.tasks.single_image import SingleImageFamily, single_image_family
from lft_jax.tasks.synthetic import synthetic_images
from lft_jax.tasks.uap import UapFamily, uap_family
from lft_jax.tasks.waves import WaveSearch

__all__ = [
    "AttackLoss",
    "AttackRecipe",
    "Augmentation",
    "Batch",
    "ClassificationFamily",
    "Constraint",
    "PatternAttack",
    "PatternSearch",
    "Proxies",
    "QuadraticFamily",
    "SineFamily",
    "SingleImageFamily",
    "UapFamily",
    "WaveSearch",
    "classification_family",
    "perturb",
    "sine_family",
    "single_image_family",
    "synthetic_images",
    "uap_family",
]
