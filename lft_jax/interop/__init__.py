"""Exchange with other libraries of attacks and defences, and perturbations in their files.

How the modules compose::

    estimator of ART --from_art--> lft_jax.models.Classifier                                      `art_attack`
    estimator of ART --art_attack--> EvasionAttack: generate(x, y), noise, fooling_rate           `art_attack`
    foolbox_attack() --> FixedEpsilonAttack: attack(fmodel, inputs, criterion, epsilons=...)      `foolbox_attack`
    torch module --torchattacks_attack--> torchattacks.Attack: atk(images, labels)                `torchattacks_attack`
    perturbation --save_perturbation--> .npy, .pt, .png --load_perturbation--> perturbation       `perturbation_files`

Their images may have channels first and any range; epsilons and norms are those of each library. The libraries are
imported inside the functions, never by `import lft_jax`.
"""

from lft_jax.interop.art_attack import art_attack, from_art
from lft_jax.interop.foolbox_attack import foolbox_attack
from lft_jax.interop.perturbation_files import load_perturbation, save_perturbation
from lft_jax.interop.torchattacks_attack import torchattacks_attack

__all__ = [
    "art_attack",
    "foolbox_attack",
    "from_art",
    "load_perturbation",
    "save_perturbation",
    "torchattacks_attack",
]
