"""What the audited model answers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax._bounded import BoundedJit
from lft_jax._present import present
from lft_jax.data import unit_range
from lft_jax.models import Classifier, as_classifier, on_numpy


def has_gradients(model: Any, shape: tuple[int, ...]) -> bool:
    """Whether JAX, or the framework of a `Classifier`, differentiates the model on images `[N, H, W, C]`."""
    if isinstance(model, Classifier) and model.host is not None:
        return model.differentiable
    try:
        function = as_classifier(model)
        jax.eval_shape(jax.grad(lambda x: jnp.sum(function(x))), jax.ShapeDtypeStruct(shape, jnp.float32))
    except Exception:  # a function on NumPy arrays may raise anything
        return False
    return True


class Asked:
    """The model, asked in batches, with the evaluations counted.

    Attributes:
      evaluations: images that it was asked for.
    """

    def __init__(self, model: Any, differentiable: bool, side: int, batch_size: int | None):
        self.classifier = as_classifier(model) if differentiable else on_numpy(model)
        if batch_size is not None:
            self.classifier = dataclasses.replace(self.classifier, batch_size=batch_size)
        self.batch = batch_size or self.classifier.batch_size or (250 if side <= 64 else 50)
        self.evaluations = 0

    def logits(self, images: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """The logits `[N, classes]` of images `[N, H, W, C]` with a perturbation `[H, W, C]`."""
        host, found = self.classifier.host is not None, []
        shape = jax.ShapeDtypeStruct((self.batch, *images.shape[1:]), jnp.float32)
        function = None if host else present(self.classifier.traced(), shape)
        for first in range(0, len(images), self.batch):
            part = images[first : first + self.batch]
            x = np.clip(np.asarray(unit_range(jnp.asarray(part)), np.float32) + theta[None], 0, 1)
            if host:
                found.append(np.asarray(self.classifier(x)))
                continue
            padding = np.zeros((self.batch - len(x), *x.shape[1:]), np.float32)
            found.append(np.asarray(_answer(function, np.concatenate([x, padding])))[: len(x)])
        self.evaluations += len(images)
        return np.concatenate(found).astype(np.float32)


@BoundedJit
def _answer(function, images):
    return function(images)


def confidences(logits: np.ndarray) -> np.ndarray:
    """The softmax `[N]` of the predicted classes, from logits `[N, classes]`."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return 1 / np.exp(shifted).sum(-1)
