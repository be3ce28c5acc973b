"""Trains victims: one jitted program an epoch, the images on the device as uint8."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax import base
from lft_jax.data import ImageSource, check_images_labels, unit_range
from lft_jax.victims.models import build_model

PyTree = base.PyTree
AUGMENTATIONS = ("none", "crop", "crop_flip")


@dataclasses.dataclass(frozen=True)
class VictimConfig:
    """What is trained, and how: AdamW (weight decay 0.02), a tenth of the steps warming up, then a cosine to 0.

    Attributes:
      source: name of the images, for the record.
      architecture: one of `lft_jax.victims.MODELS`.
      seed: of the initial weights, the order of the images and their augmentation.
      epochs: passes over the training images.
      batch_size: images a step; what is left over at the end of an epoch is left out.
      learning_rate: the largest.
      augment: "none", "crop" (of the image padded by an eighth of its size with zeros) or "crop_flip" (and mirrored).
    """

    source: str
    architecture: str
    seed: int = 0
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 2e-3
    augment: str = "none"

    def check(self) -> "VictimConfig":
        """Returns itself, or raises a ValueError."""
        for name in ("epochs", "batch_size"):
            base.check_at_least(name, getattr(self, name), 1)
        base.check_at_least("seed", self.seed, 0)
        base.check_positive("learning_rate", self.learning_rate)
        base.check_name("augment", self.augment, AUGMENTATIONS)
        return self


class EpochRecord(NamedTuple):
    """One point of a training curve.

    Attributes:
      epoch: from 1.
      loss: mean cross-entropy over the epoch, in nats.
      accuracy: on the validation images after it, in [0, 1].
    """

    epoch: int
    loss: float
    accuracy: float


@functools.lru_cache
def apply_function(architecture: str, num_classes: int) -> Callable[[PyTree, jax.Array], jax.Array]:
    """`(variables, images) -> logits` of an architecture at inference, computed in the dtype of the images.

    The same object for equal arguments: `jax.tree_util.Partial(apply_function(...), variables)` of two victims then
    share one compilation.
    """
    model = build_model(architecture, num_classes)

    def apply(variables, images):
        if jnp.issubdtype(images.dtype, jnp.floating):
            variables = jax.tree.map(lambda x: x.astype(images.dtype), variables)
        return model.apply(variables, images)

    return apply


def clean_accuracy(logits_fn: Callable[[jax.Array], jax.Array], images, labels, *, batch_size: int = 500) -> float:
    """Fraction of images that a classifier gets right.

    Args:
      logits_fn: images `[n, H, W, C]` in [0, 1] -> logits `[n, classes]`; traceable.
      images: `[N, H, W, C]`, uint8 or floating-point in [0, 1].
      labels: `[N]` integers.
      batch_size: images at a time.

    Returns:
      A fraction in [0, 1].

    Raises:
      ValueError: for images or labels out of range.
    """
    check_images_labels(images, labels)
    logits_fn = logits_fn if isinstance(logits_fn, jax.tree_util.Partial) else jax.tree_util.Partial(logits_fn)
    images, labels = np.asarray(images), np.asarray(labels).astype(np.int32)
    batch_size = min(batch_size, len(images))
    # Filled up with images that no answer is right for, so that all batches have one shape.
    missing = -len(images) % batch_size
    images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
    labels = np.concatenate([labels, np.full(missing, -1, np.int32)])
    correct = 0
    for first in range(0, len(images), batch_size):
        batch = slice(first, first + batch_size)
        correct += int(_count_correct(logits_fn, images[batch], labels[batch]))
    return correct / (len(images) - missing)


@jax.jit
def _count_correct(logits_fn, images, labels):
    return jnp.sum(jnp.argmax(logits_fn(unit_range(images)), -1).astype(jnp.int32) == labels)


def train_victim(
    config: VictimConfig,
    train: ImageSource,
    validation: ImageSource,
    *,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> tuple[PyTree, tuple[EpochRecord, ...]]:
    """Trains one victim. The result is a function of the configuration and the images alone.

    Args:
      config: see `VictimConfig`.
      train: the images to learn.
      validation: the images that each epoch is judged on.
      on_epoch: called with each epoch's record as soon as it is known.

    Returns:
      `(variables, history)`: the model's variables (a dict of "params" and, with batch norm, "batch_stats"), and one
      record an epoch.

    Raises:
      ValueError: for a configuration out of range, or images too small for the architecture.
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
        # Shuffled by numpy: a permutation by `jax.random` would take longer to compile than all of training.
        rows = np.random.default_rng((config.seed, number)).permutation(len(images)).astype(np.int32)
        rows = rows[: len(rows) // batch_size * batch_size].reshape(-1, batch_size)
        variables, state, loss = epoch(variables, state, images, labels, rows, jax.random.fold_in(key, number))
        logits_fn = jax.tree_util.Partial(apply, variables)
        accuracy = clean_accuracy(logits_fn, validation.images, validation.labels)
        history.append(EpochRecord(number, float(loss), accuracy))
        if on_epoch is not None:
            on_epoch(history[-1])
    return variables, tuple(history)


@functools.lru_cache
def _programs(architecture, num_classes, steps, learning_rate, augment):
    """The jitted initialization and epoch; cached so that victims that differ in their seed share a compilation."""
    model = build_model(architecture, num_classes)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), max(2, steps))
    optimizer = optax.adamw(schedule, weight_decay=0.02)

    # It runs once, and optimizing the random numbers would take 5 s.
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
        start = (variables["params"], statistics, state)
        numbered = (jnp.arange(len(rows)), rows)
        (params, statistics, state), losses = jax.lax.scan(step, start, numbered)
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
