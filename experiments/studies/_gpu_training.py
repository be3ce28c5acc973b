"""Parts of `experiments.studies.train_on_gpu`: programs that train in bfloat16, augmentation, PGD, initial weights."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax.victims import Victim, build_model, models


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an architecture is trained. The defaults are those of convolutional networks.

    Attributes:
      optimizer: "nesterov" (momentum 0.9) or "adamw".
      learning_rate: peak learning rate, after a linear warm-up and before a cosine to 0.
      weight_decay: of the kernels of convolutions and dense layers, depthwise convolutions excepted.
      smoothing: label smoothing.
      warmup: epochs of the warm-up; at most a third of all.
      augment: names of augmentations, joined by underscores: crop, flip, color, cutout.
      batch_size: images per step.
      epsilon: linf radius of adversarial training, of half of the images of each batch; 0 for none.
    """

    optimizer: str = "nesterov"
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
    smoothing: float = 0.05
    warmup: int = 4
    augment: str = "crop_flip"
    batch_size: int = 256
    epsilon: float = 0.0

    @property
    def attack(self) -> dict[str, Any]:
        """Radius, number and size of the steps of PGD in adversarial training."""
        return {"epsilon": self.epsilon, "steps": 3, "step_size": self.epsilon / 2}


@contextlib.contextmanager
def bfloat16() -> Iterator[None]:
    """Models that are traced inside compute in bfloat16 if their weights are, with cuDNN's convolutions on a GPU.

    The convolutions of the package are the same functions in forms that are faster on a CPU.
    """
    conv, normalized = models.conv, models._normalized

    def plain(images, kernel, *, stride=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(images, kernel, (stride, stride), "SAME", dimension_numbers=numbers)

    models._normalized = lambda images, minimum: normalized(images, minimum).astype(jnp.bfloat16)
    models.conv = conv if jax.default_backend() == "cpu" else plain
    try:
        yield
    finally:
        models.conv, models._normalized = conv, normalized


def initial_state(recipe: Recipe, architecture: str, num_classes: int, shape: tuple[int, ...], seed: int) -> Any:
    """Weights, batch statistics and state of the optimizer. NumPy draws the weights: there is nothing to compile."""
    model = build_model(architecture, num_classes)
    like = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    generator = np.random.default_rng((seed, 0))

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name in ("scale", "var"):
            return np.ones(shape, np.float32)
        if name in ("bias", "mean"):
            return np.zeros(shape, np.float32)
        if name == "position":
            return generator.normal(0, 0.02, shape).astype(np.float32)
        # Kernels: of a dense layer [I, O], a convolution [k, k', I, O], a depthwise convolution [k, k', C].
        gain, seen = (1, shape[0]) if len(shape) == 2 else (2, np.prod(shape[: 3 if len(shape) == 4 else 2]))
        return generator.normal(0, (gain / seen) ** 0.5, shape).astype(np.float32)

    variables = jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, dict(like)))
    params = variables["params"]
    return params, variables.get("batch_stats", {}), _optimizer(recipe).init(params)


def learning_rates(recipe: Recipe, epoch: int, epochs: int, steps: int) -> np.ndarray:
    """Learning rates of the steps of one epoch, numbered from 0."""
    done = epoch + (np.arange(steps) + 0.5) / steps
    warmup = min(recipe.warmup, max(1, epochs // 3))
    cosine = 0.5 * (1 + np.cos(np.pi * np.clip((done - warmup) / max(1e-9, epochs - warmup), 0, 1)))
    return (recipe.learning_rate * np.where(done < warmup, done / warmup, cosine)).astype(np.float32)


@functools.lru_cache
def epoch_program(recipe: Recipe, architecture: str, num_classes: int) -> Callable[..., Any]:
    """The jitted epoch `(state, images, labels, rows, rates, key) -> (state, loss)`; call it inside `bfloat16()`."""
    model, optimizer = build_model(architecture, num_classes), _optimizer(recipe)

    def loss_fn(params, statistics, images, labels):
        variables = {"params": _cast(params), "batch_stats": statistics}
        logits, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
        targets = optax.smooth_labels(jax.nn.one_hot(labels, num_classes), recipe.smoothing)
        return jnp.mean(optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)), changed["batch_stats"]

    def step(images, labels, key, state, inputs):
        params, statistics, opt_state = state
        number, rows, rate = inputs
        key_augment, key_attack = jax.random.split(jax.random.fold_in(key, number))
        batch, target = augmented(images[rows], key_augment, recipe.augment), labels[rows]
        if recipe.epsilon:
            half, variables = len(rows) // 2, {"params": _cast(params), "batch_stats": statistics}
            logits_fn = lambda x: model.apply(variables, x).astype(jnp.float32)  # noqa: E731
            worst = attacked(logits_fn, batch[:half], target[:half], key_attack, **recipe.attack)
            batch = jnp.concatenate([worst, batch[half:]])
        (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, statistics, batch, target)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return (params, statistics, opt_state), loss

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state, images, labels, rows, rates, key):
        numbered = (jnp.arange(len(rows)), rows, rates)
        state, losses = jax.lax.scan(functools.partial(step, images, labels, key), state, numbered)
        return state, jnp.mean(losses)

    return epoch


def robust_accuracy(victim: Victim, images: np.ndarray, labels: np.ndarray, epsilon: float, steps: int = 20) -> float:
    """Fraction of images that stay classified correctly under PGD in the linf ball, with steps of epsilon / 5."""

    @jax.jit
    def correct(logits_fn, images, labels, key):
        worst = attacked(logits_fn, images.astype(jnp.float32) / 255, labels, key, epsilon, steps, epsilon / 5)
        return jnp.sum(jnp.argmax(logits_fn(worst), -1) == labels)

    found, size = 0, min(500, len(images))
    for number, first in enumerate(range(0, len(images), size)):
        batch, key = slice(first, first + size), jax.random.fold_in(jax.random.key(0), number)
        found += int(correct(victim.logits_fn, images[batch], labels[batch], key))
    return found / len(images)


def augmented(images: jax.Array, key: jax.Array, augment: str) -> jax.Array:
    """uint8 images `[N, H, W, C]` to augmented ones, float32 in [0, 1]."""
    n, height, width, _ = images.shape
    keys = jax.random.split(key, 6)
    if "crop" in augment:  # of the image padded with zeros by an eighth of its size
        pad = height // 8
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        offsets = jax.random.randint(keys[0], (n, 2), 0, 2 * pad + 1)
        rows, columns = offsets[:, :1] + jnp.arange(height)[None], offsets[:, 1:] + jnp.arange(width)[None]
        if "flip" in augment:
            columns = jnp.where(jax.random.bernoulli(keys[1], shape=(n, 1)), columns[:, ::-1], columns)
        images = padded[jnp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    images = images.astype(jnp.float32) / 255
    if "color" in augment:
        draws = jax.random.uniform(keys[2], (n, 3), minval=-1)
        brightness, contrast, saturation = (draws[:, i, None, None, None] for i in range(3))
        gray = jnp.mean(images, -1, keepdims=True)
        images = gray + (images - gray) * (1 + 0.4 * saturation)
        mean = jnp.mean(images, (1, 2, 3), keepdims=True)
        images = jnp.clip(mean + (images - mean) * (1 + 0.3 * contrast) + 0.15 * brightness, 0, 1)
    if "cutout" in augment:  # a gray square in 60% of the images
        size = height // 4 + 2
        corner = jax.random.randint(keys[3], (n, 2), 1 - size // 2, height - size // 2)
        use = jax.random.bernoulli(keys[4], 0.6, (n,))

        def inside(first, length):
            places = jnp.arange(length)[None]
            return (places >= first[:, None]) & (places < first[:, None] + size)

        hole = inside(corner[:, 0], height)[:, :, None] & inside(corner[:, 1], width)[:, None] & use[:, None, None]
        images = jnp.where(hole[..., None], 0.5, images)
    return images


def attacked(
    logits_fn: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    epsilon: float,
    steps: int,
    step_size: float,
) -> jax.Array:
    """PGD of each image by itself, in the linf ball, from a random start."""

    def loss(x):
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits_fn(x), labels))

    def step(_, x):
        x = x + step_size * jnp.sign(jax.grad(loss)(x))
        return jnp.clip(jnp.clip(x, images - epsilon, images + epsilon), 0, 1)

    start = jnp.clip(images + jax.random.uniform(key, images.shape, minval=-epsilon, maxval=epsilon), 0, 1)
    return jax.lax.fori_loop(0, steps, step, start)


def _cast(params):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def _optimizer(recipe):
    """Updates before the learning rate, which changes in each step."""

    def decays(params):  # by rank: not the kernels of depthwise convolutions, nor vectors
        return jax.tree.map(lambda x: x.ndim in (2, 4), params)

    decay = optax.add_decayed_weights(recipe.weight_decay, mask=decays)
    if recipe.optimizer == "adamw":
        return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98), decay)
    return optax.chain(decay, optax.trace(decay=0.9, nesterov=True))
