"""A universal perturbation of one's own model: a few images in, one perturbation out.

How the pieces compose::

    model, images, labels --checks--> _Problem --recipe's search--> start
    start --K times: oracle, optax update, projection, metrics--> UniversalPerturbation

The steps run from a Python loop of one jitted step, which on CPU is faster than a `lax.scan` for models whose
convolutions are slow inside one, and lets a run report and stop.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax import base
from lft_jax._deprecation import old_keywords, renamed
from lft_jax.data import check_images_labels, unit_range
from lft_jax.optimizers.fine_tuning import fine_tune_step
from lft_jax.oracles import ZerothOrder
from lft_jax.pretrained import load_fine_tuner, pretrained_card
from lft_jax.tasks.perturbation import AttackLoss, Batch, Constraint, as_constraint, perturb
from lft_jax.tasks.recipe import AttackRecipe, as_attack_loss, attack_oracle, initial_perturbation, search_start
from lft_jax.tasks.uap import attack_metrics

ORACLES = ("gradient", "query")
#: What `oracle="query"` stands for.
QUERY = ZerothOrder(num_directions=10, smoothing=1e-2, per_example=True)
#: Minimised by default.
LOSS = AttackLoss("cross_entropy")


class UniversalPerturbation(NamedTuple):
    """What `universal_perturbation` found.

    Attributes:
      perturbation: `[H, W, C]` numpy, to be added to images in [0, 1] (and the sum clipped to [0, 1]).
      history: `{name: [steps done] numpy}` after each step, on the images given: `loss`, `asr`, `margin`,
        `clean_accuracy`, the norms `l1`, `l2`, `linf` of the perturbation, and `queries`, image evaluations so far.
    """

    perturbation: np.ndarray
    history: dict[str, np.ndarray]


def _present_keywords(old, kwargs):
    if "logits_fn" in old:
        kwargs["model"] = old.pop("logits_fn")
    if "penalty" in old:
        penalty, name, epsilon = old.pop("penalty"), kwargs.pop("norm", "linf"), kwargs.pop("epsilon", None)
        kwargs["constraint"] = Constraint(name, epsilon, penalty)
    names = ("num_directions", "smoothing", "resolution")
    settings = {name: old.pop(name) for name in names if name in old}
    if settings and kwargs.get("oracle") == "query":
        kwargs["oracle"] = dataclasses.replace(QUERY, **settings)
    elif settings.get("resolution") is not None:
        raise ValueError("resolution: exact gradients have no directions; leave it out, or pass oracle='query'.")
    if old:
        if old.get("second_loss", "stored") == "stored":
            target = getattr(old.get("loss"), "target", None)
            optimizer, oracle = kwargs.get("optimizer", "uap-linf"), kwargs.get("oracle", "gradient")
            old["second_loss"] = _stored_with(optimizer, oracle, target)
        kwargs["recipe"] = AttackRecipe(**old)
    return kwargs


@old_keywords(
    _present_keywords,
    logits_fn="model=",
    penalty="constraint=Constraint(norm, penalty=...)",
    loss="recipe=AttackRecipe(loss=...)",
    second_loss="recipe=AttackRecipe(second_loss=...)",
    augmentation="recipe=AttackRecipe(augmentation=...)",
    waves="recipe=AttackRecipe(waves=...)",
    num_directions="oracle=ZerothOrder(num_directions=..., per_example=True)",
    smoothing="oracle=ZerothOrder(smoothing=..., per_example=True)",
    resolution="oracle=ZerothOrder(resolution=..., per_example=True)",
)
def universal_perturbation(
    model: Callable[[Any], Any],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    norm: str = "linf",
    epsilon: float | None = None,
    constraint: Constraint | None = None,
    steps: int = 20,
    optimizer: str | optax.GradientTransformation = "uap-linf",
    oracle: str | ZerothOrder = "gradient",
    recipe: AttackRecipe | None = None,
    max_queries: int | None = None,
    key: jax.Array | None = None,
    callback: Callable[[dict[str, float]], bool | None] | None = None,
) -> UniversalPerturbation:
    """One perturbation that fools a classifier on every image, fine-tuned on a few images.

    Args:
      model: images `[N, H, W, C]` in [0, 1] -> *logits* (not probabilities) `[N, classes]`. With exact gradients a
        differentiable JAX function; with queries any function of NumPy arrays.
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` integers: the true classes.
      norm: "linf" or "l2", of the ball.
      epsilon: radius of the ball, in units of the image range: 8 / 255, say.
      constraint: given instead of `norm` and `epsilon`, for a penalty on the norm: `Constraint("l1", penalty=0.01)`.
      steps: K, fine-tuning steps at most.
      optimizer: name of a pretrained rule (`lft_jax.list_pretrained()`), path of a stored one, or any optax
        transformation.
      oracle: how the model is reached. "gradient": it is differentiated, and a step costs two evaluations of each
        image. "query" or a `ZerothOrder`: it is only called, and a step costs the evaluations of an estimate and one
        more of each image; "query" stands for ten Rademacher directions per image, each tried both ways.
      recipe: what is done with the images: loss, augmentation, start. None: the defaults of `AttackRecipe`, with the
        second loss that a pretrained rule was meta-trained with. "uap-l1" was meta-trained to minimise
        `AttackLoss("hinge", kappa=5.0)`, all other shipped rules the default loss.
      max_queries: image evaluations at most, the one of each clean image at the beginning included; the run ends
        before a step that would exceed it. None for no bound.
      key: PRNG key of augmentation, start and directions; `jax.random.key(0)` if None.
      callback: called after each step with the history's last entries (and `step`, from 1); stops the run if it
        returns True.

    Returns:
      The perturbation and the history of its making.

    Raises:
      ValueError: for images outside [0, 1] or NaN, no images, labels out of range, an epsilon or penalty that is not
        above 0, both of them or neither, steps < 1, unknown names, losses that do not go together or with the oracle,
        logits of the wrong shape, or `max_queries` too small for one step.

    References:
      Zhao et al. 2021, arXiv 2009.13714; Moosavi-Dezfooli et al. 2017, arXiv 1610.08401.

    Examples:
      A linear model of two classes, fooled by a perturbation of size 0.2:

      >>> weights = jax.random.normal(jax.random.key(0), (16, 2))
      >>> model = lambda x: x.reshape(len(x), -1) @ weights
      >>> images = np.random.default_rng(0).uniform(0.3, 0.7, (8, 4, 4, 1)).astype(np.float32)
      >>> labels = np.asarray(model(images).argmax(-1))
      >>> result = universal_perturbation(model, images, labels, epsilon=0.2, steps=5, optimizer=optax.sgd(0.1))
      >>> result.perturbation.shape, float(np.abs(result.perturbation).max().round(3)) <= 0.2
      ((4, 4, 1), True)
    """
    base.check_at_least("steps", steps, 1)
    check_images_labels(images, labels)
    constraint = as_constraint(norm, epsilon, constraint)
    estimator = _as_estimator(oracle)
    tx = _stored(optimizer) if isinstance(optimizer, str) else _extra_args(optimizer)
    recipe = _as_recipe(recipe, optimizer, oracle)
    batch = Batch(unit_range(jnp.asarray(images)), jnp.asarray(np.asarray(labels), jnp.int32))
    model = _as_partial(model) if estimator is None else _on_numpy(model)
    clean = _check_logits(model(batch.images), batch.labels)
    check_images_labels(images, labels, clean.shape[-1])
    recipe.resolved(recipe.loss, clean.shape[-1])
    problem = _Problem(model, batch, clean, recipe, constraint)
    num_images = len(batch.labels)
    if estimator is None:
        step, cost = functools.partial(_gradient_step, tx), 2 * num_images
    else:
        jitted = optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))
        step = functools.partial(_step, jitted, functools.partial(estimator, opaque=True))
        cost = (estimator.evaluations + 1) * num_images
    queries = num_images * (1 + (recipe.waves.evaluations if recipe.waves else 0))  # the clean images, and the search
    if max_queries is not None and max_queries < queries + cost:
        raise ValueError(f"max_queries: one step takes {queries + cost} image evaluations, got only {max_queries}.")

    key = jax.random.key(0) if key is None else key
    theta, key = _start(problem, key)
    state, history = tx.init(theta), []
    for k in range(steps):
        if max_queries is not None and queries + cost > max_queries:
            break
        theta, state, metrics = step(problem, theta, state, jax.random.fold_in(key, k), jnp.float32(k / steps))
        queries += cost
        history.append({**{name: float(value) for name, value in metrics.items()}, "queries": queries})
        if callback is not None and callback({"step": k + 1, **history[-1]}):
            break
    columns = {name: np.asarray([entry[name] for entry in history]) for name in history[0]}
    return UniversalPerturbation(np.asarray(theta), columns)


@renamed(logits_fn="model")
def attack_success_rate(
    model: Callable[[Any], Any],
    images: np.ndarray,
    labels: np.ndarray,
    perturbation: np.ndarray,
    *,
    target: int | None = None,
    batch_size: int = 256,
) -> float:
    """The share, in [0, 1], of the images right when clean that the perturbation fools; NaN if none is right.

    Args:
      model: images `[N, H, W, C]` in [0, 1] -> logits `[N, classes]`; JAX or not.
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` integers.
      perturbation: `[H, W, C]`.
      target: count images that are classified as this class (images of the class itself are left out) instead of all
        misclassified ones.
      batch_size: images per call.

    Raises:
      ValueError: for bad images or labels, or a perturbation of another shape.

    Examples:
      Adding 0.5 makes a threshold on the mean brightness answer 1 for every image:

      >>> model = lambda x: np.stack([np.full(len(x), 0.5), np.mean(x, (1, 2, 3))], 1)
      >>> images = np.full((4, 2, 2, 1), 0.25, np.float32)
      >>> attack_success_rate(model, images, np.zeros(4, int), np.full((2, 2, 1), 0.5))
      1.0
    """
    check_images_labels(images, labels)
    if np.shape(perturbation) != np.shape(images)[1:]:
        raise ValueError(f"perturbation must be {np.shape(images)[1:]}, got {np.shape(perturbation)}.")
    loss, call = AttackLoss(target=target), _on_numpy(model)
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


def stored_second_loss(name: str, target: int | None = None) -> AttackLoss | None:
    """The second loss that a stored rule was meta-trained with, or None; raises a ValueError if there is no card."""
    flags = pretrained_card(name).get("meta_training") or {}
    kind = flags.get("second_loss", "none")
    return None if kind == "none" else AttackLoss(kind, flags.get("kappa", 0.0), target=target)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Problem:
    """What stays the same from step to step: the model, the images `[N, H, W, C]`, their clean logits, the attack."""

    model: Callable[[jax.Array], jax.Array]
    batch: Batch
    clean: jax.Array
    recipe: AttackRecipe
    constraint: Constraint


def _as_estimator(oracle):
    """None for exact gradients, or a `ZerothOrder`."""
    if isinstance(oracle, ZerothOrder):
        return oracle
    return QUERY if base.check_name("oracle", oracle, ORACLES) == "query" else None


def _as_recipe(recipe, optimizer, oracle):
    """The recipe with its losses resolved, or the default one."""
    if recipe is None:
        recipe = AttackRecipe(second_loss=_stored_with(optimizer, oracle))
    loss = LOSS if recipe.loss is None else as_attack_loss(recipe.loss)
    recipe = recipe.resolved(loss)
    if oracle != "gradient" and recipe.second_loss is not None:
        raise ValueError(
            f"second_loss: a zeroth-order estimate is of one loss, got {recipe.second_loss} with oracle={oracle!r}."
        )
    if oracle != "gradient" and loss.kind == "dominant":
        raise ValueError(f"loss: 'dominant' is for exact gradients, got it with oracle={oracle!r}.")
    return recipe


def _stored_with(optimizer, oracle, target=None):
    return stored_second_loss(optimizer, target) if isinstance(optimizer, str) and oracle == "gradient" else None


def _stored(name):
    try:
        return load_fine_tuner(name)
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from error


#: Wrapped once each, so that the programs compiled for an optimizer are found again.
_extra_args = functools.lru_cache(maxsize=16)(optax.with_extra_args_support)


def _as_partial(model):
    return model if isinstance(model, jax.tree_util.Partial) else jax.tree_util.Partial(model)


def _on_numpy(model):
    """Calls any function with numpy images, which it may write to, and gives its logits back to JAX."""
    return jax.tree_util.Partial(lambda images: jnp.asarray(np.asarray(model(np.array(images))), jnp.float32))


def _check_logits(logits, labels):
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"model must return logits [{len(labels)}, classes], got shape {logits.shape}.")
    return logits


def _start(problem, key):
    """`[H, W, C]`, the start of the recipe, and the key of the steps."""
    images, recipe = problem.batch.images, problem.recipe
    if recipe.start != "zeros" or recipe.waves is not None:  # zeros take no randomness
        key, key_start = jax.random.split(key)
    else:
        key_start = key
    theta = initial_perturbation(recipe.start, problem.constraint, images.shape[1:], images.dtype, key_start)
    # Eagerly, as the steps are run.
    theta, _ = search_start(problem.model, problem.batch, recipe, problem.constraint, theta, key_start, opaque=True)
    return theta, key


def _step(tx, estimator, problem, theta, state, key, progress):
    """The next perturbation and optimizer state, and the metrics of the former on the support images."""
    oracle = attack_oracle(problem.model, problem.batch, problem.recipe, problem.constraint, estimator)
    project = problem.constraint.project
    theta, state, _ = fine_tune_step(tx, oracle, theta, state, key, progress=progress, project=project)
    logits = problem.model(perturb(problem.batch.images, theta))
    labels, loss = problem.batch.labels, problem.recipe.loss
    return theta, state, attack_metrics(problem.clean, logits, labels, theta, loss, problem.constraint)


@functools.partial(jax.jit, static_argnums=0)
def _gradient_step(tx, problem, theta, state, key, progress):
    return _step(tx, None, problem, theta, state, key, progress)
