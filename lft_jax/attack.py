"""Universal adversarial perturbations of a given model, from a few images.

How the functions fit together::

    model, images, labels --checks--> _Problem --search of the recipe--> start
    start --K times: oracle, optax update, projection, metrics--> UniversalPerturbation

A Python loop runs one jitted step at a time, so that a callback can report and stop. On CPU this is also faster than
`lax.scan` for models whose convolutions are slow inside a scan.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Integer, PRNGKeyArray, Shaped

from lft_jax import base
from lft_jax._deprecation import old_keywords, renamed
from lft_jax.data import check_images_labels, unit_range
from lft_jax.models import Classifier
from lft_jax.optimizers.fine_tuning import fine_tune_step
from lft_jax.oracles import ZerothOrder
from lft_jax.pretrained import load_fine_tuner, pretrained_card
from lft_jax.tasks.perturbation import AttackLoss, Batch, Constraint, as_constraint, perturb
from lft_jax.tasks.recipe import (
    AttackRecipe,
    as_attack_loss,
    attack_oracle,
    initial_perturbation,
    resolved_loss,
    search_start,
)
from lft_jax.tasks.uap import attack_metrics

ORACLES = ("gradient", "query")
#: The oracle that is named "query".
QUERY = ZerothOrder(num_directions=10, smoothing=1e-2, per_example=True)
#: The default loss.
LOSS = AttackLoss("cross_entropy")


class UniversalPerturbation(NamedTuple):
    """The result of `universal_perturbation`.

    Attributes:
      perturbation: NumPy `[H, W, C]`. Add it to images in [0, 1] and clip the sum to [0, 1].
      history: `{name: NumPy [number of steps]}`, measured on the given images after each step:

        - `loss`: the mean loss, plus the penalty, if any.
        - `asr`: share of the images classified correctly when clean that the attack succeeds on.
        - `margin`: mean difference between the logit of the true class and the largest other logit.
        - `clean_accuracy`: share of the images classified correctly when clean.
        - `l1`, `l2`, `linf`: norms of the perturbation.
        - `queries`: evaluations of the model on one image so far.
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
    images: Shaped[Array | np.ndarray, "N H W C"],
    labels: Integer[Array | np.ndarray, " N"],
    *,
    norm: str = "linf",
    epsilon: float | None = None,
    constraint: Constraint | None = None,
    steps: int = 20,
    optimizer: str | optax.GradientTransformation = "uap-linf",
    oracle: str | ZerothOrder = "gradient",
    recipe: AttackRecipe | None = None,
    max_queries: int | None = None,
    key: PRNGKeyArray | None = None,
    callback: Callable[[dict[str, float]], bool | None] | None = None,
) -> UniversalPerturbation:
    """Fine-tunes one perturbation that makes a classifier err on many images, from a few images.

    Each step moves the perturbation `theta` against the gradient of::

        mean_i loss(model(clip(x_i + theta, 0, 1)), y_i) + penalty * ||theta||

    or an estimate of it, and projects it onto the ball, if any.

    Args:
      model: images `[N, H, W, C]` in [0, 1] -> *logits* (not probabilities) `[N, classes]`. For exact gradients
        a differentiable JAX function or a `lft_jax.models.Classifier`; for queries any function of NumPy arrays.
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` integers from 0, the true classes.
      norm: "linf" or "l2", the norm of the ball.
      epsilon: radius of the ball, in units of the image range, for example `8 / 255`.
      constraint: instead of `norm` and `epsilon`, for example a penalty: `Constraint("l1", penalty=0.01)`.
      steps: K, the largest number of fine-tuning steps.
      optimizer: the name of a pretrained rule (`lft_jax.list_pretrained()`), the path of a stored one, or any optax
        transformation.
      oracle: "gradient" differentiates the model; a step costs two queries per image. "query" or a `ZerothOrder` only
        evaluates it; a step costs the queries of an estimate, and one per image for the history. "query" is
        `ZerothOrder(num_directions=10, smoothing=1e-2, per_example=True)`: ten antithetic Rademacher directions per
        image.
      recipe: what is done with the images: their loss and augmentation, and the start. None for the defaults of
        `AttackRecipe`, with the second loss that a pretrained rule was meta-trained with. The rule "uap-l1" was
        meta-trained with `AttackLoss("hinge", kappa=5.0)`, all other shipped rules with the default loss.
      max_queries: the largest number of queries, including one per clean image at the beginning. The run ends before
        a step that would exceed it. None for no limit.
      key: PRNG key of augmentation, start and directions; `jax.random.key(0)` if None.
      callback: called after each step with the latest entries of the history, and `step`, from 1. The run stops if it
        returns True.

    Returns:
      The perturbation, and the history of the run.

    Raises:
      ValueError: for no images, images outside [0, 1] or NaN, labels out of range, an epsilon or penalty that is not
        above 0, both or neither of them, `steps` below 1, unknown names, losses that do not fit each other or the
        oracle, logits of a wrong shape, or a `max_queries` too small for one step.

    Examples:
      A perturbation of size 0.25 against a linear model of two classes:

      >>> weights = jax.random.normal(jax.random.key(0), (16, 2))
      >>> model = lambda x: x.reshape(len(x), -1) @ weights
      >>> images = np.random.default_rng(0).uniform(0.3, 0.7, (8, 4, 4, 1)).astype(np.float32)
      >>> labels = np.asarray(model(images).argmax(-1))
      >>> result = universal_perturbation(model, images, labels, epsilon=0.25, steps=5, optimizer=optax.sgd(0.1))
      >>> result.perturbation.shape, bool(np.abs(result.perturbation).max() <= 0.25)
      ((4, 4, 1), True)
      >>> result.history["queries"].tolist()
      [24, 40, 56, 72, 88]

    References:
      Zhao et al. 2021, arXiv 2009.13714; Moosavi-Dezfooli et al. 2017, arXiv 1610.08401.
    """
    base.check_at_least("steps", steps, 1)
    check_images_labels(images, labels)
    constraint = as_constraint(norm, epsilon, constraint)
    estimator = _as_estimator(oracle)
    tx = _stored(optimizer) if isinstance(optimizer, str) else _extra_args(optimizer)
    full_recipe = _as_recipe(recipe, optimizer, oracle)
    batch = Batch(unit_range(jnp.asarray(images)), jnp.asarray(np.asarray(labels), jnp.int32))
    eager = isinstance(model, Classifier) and model.host is not None
    if estimator is not None:
        model = _on_numpy(model)
    elif not eager:
        model = _as_partial(model)
    clean = _check_logits(model(batch.images), batch.labels)
    check_images_labels(images, labels, clean.shape[-1])
    full_recipe.resolved(resolved_loss(full_recipe), clean.shape[-1])
    problem = _Problem(model, batch, clean, full_recipe, constraint)
    num_images = len(batch.labels)
    jitted = optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))  # for steps that run eagerly
    if estimator is not None:
        step = functools.partial(_step, jitted, functools.partial(estimator, opaque=True))
        cost = (estimator.evaluations + 1) * num_images
    else:
        step = functools.partial(_step, jitted, None) if eager else functools.partial(_gradient_step, tx)
        cost = 2 * num_images
    # The clean images, and the search for a start.
    queries = num_images * (1 + (full_recipe.waves.evaluations if full_recipe.waves else 0))
    if max_queries is not None and max_queries < queries + cost:
        raise ValueError(
            f"max_queries must be at least {queries + cost}, the queries until the end of the first step, got "
            f"{max_queries}."
        )

    key = jax.random.key(0) if key is None else key
    theta, key = _start(problem, key)
    # The steps are compiled once for all starts.
    problem = dataclasses.replace(problem, recipe=dataclasses.replace(problem.recipe, start="zeros", waves=None))
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
    images: Shaped[Array | np.ndarray, "N H W C"],
    labels: Integer[Array | np.ndarray, " N"],
    perturbation: Float[Array | np.ndarray, "H W C"],
    *,
    target: int | None = None,
    batch_size: int = 256,
) -> float:
    """The attack success rate (ASR) of a perturbation.

    Of the images that are classified correctly when clean, the share that is misclassified when perturbed.

    Args:
      model: images `[N, H, W, C]` in [0, 1] -> logits `[N, classes]`, any function of NumPy arrays.
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` integers from 0, the true classes.
      perturbation: `[H, W, C]`, added to every image; the sum is clipped to [0, 1].
      target: count images that are classified as this class, instead of all misclassified ones; images of the class
        itself are left out.
      batch_size: number of images per call of the model.

    Returns:
      The success rate in [0, 1]; NaN if no image is classified correctly when clean.

    Raises:
      ValueError: for images outside [0, 1], labels or a target out of range, or a perturbation of another shape than
        the images.

    Examples:
      Adding 0.5 makes a threshold on the mean brightness return class 1 for every image:

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
        eligible = jnp.argmax(call(batch), -1) == truth
        eligible = eligible if target is None else eligible & (truth != target)
        fooled += int(jnp.sum(loss.success(logits, truth) & eligible))
        counted += int(jnp.sum(eligible))
    return fooled / counted if counted else float("nan")


def stored_second_loss(name: str, target: int | None = None) -> AttackLoss | None:
    """The second loss that a stored rule was meta-trained with, or None.

    Args:
      name: name of a pretrained rule, or path of a stored one.
      target: target class of the loss.

    Raises:
      ValueError: if the rule has no card.
    """
    flags = pretrained_card(name).get("meta_training") or {}
    kind = flags.get("second_loss", "none")
    return None if kind == "none" else AttackLoss(kind, flags.get("kappa", 0.0), target=target)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Problem:
    """The constants of a run.

    Attributes:
      model: images -> logits.
      batch: the images `[N, H, W, C]` and their labels.
      clean: `[N, classes]`, the logits of the clean images.
      recipe: resolved.
      constraint: the ball or the penalty.
    """

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


def _as_recipe(recipe, optimizer, oracle) -> AttackRecipe:
    """The recipe, or the default one, with its losses resolved and checked against the oracle."""
    if recipe is None:
        recipe = AttackRecipe(second_loss=_stored_with(optimizer, oracle))
    loss = LOSS if recipe.loss is None else as_attack_loss(recipe.loss)
    recipe = recipe.resolved(loss)
    if oracle != "gradient" and recipe.second_loss is not None:
        raise ValueError(
            f"second_loss: a zeroth-order oracle takes only one loss, got {recipe.second_loss} with oracle={oracle!r}."
        )
    if oracle != "gradient" and loss.kind == "dominant":
        raise ValueError(f"loss: 'dominant' is for exact gradients only, got oracle={oracle!r}.")
    return recipe


def _stored_with(optimizer, oracle, target=None):
    return stored_second_loss(optimizer, target) if isinstance(optimizer, str) and oracle == "gradient" else None


def _stored(name):
    try:
        return load_fine_tuner(name)
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from error


#: Cached, since jitted steps have the wrapped optimizer as a static argument: a new object would compile again.
_extra_args = functools.lru_cache(maxsize=16)(optax.with_extra_args_support)


def _as_partial(model):
    return model if isinstance(model, jax.tree_util.Partial) else jax.tree_util.Partial(model)


def _on_numpy(model):
    """Wraps a function of writable NumPy images, so that it takes and returns JAX arrays."""
    return jax.tree_util.Partial(lambda images: jnp.asarray(np.asarray(model(np.array(images))), jnp.float32))


def _check_logits(logits, labels):
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"model must return logits [{len(labels)}, classes], got shape {logits.shape}.")
    return logits


def _start(problem, key):
    """The start of the recipe, `[H, W, C]`, and the key of the steps."""
    images, recipe = problem.batch.images, problem.recipe
    if recipe.start != "zeros" or recipe.waves is not None:  # a start of zeros uses no key
        key, key_start = jax.random.split(key)
    else:
        key_start = key
    key_random = jax.random.fold_in(key_start, 1)
    theta = initial_perturbation(recipe.start, problem.constraint, images.shape[1:], images.dtype, key_random)
    # The model may not be traceable, so the search always runs eagerly.
    theta, _ = search_start(problem.model, problem.batch, recipe, problem.constraint, theta, key_start, opaque=True)
    return theta, key


def _step(tx, estimator, problem, theta, state, key, progress):
    """The next perturbation, the next optimizer state, and the metrics of that perturbation."""
    oracle = attack_oracle(problem.model, problem.batch, problem.recipe, problem.constraint, estimator)
    project = problem.constraint.project
    theta, state, _ = fine_tune_step(tx, oracle, theta, state, key, progress=progress, project=project)
    logits = problem.model(perturb(problem.batch.images, theta))
    labels, loss = problem.batch.labels, resolved_loss(problem.recipe)
    return theta, state, attack_metrics(problem.clean, logits, labels, theta, loss, problem.constraint)


@functools.partial(jax.jit, static_argnums=0)
def _gradient_step(tx, problem, theta, state, key, progress):
    return _step(tx, None, problem, theta, state, key, progress)
