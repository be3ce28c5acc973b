"""Torchattacks: our attack as one of its `Attack`s."""

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lft_jax import base
from lft_jax.attack import universal_perturbation
from lft_jax.models import from_torch
from lft_jax.models._frameworks import required

_NORMS = {"Linf": "linf", "L2": "l2"}
#: Its own requirements would replace requests by a version of 2020.
_INSTALL = "pip install --no-deps torchattacks, and torch, torchvision, scipy and tqdm"


def torchattacks_attack(
    model: Any,
    *,
    eps: float = 8 / 255,
    norm: str = "Linf",
    steps: int = 20,
    batch_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """`lft_jax.universal_perturbation` as an `Attack` of Torchattacks.

    `adv_images = atk(images, labels)`, as with every attack of Torchattacks: tensors `[N, C, H, W]` in [0, 1], or
    normalized after `atk.set_normalization_used(mean, std)`. One perturbation is made from all images and added to all
    of them; `atk.result` is its `lft_jax.UniversalPerturbation`, to be added to unseen images. It goes into a
    `torchattacks.MultiAttack`, too.

    Args:
      model: a `torch.nn.Module` of images `[N, C, H, W]` in [0, 1], or normalized ones, that returns logits.
      eps: radius of the ball, in units of the image range [0, 1]; above 0.
      norm: "Linf" or "L2".
      steps: steps of the attack.
      batch_size: largest number of images in one call of the model, or None for no limit.
      settings: further arguments of `lft_jax.universal_perturbation`: `{"target": 3, "key": jax.random.key(1)}`.

    Returns:
      The attack.

    Raises:
      ModuleNotFoundError: if torch or Torchattacks is not installed.
      TypeError: for settings that are arguments of this function.
      ValueError: for arguments out of range, and as `lft_jax.universal_perturbation`.

    Examples:
      With Torchattacks installed::

        atk = lft_jax.interop.torchattacks_attack(module, eps=8 / 255)
        adv_images = atk(images, labels)

    References:
      Kim 2020, Torchattacks, arXiv 2010.01950.
    """
    with required("torch", "torch"):
        import torch  # noqa: F401
    try:
        importlib.import_module("torchattacks")
    except ModuleNotFoundError as error:
        missing = (error.name or "torchattacks").partition(".")[0]
        raise ModuleNotFoundError(f"{missing} is not installed: {_INSTALL}.", name=missing) from error

    base.check_positive("eps", eps)
    base.check_name("norm", norm, _NORMS)
    base.check_at_least("steps", steps, 1)
    taken = {"norm", "epsilon", "constraint", "steps", "batch_size", "shape"}
    wrong = sorted(taken & set(settings or {}))
    if wrong:
        raise TypeError(f"settings: {', '.join(wrong)} cannot be set here; see eps, norm and steps.")
    return _torchattacks_class()(model, eps, norm, steps, batch_size, dict(settings or {}))


@functools.cache
def _torchattacks_class():
    """The class of attacks, which derives from that of Torchattacks."""
    import torch

    attack: Any = importlib.import_module("torchattacks.attack")

    class LearnedUniversalPerturbation(attack.Attack):
        """See `lft_jax.interop.torchattacks_attack`."""

        def __init__(self, model, eps, norm, steps, batch_size, settings):
            super().__init__("LearnedUniversalPerturbation", model)
            self.eps, self.norm, self.steps = eps, norm, steps
            self._batch_size, self._result = batch_size, None
            # Attack.__setattr__ compares the values of a dictionary, which arrays and keys refuse.
            object.__setattr__(self, "_settings", settings)

        @property
        def result(self):
            """The `lft_jax.UniversalPerturbation` of the last call; None before."""
            return self._result

        def forward(self, inputs, labels=None):
            """The inputs, `[N, C, H, W]` in [0, 1], with one perturbation made from all of them."""
            images = inputs.clone().detach().to(self.device)
            given = {} if self._normalization_applied is None else self.normalization_used
            channels = {name: value.flatten().tolist() for name, value in given.items()}
            x = images.float().cpu().numpy().transpose(0, 2, 3, 1)
            found = universal_perturbation(
                from_torch(self.model, **channels),
                np.ascontiguousarray(x),
                None if labels is None else labels.detach().cpu().numpy(),
                norm=_NORMS[self.norm],
                epsilon=self.eps,
                steps=self.steps,
                batch_size=self._batch_size,
                **{"progress": False, **self._settings},
            )
            self._result = found
            noise = torch.from_numpy(np.array(found.perturbation.transpose(2, 0, 1), order="C"))
            return torch.clamp(images + noise.to(images), 0, 1).detach()

    return LearnedUniversalPerturbation
