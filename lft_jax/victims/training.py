"""Training and accuracy of victims. An epoch is one jitted program; the images are on the device as uint8."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float

from lft_jax import base
from lft_jax._bounded import BoundedJit
from lft_jax._present import present
from lft_jax.data import ImageSource, check_images_labels, unit_range
from lft_jax.victims.models import build_model

PyTree = base.PyTree
#: Values of `VictimConfig.augment`.
AUGMENTATIONS = ("none", "crop", "crop_flip")


@dataclasses.dataclass(frozen=True)
class VictimConfig:
    """Configuration of the training of a victim.

    The optimizer is AdamW with weight decay 0.02. The learning rate warms up linearly over the first tenth of the
    steps, then decays to 0 along a cosine.

    Attributes:
      source: name of the image source, for the record only.
      architecture: one of `lft_jax.victims.MODELS`.
      seed: seed of the initial weights, the order of the images and their augmentation, at least 0.
      epochs: number of passes over the training images, at least 1.
      batch_size: images per step, at least 1; the incomplete batch at the end of an epoch is dropped.
      learning_rate: peak learning rate, above 0.
      augment: "none", "crop" (random crops of the image padded with zeros by an eighth of its size) or "crop_flip"
        (also random horizontal flips).

    Examples:
      >>> VictimConfig("digits", "lenet", epochs=30).check().batch_size
      128
    """

    source: str
    architecture: str
    seed: int = 0
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 2e-3
    augment: str = "none"

    def check(self) -> "VictimConfig":
        """Returns itself; raises a ValueError for a setting out of range (`build_model` checks the architecture)."""
        for name in ("epochs", "batch_size"):
            base.check_at_least(name, getattr(self, name), 1)
        base.check_at_least("seed", self.seed, 0)
        base.check_positive("learning_rate", self.learning_rate)
        base.check_name("augment", self.augment, AUGMENTATIONS)
        return self


class EpochRecord(NamedTuple):
    """One point of a training curve.

    Attributes:
      epoch: number of the epoch, from 1.
      loss: mean cross-entropy over the epoch, in nats.
      accuracy: accuracy on the validation images after the epoch, in [0, 1].
    """

    epoch: int
    loss: float
    accuracy: float


@functools.lru_cache
def apply_function(
    architecture: str, num_classes: int
) -> Callable[[PyTree, Float[Array, "N H W C"]], Float[Array, "N classes"]]:
    """The inference function of an architecture, computed in the dtype of the images.

    Equal arguments give the same object, so `jax.tree_util.Partial(apply_function(...), variables)` of two victims
    share one compilation.

    Args:
      architecture: one of `lft_jax.victims.MODELS`.
      num_classes: number of classes, at least 2.

    Returns:
      A function `(variables, images) -> logits`, of images `[N, H, W, C]`, floating-point in [0, 1], to logits
      `[N, num_classes]`.

    Raises:
      ValueError: for an unknown architecture, or fewer than 2 classes.

    Examples:
      >>> apply_function("lenet", 10) is apply_function("lenet", 10)
      True
    """
    model = build_model(architecture, num_classes)

    def apply(variables: PyTree, images: Any) -> Any:
        if jnp.issubdtype(images.dtype, jnp.floating):
            variables = jax.tree.map(lambda x: x.astype(images.dtype), variables)
        return model.apply(variables, images)

    return apply


def clean_accuracy(
    logits_fn: Callable[[Float[Array, "n H W C"]], Float[Array, "n classes"]],
    images: ArrayLike,
    labels: ArrayLike,
    *,
    batch_size: int = 500,
) -> float:
    """Fraction of images that a classifier classifies correctly.

    Args:
      logits_fn: traceable function of images `[n, H, W, C]` in [0, 1] to logits `[n, classes]`.
      images: `[N, H, W, C]`, uint8 or floating-point in [0, 1].
      labels: `[N]`, integers of at least 0.
      batch_size: images per batch, at least 1.

    Returns:
      A fraction in [0, 1].

    Raises:
      ValueError: for images or labels out of range.

    Examples:
      >>> def logits_fn(images):  # class 1 for bright images
      ...     mean = images.mean((1, 2, 3))
      ...     return jnp.stack([0.5 - mean, mean - 0.5], axis=-1)
      >>> images = np.array([0, 200, 255, 255], np.uint8).reshape(4, 1, 1, 1)
      >>> clean_accuracy(logits_fn, images, np.array([0, 1, 1, 0]))
      0.75
    """
    check_images_labels(images, labels)
    logits_fn = logits_fn if isinstance(logits_fn, jax.tree_util.Partial) else jax.tree_util.Partial(logits_fn)
    images, labels = np.asarray(images), np.asarray(labels).astype(np.int32)
    batch_size = min(batch_size, len(images))
    kind = images.dtype if np.issubdtype(images.dtype, np.floating) else np.float32
    logits_fn = present(logits_fn, jax.ShapeDtypeStruct((batch_size, *images.shape[1:]), kind))
    # Padded with images of the label -1, never predicted, so that all batches have one shape.
    missing = -len(images) % batch_size
    images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
    labels = np.concatenate([labels, np.full(missing, -1, np.int32)])
    correct = 0
    for first in range(0, len(images), batch_size):
        batch = slice(first, first + batch_size)
        correct += int(_count_correct(logits_fn, images[batch], labels[batch]))
    return correct / (len(images) - missing)


@BoundedJit
def _count_correct(logits_fn, images, labels):
    return jnp.sum(jnp.argmax(logits_fn(unit_range(images)), -1).astype(jnp.int32) == labels)


def train_victim(
    config: VictimConfig,
    train: ImageSource,
    validation: ImageSource,
    *,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> tuple[PyTree, tuple[EpochRecord, ...]]:
    """Trains one victim. The result depends only on the configuration and the images.

    Args:
      config: architecture and settings of the training.
      train: images to train on.
      validation: images for the accuracy after each epoch.
      on_epoch: called with the record of each epoch as soon as the epoch ends.

    Returns:
      `(variables, history)`: the variables of the model (a dict of "params" and, with batch norm, "batch_stats"), and
      one record per epoch.

    Raises:
      ValueError: for a configuration out of range, invalid images or labels, or images too small for the architecture.
    """
    config.check()
    check_images_labels(train.images, train.labels, train.num_classes)
    batch_size = min(config.batch_size, len(train.images))
    steps = config.epochs * (len(train.images) // batch_size)
    init, epoch = _programs(config.architecture, train.num_classes, steps, config.learning_rate, config.augment)
    key_init, key = jax.random.split(jax.random.key(config.seed))
    images, labels = jnp.asarray(train.images), jnp.asarray(train.labels)
    variables, state = init(key_init, images[:1])
    apply = apply_function(config.architecture, train.num_classes)
    history = []
    for number in range(1, config.epochs + 1):
        # Shuffled by numpy: `jax.random.permutation` would take longer to compile than all of training takes.
        rows = np.random.default_rng((config.seed, number)).permutation(len(images)).astype(np.int32)
        rows = rows[: len(rows) // batch_size * batch_size].reshape(-1, batch_size)
        variables, state, loss = epoch(variables, state, images, labels, rows, jax.random.fold_in(key, number))
        logits_fn = jax.tree_util.Partial(apply, variables)
        accuracy = clean_accuracy(logits_fn, validation.images, validation.labels)
        history.append(EpochRecord(number, float(loss), accuracy))
        if on_epoch is not None:
            on_epoch(history[-1])
    return variables, tuple(history)


@functools.lru_cache(maxsize=8)  # programs of megabytes
def _programs(architecture, num_classes, steps, learning_rate, augment):
    """The jitted initialization and epoch, cached so that victims of different seeds share a compilation."""
    model = build_model(architecture, num_classes)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), max(2, steps))
    optimizer = optax.adamw(schedule, weight_decay=0.02)

    # Runs once; optimizing the code of the random numbers would take 5 s.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def init(key, images):
        variables = dict(model.init(key, unit_range(images)))
        return variables, optimizer.init(variables["params"])

    def loss_fn(params, statistics, images, labels):
        outputs, changed = model.apply({"params": params, **statistics}, images, train=True, mutable=["batch_stats"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, labels)), dict(changed)

    @jax.jit
    def epoch(variables, state, images, labels, rows, key):
        def step(carry, inputs):
            params, statistics, state = carry
            number, rows = inputs
            batch = unit_range(images[rows])
            if augment != "none":
                batch = _augmented(batch, jax.random.fold_in(key, number), flip=augment == "crop_flip")
            (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                params, statistics, batch, labels[rows]
            )
            with jax.numpy_dtype_promotion("standard"):  # optax's Adam multiplies floats by integers
                updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), statistics, state), loss

        statistics = {name: value for name, value in variables.items() if name != "params"}
        carry = (variables["params"], statistics, state)
        numbered = (jnp.arange(len(rows)), rows)
        (params, statistics, state), losses = jax.lax.scan(step, carry, numbered)
        return {"params": params, **statistics}, state, jnp.mean(losses)

    return init, epoch


def _augmented(images, key, flip):
    n, height, width, channels = images.shape
    key_crop, key_flip = jax.random.split(key)
    pad = max(1, min(height, width) // 8)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offsets = jax.random.randint(key_crop, (n, 2), 0, 2 * pad + 1)

    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    images = jax.vmap(crop)(padded, offsets)
    if not flip:
        return images
    mirrored = jax.random.bernoulli(key_flip, shape=(n, 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)
