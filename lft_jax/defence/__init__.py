"""Classifiers that withstand universal perturbations: adversarial training with a learned attack inside.

How the pieces compose::

    minibatch, weights --search of a start, every K minibatches--> perturbation                  `hardening`
    part of the minibatch --gradient, learned rule--> next perturbation                          `hardening`
    minibatch, that part perturbed --gradient, optax--> next weights                             `hardening`
    all of these in one scan over minibatches, for each epoch --harden--> Hardened               `hardening`

The result is to be measured with fresh attacks: `lft_jax.universal_perturbation` of several kinds, on images that
training has not seen.
"""

from lft_jax.defence.hardening import Hardened, Hardening, harden

__all__ = ["Hardened", "Hardening", "harden"]
