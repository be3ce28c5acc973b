"""What is refused before an attack, and what is warned of."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax.data import check_images_labels
from lft_jax.models import Classifier

_CAUSES = (
    "Usual causes: mean, std or input_range of the model (lft_jax.models), the order of the channels, labels that "
    "count from 1 or are in another order."
)


def checked_images(images: Any, labels: Any = None) -> Any:
    """Images `[N, H, W, C]`, checked together with labels `[N]`; floating-point ones are clipped to [0, 1].

    Raises:
      ValueError: as `check_images_labels`.
    """
    array = np.asarray(images)
    check_images_labels(array, np.zeros(len(array), np.int32) if labels is None else labels)
    if array.dtype == np.uint8:
        _warn_if(array.max() <= 1, f"images are uint8 with values up to {array.max()}: were they in [0, 1] before?")
        return array
    _warn_if(0 < array.max() <= 2 / 255, f"images are at most {array.max():.2g}: were they divided by 255 twice?")
    images = images if hasattr(images, "clip") else array
    return images.clip(0, 1) if array.min() < 0 or array.max() > 1 else images


def check_without_images(model: Any, labels: Any, shape: Any) -> None:
    """Judges the arguments of an attack without images.

    Raises:
      ValueError: for labels, and for a shape that is not `(H, W, C)`, or that neither is given nor known of the model.
    """
    if labels is not None:
        raise ValueError(
            f"labels must be None where images is None, since synthetic images have no true class, got {labels!r}."
        )
    known = model.input_shape if shape is None and isinstance(model, Classifier) else shape
    if known is None or any(side is None for side in known):
        raise ValueError(
            "shape must be (H, W, C), that of the model's images, where images is None and the input_shape of the "
            f"model is {known}; got None."
        )
    if len(known) != 3 or any(not isinstance(side, int | np.integer) or side < 1 for side in known):
        raise ValueError(f"shape must be (H, W, C), whole numbers of at least 1, got {known!r}.")


def check_key(key: Any) -> None:
    """Raises a TypeError unless it is one PRNG key, new or of old style."""
    dtype = getattr(key, "dtype", None)
    new = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (np.ndim(key) == 0 if new else dtype == np.uint32 and np.ndim(key) == 1):
        raise TypeError(f"key must be a PRNG key, such as jax.random.key(0), got {key!r}.")


def check_target(target: Any) -> None:
    """Raises a TypeError unless the target is an integer or None."""
    if target is None or (isinstance(target, int | np.integer) and not isinstance(target, bool)):
        return
    if not (hasattr(target, "dtype") and np.ndim(target) == 0 and jnp.issubdtype(target.dtype, jnp.integer)):
        raise TypeError(f"target must be an integer, the number of a class, got {target!r}.")


def check_clean(logits: Any, labels: Any, images: Any) -> None:
    """Judges the logits `[N, classes]` of clean images whose labels are given.

    Raises:
      ValueError: for labels that are no class of the model.

    Warns:
      UserWarning: if the clean accuracy is that of chance.
    """
    check_images_labels(images, labels, logits.shape[-1])
    correct, count = int(np.sum(np.argmax(logits, -1) == np.asarray(labels))), len(logits)
    _warn_if(
        correct * logits.shape[-1] <= count and correct < count,
        f"model classifies only {correct} of {count} clean images as their labels say, no more than by chance "
        f"({logits.shape[-1]} classes), so success rates mean little. {_CAUSES}",
    )


def check_logits(logits: Any) -> None:
    """Judges what a model returns for clean images, `[N, classes]`.

    Raises:
      ValueError: for NaN, and for one column of what looks like probabilities.

    Warns:
      UserWarning: for what looks like probabilities.
    """
    logits = np.asarray(logits)
    bad = np.flatnonzero(np.isnan(logits).any(-1))
    if len(bad):
        raise ValueError(
            f"model returns NaN for {len(bad)} of {len(logits)} clean images, the first is number {bad[0]}."
        )
    if logits.shape[1] == 2 and not logits[:, 0].any() and logits.min() >= 0 and logits.max() <= 1:
        raise ValueError(
            "model returns one column within [0, 1] for two classes, which looks like a probability, where a logit is "
            "meant: pass output='probabilities' to its adapter, such as lft_jax.models.from_function. A model of such "
            "logits must return both, [-z / 2, z / 2]."
        )
    alike = np.all(logits >= 0) and np.allclose(logits.sum(-1), 1, atol=1e-3)
    _warn_if(
        bool(alike),
        "model returns rows that sum to 1, which look like probabilities, where logits are meant: attacks are weaker "
        "on them. Pass output='probabilities' to its adapter, such as lft_jax.models.from_function.",
    )


def warn(message: str) -> None:
    """Warns the caller of the attack."""
    warnings.warn(message, UserWarning, stacklevel=4)


def _warn_if(condition, message):
    if condition:
        warnings.warn(message, UserWarning, stacklevel=4)
