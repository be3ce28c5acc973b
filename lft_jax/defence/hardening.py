"""Universal adversarial training: the weights and the perturbation they must withstand, trained in turn."""

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Integer, PRNGKeyArray, Shaped

from lft_jax import base
from lft_jax.base import PyTree
from lft_jax.data import check_images_labels, unit_range
from lft_jax.optimizers import fine_tune_step
from lft_jax.pretrained import load_fine_tuner
from lft_jax.tasks import AttackLoss, AttackRecipe, Batch, Constraint, PatternSearch, perturb
from lft_jax.tasks.recipe import attack_oracle, search_start

#: Arguments of a flax module's `__call__`, and their values in training mode.
TRAINING = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
#: The search for a start of a perturbation: eight patterns.
SEARCH = PatternSearch(tiles=4, waves=4, refinements=0)
#: Numbers folded into the key of a minibatch: of the attack, of dropout.
_ATTACK, _DROPOUT = range(2)


@dataclasses.dataclass(frozen=True)
class Hardening:
    """Settings of universal adversarial training.

    Attributes:
      epsilon: radius of the ball of the perturbation, in units of the image range; above 0.
      norm: "linf" or "l2".
      fraction: share of the images of a minibatch that are perturbed, in (0, 1], at least one for each perturbation.
      epochs: passes over the training images, at least 1.
      batch_size: images in a minibatch, at least 1; the incomplete one at the end of an epoch is dropped.
      attack: what steps the perturbation: the name of a stored rule, the path of your own, or an optax transformation
        that takes the extra arguments of `lft_jax.base.Estimate`.
      attack_steps: minibatches after which a perturbation begins again from a new start, at least 1.
      search: what is searched for that start, on the images that it perturbs; None for zeros.
      perturbations: how many there are at a time, at least 1; each for an equal part of the perturbed images. They
        begin again one after another, so that some are strong at any time.

    Examples:
      >>> Hardening(epsilon=8 / 255, epochs=3).check().fraction
      0.5
    """

    epsilon: float
    norm: str = "linf"
    fraction: float = 0.5
    epochs: int = 5
    batch_size: int = 128
    attack: str | optax.GradientTransformation = "spatial-linf"
    attack_steps: int = 5
    search: PatternSearch | None = SEARCH
    perturbations: int = 4

    def check(self) -> "Hardening":
        """Returns itself.

        Raises:
          ValueError: for a field out of range.
        """
        Constraint(self.norm, self.epsilon).check()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {self.fraction!r}.")
        for name in ("epochs", "batch_size", "attack_steps", "perturbations"):
            base.check_at_least(name, getattr(self, name), 1)
        if self.attack_steps >= 2**30:
            raise ValueError(f"attack_steps must be below 2**30, got {self.attack_steps!r}.")
        if self.search is not None:
            self.search.check()
        return self


class Hardened(NamedTuple):
    """What `harden` returns.

    Attributes:
      variables: the trained variables, with the structure of those given.
      history: `{name: NumPy [epochs]}`, means over the minibatches of an epoch, in training mode: `loss`, in nats;
        `clean_accuracy` and `perturbed_accuracy`, of the images without and with the perturbation of their step. The
        first is NaN where all images are perturbed.
      perturbations: NumPy `[perturbations, H, W, C]`, the last ones.
    """

    variables: PyTree
    history: dict[str, np.ndarray]
    perturbations: np.ndarray


class _Carry(NamedTuple):
    """What a minibatch leaves to the next one: weights, other variables, optimizer, perturbation, its optimizer."""

    params: PyTree
    rest: PyTree
    state: PyTree
    theta: jax.Array
    attack_state: PyTree


def harden(
    model: Any,
    variables: PyTree,
    images: Shaped[Array | np.ndarray, "N H W C"],
    labels: Integer[Array | np.ndarray, " N"],
    settings: Hardening,
    *,
    optimizer: optax.GradientTransformation | None = None,
    key: PRNGKeyArray | None = None,
) -> Hardened:
    """Trains a classifier to withstand universal perturbations, from the weights that it has.

    With weights `w`, a perturbation `theta` in its ball `B`, and a part `S` (`settings.fraction`) of each minibatch
    `M`, steps on both sides of ::

        min over w of  E max over theta in B of  sum over M of  CE(f(x + theta [x in S]; w), y)

    take turns: on each minibatch the attack's optimizer moves `theta` one step on `S`, then `optimizer` moves `w` one
    step on `M`. Against a single `theta` the weights learn to withstand that one, and forget others. So there are
    several, each for a part of `S`, and each begins again after `settings.attack_steps` minibatches as an attack does:
    with the best of a few patterns, from where the learned rule goes on. An epoch is one `lax.scan` under `jit`.

    Args:
      model: a function `(variables, images) -> logits`, of images `[N, H, W, C]`, floating-point in [0, 1], all of
        whose variables are trained; or a `flax.linen.Module` of such images. Of a module, the collection "params" is
        trained and all others (batch statistics) are updated; arguments of its `__call__` named `train`, `training`,
        `is_training`, `deterministic` or `use_running_average` are set for training, and for evaluation where it is
        attacked. It gets a key for dropout.
      variables: those of the model, trained already or not; what `module.init` returns.
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` integers from 0.
      settings: the ball, the attack and the length of training.
      optimizer: optax transformation of the weights; `optax.adam(1e-3)` if None.
      key: PRNG key of the minibatches, the attack and dropout; `jax.random.key(0)` if None.

    Returns:
      The variables, the history of training, and the last perturbations.

    Raises:
      TypeError: for a model of another kind.
      ValueError: for settings out of range, an unknown rule, images outside [0, 1] or with channels first, labels that
        are no classes of the model, and a module's variables without "params".

    Examples:
      Two steps on a linear model:

      >>> model = lambda variables, images: images.reshape(len(images), -1) @ variables
      >>> images = np.random.default_rng(0).uniform(0, 1, (16, 4, 4, 1)).astype(np.float32)
      >>> labels = np.arange(16) % 2
      >>> settings = Hardening(epsilon=0.1, epochs=1, batch_size=8)
      >>> found = harden(model, jnp.zeros((16, 2)), images, labels, settings, optimizer=optax.sgd(0.1))
      >>> found.variables.shape, found.perturbations.shape, found.history["loss"].shape
      ((16, 2), (4, 4, 4, 1), (1,))

    References:
      Shafahi et al. 2020, Universal adversarial training, arXiv 1811.11304, Algorithm 3: one perturbation throughout,
      moved by gradient steps. A perturbation for each minibatch: Mummadi et al. 2019, Defending against
      universal perturbations with shared adversarial training, arXiv 1812.03705.
    """
    settings.check()
    check_images_labels(images, labels)
    images = np.asarray(images)
    key = jax.random.key(0) if key is None else key
    tx = settings.attack
    tx = load_fine_tuner(tx) if isinstance(tx, str) else optax.with_extra_args_support(tx)
    weights_tx = optax.adam(1e-3) if optimizer is None else optimizer
    train, evaluate, params, rest = _parts(model, variables)
    example = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
    logits = jax.eval_shape(lambda params, rest, x: evaluate(params, rest, x), params, rest, example)
    if logits.ndim != 2 or len(logits) != 1:
        raise ValueError(f"model must return logits [N, classes], got shape {logits.shape} for one image.")
    check_images_labels(images, labels, logits.shape[1])
    images, labels = jnp.asarray(images), jnp.asarray(np.asarray(labels), jnp.int32)
    size = min(settings.batch_size, len(images))
    if settings.perturbations > size:
        raise ValueError(
            f"perturbations must be at most the {size} images of a minibatch, got {settings.perturbations}."
        )
    epoch = _program(train, evaluate, settings, tx, weights_tx)
    theta = jnp.zeros((settings.perturbations, *images.shape[1:]), jnp.float32)
    carry = _Carry(params, rest, weights_tx.init(params), theta, jax.vmap(tx.init)(theta))
    records, done = [], 0
    for number in range(settings.epochs):
        key_epoch = jax.random.fold_in(key, number)
        seed = np.asarray(jax.random.key_data(key_epoch)).tolist()
        rows = np.random.default_rng(seed).permutation(len(images)).astype(np.int32)
        rows = rows[: len(rows) // size * size].reshape(-1, size)
        numbers = done + np.arange(len(rows), dtype=np.int32)
        carry, metrics = epoch(carry, images, labels, rows, numbers, key_epoch)
        records.append({name: float(value) for name, value in metrics.items()})
        done += len(rows)
    history = {name: np.asarray([record[name] for record in records]) for name in records[0]}
    return Hardened(_joined(carry.params, carry.rest), history, np.asarray(carry.theta))


def _program(train, evaluate, settings, tx, weights_tx):
    """An epoch as one jitted scan over minibatches."""
    constraint, pool = Constraint(settings.norm, settings.epsilon), settings.perturbations
    recipe = AttackRecipe(loss=AttackLoss("cross_entropy"), augmentation=None, search=settings.search)
    recipe = recipe.resolved(AttackLoss("cross_entropy"))

    offsets = np.asarray([i * settings.attack_steps // pool for i in range(pool)], np.int32)

    def attacked(logits_fn, theta, state, images, labels, k, key):
        """One perturbation and its state, one step further on its images; `k` steps of it are done."""
        batch, (key_start, key_step) = Batch(images, labels), jax.random.split(key)

        def begin():
            zeros = jnp.zeros_like(theta)
            start, _ = search_start(logits_fn, batch, recipe, constraint, zeros, key_start)
            return start, tx.init(zeros)

        theta, state = jax.lax.cond(k == 0, begin, lambda: (theta, state))
        oracle = attack_oracle(logits_fn, batch, recipe, constraint)
        progress = k.astype(jnp.float32) / settings.attack_steps
        theta, state, _ = fine_tune_step(
            tx, oracle, theta, state, key_step, progress=progress, project=constraint.project
        )
        return theta, state

    def loss_fn(params, rest, images, labels, key):
        logits, rest = train(params, rest, images, key)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), (logits, rest)

    @jax.jit
    def epoch(carry, images, labels, rows, numbers, key):
        def step(carry, inputs):
            rows, count = inputs
            x, y = unit_range(images[rows]), labels[rows]
            each = max(1, min(round(settings.fraction * len(rows) / pool), len(rows) // pool))
            number = pool * each
            key_step = jax.random.fold_in(key, count)
            logits_fn = functools.partial(evaluate, carry.params, carry.rest)
            phases = (count + jnp.asarray(offsets)) % settings.attack_steps
            parts = jax.tree.map(lambda leaf: leaf[:number].reshape(pool, each, *leaf.shape[1:]), (x, y))
            keys = jax.random.split(jax.random.fold_in(key_step, _ATTACK), pool)
            inputs = (carry.theta, carry.attack_state, *parts, jnp.where(count == 0, 0, phases), keys)
            theta, attack_state = jax.lax.map(lambda inputs: attacked(logits_fn, *inputs), inputs)
            mixed = jnp.concatenate([perturb(x[:number], jnp.repeat(theta, each, 0)), x[number:]])
            (loss, (logits, rest)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                carry.params, carry.rest, mixed, y, jax.random.fold_in(key_step, _DROPOUT)
            )
            with jax.numpy_dtype_promotion("standard"):  # optax's Adam multiplies floats by integers
                updates, state = weights_tx.update(grads, carry.state, carry.params)
            right = (jnp.argmax(logits, -1).astype(jnp.int32) == y).astype(jnp.float32)
            metrics = {
                "loss": loss,
                "clean_accuracy": jnp.mean(right[number:]),
                "perturbed_accuracy": jnp.mean(right[:number]),
            }
            params = optax.apply_updates(carry.params, updates)
            return _Carry(params, rest, state, theta, attack_state), metrics

        carry, metrics = jax.lax.scan(step, carry, (jnp.asarray(rows), jnp.asarray(numbers)))
        return carry, jax.tree.map(jnp.mean, metrics)

    return epoch


def _parts(model, variables):
    """`(train, evaluate, params, rest)` of a flax module or of a function of variables and images."""
    from flax import linen

    if not isinstance(model, linen.Module):
        if not callable(model):
            raise TypeError(
                f"model must be a flax.linen.Module or a function of variables and images, got {type(model).__name__}."
            )
        return (
            lambda params, rest, images, key: (model(params, images), rest),
            lambda params, rest, images: model(params, images),
            variables,
            None,
        )
    names = inspect.signature(model.__call__).parameters.keys() & TRAINING.keys()
    training: dict[str, Any] = {name: TRAINING[name] for name in names}
    evaluation: dict[str, Any] = {name: not value for name, value in training.items()}
    if "params" not in variables:
        raise ValueError(f"variables must have the collection 'params', got {sorted(variables)}.")
    rest = {name: value for name, value in variables.items() if name != "params"}

    def train(params, rest, images, key):
        logits, changed = model.apply(
            {"params": params, **rest}, images, mutable=list(rest), rngs={"dropout": key}, **training
        )
        return logits, dict(changed)

    def evaluate(params, rest, images):
        return model.apply({"params": params, **rest}, images, mutable=False, **evaluation)

    return train, evaluate, variables["params"], rest


def _joined(params, rest):
    return params if rest is None else {"params": params, **rest}
