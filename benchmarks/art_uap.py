"""Universal perturbations by the Adversarial Robustness Toolbox (ART), with counts of image evaluations."""

import importlib.metadata
import random
import time

import numpy as np
import torch
from art.attacks.evasion import UniversalPerturbation
from art.estimators.classification import PyTorchClassifier
from torch import nn

from benchmarks.torch_w1 import LeNet


def versions() -> dict[str, str]:
    """Versions of PyTorch and ART."""
    return {name: importlib.metadata.version(name) for name in ("torch", "adversarial-robustness-toolbox")}


def contestants(victim, epsilon: float, steps: int, limit: float) -> dict:
    """Attacks by ART: `{name: attack}`.

    Args:
      victim: a stored LeNet.
      epsilon: radius of the linf ball.
      steps: steps of PGD per image in the attack with one pass, which then takes at most as many gradients as ours.
      limit: seconds after which an attack is stopped.

    Returns:
      Functions `(images, labels) -> (perturbation, forward, backward)`. The perturbation is None if the attack was
      stopped; forward and backward are numbers of image evaluations.
    """
    model = LeNet(victim.variables, torch.float32)
    counts, deadline = {"forward": 0, "backward": 0}, time.monotonic()

    def on_forward(module, inputs, output):
        if time.monotonic() > deadline:
            raise TimeoutError
        counts["forward"] += len(output)
        if output.requires_grad:
            output.register_hook(lambda grad: counts.update(backward=counts["backward"] + len(grad)))

    model.register_forward_hook(on_forward)
    classifier = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, *victim.card["image_shape"][:2]),
        nb_classes=victim.card["num_classes"],
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )

    def make(attacker, inner, **outer):
        inner = {"verbose": False, **inner}

        def attack(images, labels):
            nonlocal deadline
            del labels  # by default ART uses the predictions of the model
            counts.update(forward=0, backward=0)
            deadline = time.monotonic() + limit
            random.seed(0)  # the order of the images
            art = UniversalPerturbation(
                classifier, attacker=attacker, attacker_params=inner, eps=epsilon, norm=np.inf, verbose=False, **outer
            )
            try:
                art.generate(np.moveaxis(images, -1, 1))
            except TimeoutError:
                return None, counts["forward"], counts["backward"]
            return np.moveaxis(art.noise[0], 0, -1), counts["forward"], counts["backward"]

        return attack

    ball = {"eps": epsilon}
    return {
        "ART, DeepFool inside, defaults": make("deepfool", {}),
        "ART, PGD inside, defaults": make("pgd", ball),
        "ART, DeepFool inside, one pass": make("deepfool", {}, max_iter=1),
        "ART, PGD inside, one pass": make("pgd", {**ball, "eps_step": epsilon / 10, "max_iter": steps}, max_iter=1),
    }
