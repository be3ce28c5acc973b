"""Success rates of a perturbation on given images."""

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from lft_jax import base
from lft_jax._deprecation import renamed
from lft_jax.attack import _checks
from lft_jax.data import unit_range
from lft_jax.models import on_numpy
from lft_jax.tasks.perturbation import AttackLoss, perturb


@renamed(logits_fn="model")
def attack_success_rate(
    model: Any,
    images: Shaped[Array | np.ndarray, "N H W C"],
    labels: Integer[Array | np.ndarray, " N"],
    perturbation: Float[Array | np.ndarray, "H W C"],
    *,
    target: int | None = None,
    batch_size: int | None = None,
) -> float:
    """The attack success rate (ASR) of a perturbation.

    Of the images that are classified correctly when clean, the share that is misclassified when perturbed.

    Args:
      model: a `lft_jax.models.Classifier`, or any function of NumPy images `[N, H, W, C]` in [0, 1] that returns logits
        `[N, classes]`.
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` integers from 0, the true classes.
      perturbation: `[H, W, C]`, added to every image; the sum is clipped to [0, 1].
      target: count images that are classified as this class, instead of all misclassified ones; images of the class
        itself are left out.
      batch_size: number of images per call of the model, which the last call is filled up to if there are several (not
        that of an HTTP service, where each image counts); None for 256.

    Returns:
      The success rate in [0, 1]; NaN if no image is classified correctly when clean.

    Raises:
      TypeError: for a target that is no integer, or a perturbation that is no floating-point array.
      ValueError: for images outside [0, 1] or with channels first, labels or a target that are no classes of the model,
        a perturbation of another shape than the images, or a `batch_size` below 1.

    Warns:
      UserWarning: for NaN among the logits, which never counts as success; if the clean accuracy is no better than
        chance; if the model seems to return probabilities.

    Examples:
      Adding 0.5 makes a threshold on the mean brightness return class 1 for every image:

      >>> model = lambda x: np.stack([np.full(len(x), 0.5), np.mean(x, (1, 2, 3))], 1)
      >>> images = np.full((4, 2, 2, 1), 0.25, np.float32)
      >>> attack_success_rate(model, images, np.zeros(4, int), np.full((2, 2, 1), 0.5))
      1.0
    """
    _checks.check_target(target)
    images = _checks.checked_images(images, labels)
    labels, loss = np.asarray(labels), AttackLoss(target=target)
    clean, attacked = _logits(model, images, perturbation, batch_size)
    _checks.check_clean(clean, labels, images)
    loss.check(clean.shape[-1])
    counted = np.argmax(clean, -1) == labels
    counted = counted if target is None else counted & (labels != target)
    success = np.asarray(loss.success(jnp.asarray(attacked), jnp.asarray(labels, jnp.int32)))
    return _share(success[counted])


def fooling_rate(
    model: Any,
    images: Shaped[Array | np.ndarray, "N H W C"],
    perturbation: Float[Array | np.ndarray, "H W C"],
    *,
    batch_size: int | None = None,
) -> float:
    """The fooling rate of a perturbation: the share of the images whose predicted class changes. It needs no labels.

    Args:
      model: as for `attack_success_rate`.
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      perturbation: `[H, W, C]`, added to every image; the sum is clipped to [0, 1].
      batch_size: as for `attack_success_rate`.

    Returns:
      The rate in [0, 1].

    Raises:
      TypeError, ValueError: as `attack_success_rate`.

    Examples:
      >>> model = lambda x: np.stack([np.full(len(x), 0.5), np.mean(x, (1, 2, 3))], 1)
      >>> images = np.full((4, 2, 2, 1), [[[[0.25]]], [[[0.75]]], [[[0.75]]], [[[0.75]]]], np.float32)
      >>> fooling_rate(model, images, np.full((2, 2, 1), 0.5))
      0.25

    References:
      Moosavi-Dezfooli et al. 2017, arXiv 1610.08401, section 3.
    """
    clean, attacked = _logits(model, _checks.checked_images(images), perturbation, batch_size)
    return _share(np.asarray(AttackLoss().success(jnp.asarray(attacked), jnp.argmax(jnp.asarray(clean), -1))))


def _share(hits):
    return float(np.mean(hits)) if len(hits) else float("nan")


def _logits(model, images, perturbation, batch_size):
    """The logits `[N, classes]` of clean and of perturbed images."""
    if hasattr(perturbation, "perturbation"):
        raise TypeError("perturbation must be an array; pass that of the result, result.perturbation.")
    theta = np.asarray(perturbation)
    if theta.shape != images.shape[1:]:
        raise ValueError(f"perturbation must be {images.shape[1:]}, got {theta.shape}.")
    if theta.dtype.kind in "iub":
        raise TypeError(f"perturbation must be floating-point, in units of the image range, got {theta.dtype}.")
    if not np.all(np.isfinite(perturbation)):
        raise ValueError("perturbation must be finite, got NaN or infinite values.")
    size = 256 if batch_size is None else batch_size
    base.check_count("batch_size", size, 1)
    call, parts = on_numpy(model), ([], [])
    pads = len(images) > size and (call.host is None or call.host.pads)
    for first in range(0, len(images), size):
        rows = np.arange(first, first + size if pads else min(first + size, len(images)))
        used = int(np.sum(rows < len(images)))
        batch = unit_range(jnp.asarray(images[np.minimum(rows, len(images) - 1)]))
        for found, x in zip(parts, (batch, perturb(batch, jnp.asarray(perturbation, batch.dtype))), strict=True):
            found.append(np.asarray(call(x))[:used])
    clean, attacked = (np.concatenate(found) for found in parts)
    bad = int(np.sum(np.isnan(clean).any(-1) | np.isnan(attacked).any(-1)))
    if bad:
        warnings.warn(f"model returns NaN for {bad} of {len(images)} images, which count as not fooled.", stacklevel=3)
    else:
        _checks.check_logits(clean)
    return clean, attacked
