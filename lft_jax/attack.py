"""The front door for a universal perturbation of one's own model: a few images in, one perturbation out."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax import base, oracles
from lft_jax.data import check_images_labels, unit_range
from lft_jax.optimizers.fine_tuning import fine_tune_step
from lft_jax.pretrained import load_fine_tuner, pretrained_card
from lft_jax.tasks.augmentation import Augmentation
from lft_jax.tasks.perturbation import AttackLoss, Batch, Constraint, perturb
from lft_jax.tasks.uap import attack_metrics, checked_second_loss, constrained_oracle, exact_attack
from lft_jax.tasks.waves import WaveSearch

ORACLES = ("gradient", "query")
#: Of the front door, unless another is given.
AUGMENTATION = Augmentation()


class UniversalPerturbation(NamedTuple):
    """What `universal_perturbation` found.

    Attributes:
      perturbation: `[H, W, C]` numpy, to be added to images in [0, 1] (and the sum clipped to [0, 1]).
      history: `{name: [steps done] numpy}` after each step, on the images given: `loss`, `asr`, `margin`,
        `clean_accuracy`, the norms `l1`, `l2`, `linf` of the perturbation, and `queries`, image evaluations so far.
    """

    perturbation: np.ndarray
    history: dict[str, np.ndarray]


def universal_perturbation(
    logits_fn: Callable[[Any], Any],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epsilon: float | None = None,
    norm: str = "linf",
    penalty: float | None = None,
    steps: int = 20,
    optimizer: str | optax.GradientTransformation = "uap-linf",
    oracle: str = "gradient",
    loss: str | AttackLoss = "cross_entropy",
    second_loss: str | AttackLoss | None = "stored",
    augmentation: Augmentation | None = AUGMENTATION,
    num_directions: int = 10,
    smoothing: float = 1e-2,
    resolution: int | None = None,
    waves: WaveSearch | None = None,
    max_queries: int | None = None,
    key: jax.Array | None = None,
    callback: Callable[[dict[str, float]], bool | None] | None = None,
) -> UniversalPerturbation:
    """One perturbation that fools a classifier on every image, fine-tuned on a few.

    The steps run from a Python loop of one jitted step, which on CPU is faster than a `lax.scan` for models whose
    convolutions are slow inside one, and lets a run report and stop.

    Args:
      logits_fn: images `[N, H, W, C]` in [0, 1] -> *logits* (not probabilities) `[N, classes]`. With
        `oracle="gradient"` a differentiable JAX function; with "query" any function of numpy arrays.
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` integers: the true classes.
      epsilon: radius of the ball, in units of the image range (8 / 255, say), or None with a penalty.
      norm: "linf" or "l2" for a ball, "l1" or "l2" for a penalty.
      penalty: weight of the norm in the loss, or None with a ball.
      steps: K, fine-tuning steps at most.
      optimizer: name of a pretrained rule (`lft_jax.list_pretrained()`), path of a stored one, or any optax
        transformation.
      oracle: "gradient", or "query": `logits_fn` is only called, never differentiated.
      loss: minimised on the images, a kind of `AttackLoss` or one of those (for `kappa`, `beta`, `target`).
        "uap-l1" was meta-trained to minimise `AttackLoss("hinge", kappa=5.0)`, all other shipped rules the default.
      second_loss: added to it where gradients are exact, a kind of `AttackLoss` or one of those, whose gradient a rule
        may also see alone, for a second backward pass; None for none. "stored": what a pretrained rule was
        meta-trained with, and nothing for any other optimizer. The search of waves and the history are of `loss` alone.
      augmentation: how the images are changed anew in each step, at no queries, or None. Meant for few images, which
        are overfitted without; what it does to hundreds was not measured.
      num_directions: random (Rademacher) directions that a zeroth-order estimate (`oracle="query"`) tries both ways,
        each image its own: a step costs `2 * num_directions + 1` evaluations of each image, the last one for the
        history. (With `oracle="gradient"` it costs 2.)
      smoothing: of a zeroth-order estimate, in units of the image range.
      resolution: of the directions, see `lft_jax.oracles.zeroth_order`; None for each pixel on its own.
      waves: a search for a start among plane waves, `lft_jax.WaveSearch()`, before the first step, or None. Where only
        a few thousand queries can be made it finds more than all steps after it (docs/results.md).
      max_queries: image evaluations at most, the one of each clean image at the beginning included; the run ends
        before a step that would exceed it. None for no bound.
      key: of the augmentation and the zeroth-order directions; `jax.random.key(0)` if None.
      callback: called after each step with the history's last entries (and `step`, from 1); stops the run if it
        returns True.

    Raises:
      ValueError: for images outside [0, 1] or NaN, no images, labels out of range, an epsilon or penalty that is not
        above 0, both of them or neither, steps < 1, unknown names, losses that do not go together or with the oracle,
        logits of the wrong shape, or `max_queries` too small for one step.

    References:
      PAPER "The application".
    """
    base.check_at_least("steps", steps, 1)
    base.check_name("oracle", oracle, ORACLES)
    check_images_labels(images, labels)
    constraint = Constraint(norm, epsilon, penalty).check()
    loss = (loss if isinstance(loss, AttackLoss) else AttackLoss(loss)).check()
    for checked in (augmentation, waves):
        if checked is not None:
            checked.check()
    if resolution is not None and oracle == "gradient":
        raise ValueError(f"resolution: exact gradients have no directions, got {resolution} without oracle='query'.")
    tx = _stored(optimizer) if isinstance(optimizer, str) else _extra_args(optimizer)
    second_loss = _second_loss(second_loss, optimizer, oracle, loss.target)
    if loss.kind == "dominant" and oracle != "gradient":
        raise ValueError(f"loss: 'dominant' is for exact gradients, got it with oracle={oracle!r}.")
    batch = Batch(unit_range(jnp.asarray(images)), jnp.asarray(np.asarray(labels), jnp.int32))
    logits_fn = _as_partial(logits_fn) if oracle == "gradient" else _on_numpy(logits_fn)
    clean = _check_logits(logits_fn(batch.images), batch.labels)
    check_images_labels(images, labels, clean.shape[-1])
    for used in (loss, second_loss):
        if used is not None:
            used.check(clean.shape[-1])
    num_images = len(batch.labels)
    if oracle == "gradient":
        step, cost = functools.partial(_gradient_step, logits_fn, tx, augmentation, second_loss), 2 * num_images
    else:
        estimate = functools.partial(
            oracles.per_example_zeroth_order,
            num_examples=num_images,
            num_directions=num_directions,
            smoothing=smoothing,
            directions="rademacher",
            antithetic=True,
            resolution=resolution,
            opaque=True,
        )
        jitted = optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))
        step = functools.partial(_query_step, logits_fn, jitted, augmentation, estimate)
        cost = (2 * num_directions + 1) * num_images
    queries = num_images * (1 + (waves.evaluations if waves else 0))  # the clean images, and the search
    if max_queries is not None and max_queries < queries + cost:
        raise ValueError(f"max_queries: one step takes {queries + cost} image evaluations, got only {max_queries}.")

    key = jax.random.key(0) if key is None else key
    theta = jnp.zeros(batch.images.shape[1:], batch.images.dtype)
    if waves is not None:
        key, key_waves = jax.random.split(key)

        def mean_loss(theta):
            return jnp.mean(loss(logits_fn(perturb(batch.images, theta)), batch.labels)) + constraint.cost(theta)

        theta = waves(mean_loss, theta, constraint.scale(theta), key_waves, opaque=True)
    state, history = tx.init(theta), []
    for k in range(steps):
        if max_queries is not None and queries + cost > max_queries:
            break
        step_key, progress = jax.random.fold_in(key, k), jnp.float32(k / steps)
        theta, state, metrics = step(loss, constraint, batch, clean, theta, state, step_key, progress)
        queries += cost
        history.append({**{name: float(value) for name, value in metrics.items()}, "queries": queries})
        if callback is not None and callback({"step": k + 1, **history[-1]}):
            break
    columns = {name: np.asarray([entry[name] for entry in history]) for name in history[0]}
    return UniversalPerturbation(np.asarray(theta), columns)


def attack_success_rate(
    logits_fn: Callable[[Any], Any],
    images: np.ndarray,
    labels: np.ndarray,
    perturbation: np.ndarray,
    *,
    target: int | None = None,
    batch_size: int = 256,
) -> float:
    """The share, in [0, 1], of the images right when clean that the perturbation fools; NaN if none is right.

    Args:
      logits_fn: images `[N, H, W, C]` in [0, 1] -> logits `[N, classes]`; JAX or not.
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` integers.
      perturbation: `[H, W, C]`.
      target: count images taken for this class (those of the class itself are left out) instead of all mistakes.
      batch_size: images per call.

    Raises:
      ValueError: for bad images or labels, or a perturbation of another shape.
    """
    check_images_labels(images, labels)
    if np.shape(perturbation) != np.shape(images)[1:]:
        raise ValueError(f"perturbation must be {np.shape(images)[1:]}, got {np.shape(perturbation)}.")
    loss, call = AttackLoss(target=target), _on_numpy(logits_fn)
    fooled = counted = 0
    for first in range(0, len(labels), batch_size):
        batch = unit_range(jnp.asarray(images[first : first + batch_size]))
        truth = jnp.asarray(np.asarray(labels[first : first + batch_size]), jnp.int32)
        logits = _check_logits(call(perturb(batch, jnp.asarray(perturbation, batch.dtype))), truth)
        loss.check(logits.shape[-1])
        count = jnp.argmax(call(batch), -1) == truth
        count = count if target is None else count & (truth != target)
        fooled += int(jnp.sum(loss.success(logits, truth) & count))
        counted += int(jnp.sum(count))
    return fooled / counted if counted else float("nan")


def _stored(name):
    try:
        return load_fine_tuner(name)
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from error


def stored_second_loss(name: str, target: int | None = None) -> AttackLoss | None:
    """The second loss that a stored rule was meta-trained with, or None; raises a ValueError if there is no card."""
    flags = pretrained_card(name).get("meta_training") or {}
    kind = flags.get("second_loss", "none")
    return None if kind == "none" else AttackLoss(kind, flags.get("kappa", 0.0), target=target)


def _second_loss(given, optimizer, oracle, target):
    if given == "stored":
        return stored_second_loss(optimizer, target) if isinstance(optimizer, str) and oracle == "gradient" else None
    if given is None:
        return None
    if oracle != "gradient":
        raise ValueError(f"second_loss: a zeroth-order estimate is of one loss, got {given!r} with oracle={oracle!r}.")
    return checked_second_loss(given, target)


#: Wrapped once each, so that the programs compiled for an optimizer are found again.
_extra_args = functools.lru_cache(maxsize=16)(optax.with_extra_args_support)


def _as_partial(logits_fn):
    return logits_fn if isinstance(logits_fn, jax.tree_util.Partial) else jax.tree_util.Partial(logits_fn)


def _on_numpy(logits_fn):
    """Calls any function with numpy images, which it may write to, and gives its logits back to JAX."""
    return lambda images: jnp.asarray(np.asarray(logits_fn(np.array(images))), jnp.float32)


def _check_logits(logits, labels):
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"logits_fn must return logits [{len(labels)}, classes], got shape {logits.shape}.")
    return logits


@functools.partial(jax.jit, static_argnums=(1, 2))
def _gradient_step(
    logits_fn, tx, augmentation, second_loss, loss, constraint, batch, clean, theta, state, key, progress
):
    def attack(images):
        return exact_attack(logits_fn, Batch(images, batch.labels), loss, second_loss)

    return _step(logits_fn, tx, attack, augmentation, loss, constraint, batch, clean, theta, state, key, progress)


def _query_step(logits_fn, tx, augmentation, estimate, loss, constraint, batch, clean, theta, state, key, progress):
    def attack(images):
        return estimate(lambda thetas: loss(logits_fn(perturb(images, jnp.asarray(thetas))), batch.labels))

    return _step(logits_fn, tx, attack, augmentation, loss, constraint, batch, clean, theta, state, key, progress)


def _step(logits_fn, tx, attack, augmentation, loss, constraint, batch, clean, theta, state, key, progress):
    oracle = constrained_oracle(attack, constraint, batch.images, augmentation)
    theta, state, _ = fine_tune_step(tx, oracle, theta, state, key, progress=progress, project=constraint.project)
    logits = logits_fn(perturb(batch.images, theta))
    return theta, state, attack_metrics(clean, logits, batch.labels, theta, loss, constraint)
