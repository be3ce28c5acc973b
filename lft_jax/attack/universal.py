"""The attack: one perturbation of a given model, fine-tuned on a few images."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Integer, PRNGKeyArray, Shaped

from lft_jax import base
from lft_jax._deprecation import old_keywords
from lft_jax._present import is_known, present
from lft_jax.attack import _checks, _patterns
from lft_jax.attack._run import Counter, Run, reporter
from lft_jax.attack._start import better, first_perturbation, fold_in, keys
from lft_jax.attack._steps import Problem, asker, make_step, prepare, scores
from lft_jax.attack.result import Paused, UniversalPerturbation
from lft_jax.data import unit_range
from lft_jax.models import Classifier, as_classifier, on_numpy
from lft_jax.oracles import ZerothOrder
from lft_jax.pretrained import load_fine_tuner
from lft_jax.tasks.pattern_attack import PatternAttack
from lft_jax.tasks.patterns import PatternSearch
from lft_jax.tasks.perturbation import AttackLoss, Batch, Constraint, as_constraint
from lft_jax.tasks.proxies import Proxies
from lft_jax.tasks.recipe import (
    AttackRecipe,
    as_attack_loss,
    end_queries,
    resolved_loss,
    search_queries,
    step_queries,
)
from lft_jax.tasks.synthetic import synthetic_images
from lft_jax.tasks.tile import LARGE, fits

ORACLES = ("auto", "gradient", "query", "decision")
#: The oracle that is named "query" where an optimizer or a recipe is given.
QUERY = ZerothOrder(num_directions=10, smoothing=1e-2, per_example=True)
#: The search for a start with exact gradients in a ball: 65 patterns on 12 proxies.
SEARCH = PatternSearch(tiles=12, waves=12, refinements=40)
#: The recipe in an linf ball with exact gradients, for large images of three channels and no target.
TILED = AttackRecipe(augmentation=Proxies(), start="tile", step_scale=0.4)
#: The default loss.
LOSS = AttackLoss("cross_entropy")
#: Images that the history is measured on, at most.
HISTORY_IMAGES = 50
#: Images of a data-free attack.
SYNTHETIC_IMAGES = 30
#: Numbers folded into the key of a run, beyond those of its steps.
_KEY_SHOWN, _KEY_SYNTHETIC, _KEY_END = 2**32 - 1, 2**32 - 2, 2**32 - 3


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
        if "waves" in old:
            old["search"] = old.pop("waves")
        kwargs["recipe"] = AttackRecipe(**old)
    return kwargs


@old_keywords(
    _present_keywords,
    logits_fn="model=",
    penalty="constraint=Constraint(norm, penalty=...)",
    loss="recipe=AttackRecipe(loss=...)",
    augmentation="recipe=AttackRecipe(augmentation=...)",
    waves="recipe=AttackRecipe(search=...)",
    num_directions="oracle=ZerothOrder(num_directions=..., per_example=True)",
    smoothing="oracle=ZerothOrder(smoothing=..., per_example=True)",
    resolution="oracle=ZerothOrder(resolution=..., per_example=True)",
)
def universal_perturbation(
    model: Any,
    images: Shaped[Array | np.ndarray, "N H W C"] | None,
    labels: Integer[Array | np.ndarray, " N"] | None = None,
    *,
    shape: tuple[int, int, int] | None = None,
    norm: str = "linf",
    epsilon: float | None = None,
    constraint: Constraint | None = None,
    target: int | None = None,
    steps: int = 20,
    optimizer: str | optax.GradientTransformation = "uap-linf",
    oracle: str | ZerothOrder | PatternAttack = "auto",
    recipe: AttackRecipe | None = None,
    start: Float[Array | np.ndarray, "H W C"] | UniversalPerturbation | None = None,
    max_queries: int | None = None,
    batch_size: int | None = None,
    key: PRNGKeyArray | None = None,
    callback: Callable[[dict[str, float]], bool | None] | None = None,
    progress: bool | Callable[[dict[str, float]], object] = True,
) -> UniversalPerturbation:
    """Fine-tunes one perturbation that makes a classifier err on many images, from a few images.

    Each step moves the perturbation `theta` against the gradient of::

        mean_i loss(model(clip(x_i + theta, 0, 1)), y_i) + penalty * ||theta||

    or an estimate of it, and projects it onto the ball, if any.

    Args:
      model: a `lft_jax.models.Classifier` (an adapter makes one of a model of any framework), or a function of images
        `[N, H, W, C]` in [0, 1] that returns *logits* (not probabilities) `[N, classes]`, or one column for two
        classes. Its present weights are attacked, also if it was attacked with others before.
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1]; None for a data-free attack, on 30 images of
        `lft_jax.tasks.synthetic_images`.
      labels: `[N]` integers from 0, the true classes; None for the classes that the model predicts.
      shape: `(H, W, C)` of the images of a data-free attack; None for the model's `input_shape`.
      norm: "linf" or "l2", the norm of the ball.
      epsilon: radius of the ball, in units of the image range, for example `8 / 255`.
      constraint: instead of `norm` and `epsilon`, for example a penalty: `Constraint("l1", penalty=0.01)`.
      target: the class that images should be classified as; None for any wrong class.
      steps: K, the largest number of fine-tuning steps.
      optimizer: the name of a pretrained rule (`lft_jax.list_pretrained()`), the path of a stored one, or any optax
        transformation.
      oracle: "gradient" differentiates the model; a step costs one query per image or proxy for the gradient, one per
        jigsaw for its label, and those of the history. "query" only evaluates it: without an optimizer and a recipe
        and in a ball, it is a search among patterns, `lft_jax.PatternAttack()`, for `max_queries` evaluations, or for
        `1 + 21 * steps` of each image. "decision" is the same for a model of which only the predicted class is used,
        whatever its scores. Else "query" is `ZerothOrder(num_directions=10, smoothing=1e-2, per_example=True)`, ten
        antithetic Rademacher directions per image: a step of a `ZerothOrder` costs the queries of an estimate, and
        those of the history. "auto" is "gradient" where the model has gradients, else "query". The history costs one
        query per image and step, and none in a search; of more than 50 images it sees 50, the same in each step, which
        the key chooses.
      recipe: what is done with the images: their loss and augmentation, and the start. None for the defaults of
        `AttackRecipe`; with exact gradients, for `Proxies` and a start. In a ball, for images of less than 128 pixels
        along a side, this is the best of 65 patterns: `PatternSearch(tiles=12, waves=12, refinements=40)`, 808 queries
        for ten images, left out if `max_queries` is too small. The result is that start if the steps end at no lower
        loss on 30 new proxies, which takes 80 queries, and those of the history again, unless a callback ends them. In
        an linf ball, for larger images of three channels and without a target, the start is a tile that was learned on
        a model of natural images, and steps are shorter: `AttackRecipe(start="tile", step_scale=0.4)`. The rule
        "uap-l1" was meta-trained with `AttackLoss("hinge", kappa=5.0)`, all other shipped rules with the default loss.
      start: a perturbation to begin with, instead of that of the recipe, whose other fields hold; a search among
        patterns by queries changes the signs of its coordinates, and nothing else. A result whose run ended early goes
        on where it stopped, as if it had not stopped, if all other arguments are the same (the clean images are
        evaluated again); `steps` and `max_queries` count those before. A finished one is a start like an array.
      max_queries: the largest number of queries, including one per clean image at the beginning. The run ends before
        a step that would exceed it. None for no limit.
      batch_size: largest number of images in one call of the model; see `lft_jax.models.Classifier`. None for that of
        the model. Outside of JAX, images of a gradient in several batches are evaluated twice; the result's `queries`
        count that, and `max_queries` and the history do not.
      key: PRNG key of augmentation, start and directions; `jax.random.key(0)` if None.
      callback: called after each step with the latest entries of the history, and `step`, from 1. The run stops if it
        returns True.
      progress: whether to show a progress bar, if the terminal can; or a function that is called as `callback`, and
        whose result is ignored.

    Returns:
      The perturbation, the history of the run, and a summary.

    Raises:
      TypeError: for a model of a framework without its adapter, a target that is no integer, or a key that is none.
      ValueError: for no images, images outside [0, 1] or NaN or with channels first, labels out of range or without
        images, a `shape` with images or none without them, an epsilon or penalty that is not above 0, an epsilon above
        1 (linf), both or neither of them, `steps` below 1, unknown names, losses that do not fit each other or the
        oracle, logits of a wrong shape, a `max_queries` too small for one step, a `start` that stopped with another
        optimizer, model, images or constraint or after `steps`, and NaN in what the model returns or in its gradient.
      Exception: what the model raises. Like a NaN and KeyboardInterrupt, it ends the run, and the exception has an
        attribute `partial`: the `UniversalPerturbation` found so far, to go on from with `start=error.partial`.

    Warns:
      UserWarning: if the clean accuracy is no better than chance, the model seems to return probabilities, or with
        "auto" a function has no gradients.

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
      [842, 880, 918, 956, 1054]

    References:
      Zhao et al. 2021, arXiv 2009.13714; Moosavi-Dezfooli et al. 2017, arXiv 1610.08401.
    """
    base.check_count("steps", steps, 1)
    _checks.check_target(target)
    key = jax.random.key(0) if key is None else key
    _checks.check_key(key)
    if max_queries is not None:
        base.check_count("max_queries", max_queries, 1)
    synthetic = images is None
    if images is None:
        _checks.check_without_images(model, labels, shape)
        images = _synthetic(model, shape, key)
    elif shape is not None:
        raise ValueError(f"shape must be None where there are images, whose shape it is, got {shape!r}.")
    images = _checks.checked_images(images, labels)
    constraint = as_constraint(norm, epsilon, constraint)
    tx = _stored(optimizer) if isinstance(optimizer, str) else _extra_args(optimizer)
    classifier, estimator = _with_oracle(model, oracle, images, batch_size)
    if max_queries is not None and classifier.host is not None:  # rows that fill up a batch would count
        classifier = dataclasses.replace(classifier, host=dataclasses.replace(classifier.host, pads=False))
    full_recipe = _as_recipe(recipe, estimator, target, constraint, np.shape(images)[1:])
    patterns = _patterns.pattern_attack(oracle, estimator, optimizer, recipe, constraint)
    evaluations = 0
    if patterns is not None:
        evaluations = len(images) * (1 + (QUERY.evaluations + 1) * steps) if max_queries is None else max_queries
        base.check_at_least("max_queries", evaluations, 2)
        rows = _patterns.chosen_images(patterns, evaluations, len(images), key)
        images, labels = images[rows], None if labels is None else np.asarray(labels)[rows]
        classifier = _patterns.decided(classifier, unit_range(jnp.asarray(images))) if patterns.decision else classifier
    counter = Counter()
    classifier = counter.counting(classifier)
    # A step costs the queries of its oracle, and one for each image of the history.
    cost = step_queries(full_recipe, np.shape(images), 1 if estimator is None else estimator.evaluations)
    watched = min(len(images), HISTORY_IMAGES)
    cost += watched
    searched, compared = (count(full_recipe, np.shape(images)) for count in (search_queries, end_queries))
    of_end = compared + watched if compared else 0  # whether the start is the result
    first = cost + of_end
    if recipe is None and max_queries is not None and max_queries < len(images) + searched + first:
        full_recipe, searched, first = dataclasses.replace(full_recipe, search=None), 0, cost
    if start is not None:
        searched, first = 0, cost
    if patterns is None:
        _check_max_queries(max_queries, len(images), searched, first)

    began, x = time.monotonic(), unit_range(jnp.asarray(images))
    x = x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x  # the rule's transform takes no other
    function = present(classifier.traced(), x) if classifier.host is None and estimator is None else None
    ask = asker(classifier, function)
    clean = ask(scores, x)
    _checks.check_logits(clean)
    if oracle == "auto" and estimator is not None and not isinstance(model, Classifier):
        _checks.warn(
            "model is a function that JAX cannot differentiate, so only its values are used. For exact gradients "
            "pass the adapter of its framework (lft_jax.models.from_torch, from_keras, ...); oracle='query' is the "
            "same without this warning."
        )
    labelled = labels is not None
    on_host = np.asarray(clean)  # where operations need no compilation
    labels = np.asarray(labels) if labelled else np.argmax(on_host, -1)
    _checks.check_clean(on_host, labels, images)
    full_recipe.resolved(resolved_loss(full_recipe), clean.shape[-1])
    support = Batch(x, jnp.asarray(labels, jnp.int32))
    shown = (support, clean) if patterns is not None else _shown(support, clean, key)
    problem = Problem(support, *shown, full_recipe, constraint)
    # The steps are compiled once for all starts.
    after_start = dataclasses.replace(problem, recipe=dataclasses.replace(full_recipe, start="zeros", search=None))
    step = make_step(classifier, function, tx, estimator)
    stopped = start if isinstance(start, UniversalPerturbation) and start.paused is not None else None
    queries = len(x) + searched
    kind = "gradient" if estimator is None else "query"
    kind = "decision" if patterns is not None and patterns.decision else kind
    run = Run(problem, kind, steps, labelled, synthetic, began, counter)
    with run.keeping(), reporter(progress, steps) as report:
        if patterns is not None:
            begin = None
            if stopped is not None:
                begin = run.resume(stopped, x, _patterns.as_optimizer(patterns, problem))
            elif start is not None:
                begin, _ = first_perturbation(ask, problem, key, start, run)
            attacker = _patterns.Attacker(patterns, classifier, problem, evaluations, steps, max_queries)
            attacker.take_steps(key, run, begin, report, callback)
            return run.result()
        if stopped is None:
            if searched and function is not None:
                prepare(tx, function, after_start, key, compared=bool(compared))
            theta, key = first_perturbation(ask, problem, key, start, run)
            state, done = tx.init(theta), 0
            # A start that was given is its giver's to compare with.
            found = theta if searched and compared and np.any(np.asarray(theta)) else None
        else:
            theta, state, done, found, _ = run.resume(stopped, x, tx)
            queries += stopped.queries
            _, key = keys(problem.recipe, key)
        end = steps
        if max_queries is not None:
            end = min(steps, done + max(0, max_queries - queries - of_end * (found is not None)) // cost)
        for k in range(done, end):
            theta, state, metrics = step(after_start, theta, state, fold_in(key, k), jnp.float32(k / steps))
            queries, outcome = queries + cost, theta
            if found is not None and k == end - 1:
                key_end = fold_in(key, _KEY_END)
                outcome, metrics, kept = better(ask, after_start, found, theta, key_end, metrics)
                queries += compared + kept * watched
            entry = {name: float(value) for name, value in jax.device_get(metrics).items()}
            run.add(Paused(theta, state, k + 1, found), {**entry, "queries": queries}, outcome)
            report({"step": k + 1, **run.history[-1]})
            if callback is not None and callback({"step": k + 1, **run.history[-1]}):
                break
    return run.result()


def _synthetic(model, shape, key) -> np.ndarray:
    """The images of a data-free attack."""
    shape = model.input_shape if shape is None else shape
    return np.asarray(synthetic_images(fold_in(key, _KEY_SYNTHETIC), SYNTHETIC_IMAGES, shape))


def _shown(support, clean, key) -> tuple[Batch, jax.Array]:
    """The images that the history is measured on, and their clean logits."""
    if len(support.labels) <= HISTORY_IMAGES:
        return support, clean
    rows = jax.random.permutation(fold_in(key, _KEY_SHOWN), len(support.labels))[:HISTORY_IMAGES]
    return Batch(support.images[rows], support.labels[rows]), clean[rows]


def _with_oracle(model, oracle, images, batch_size) -> tuple[Classifier, ZerothOrder | None]:
    """The model as the oracle needs it, and the estimator; None for exact gradients."""

    def sized(classifier):
        return classifier if batch_size is None else dataclasses.replace(classifier, batch_size=batch_size)

    if isinstance(oracle, ZerothOrder):
        return sized(on_numpy(model)), oracle
    if isinstance(oracle, PatternAttack) or base.check_name("oracle", oracle, ORACLES) in ("query", "decision"):
        return sized(on_numpy(model)), QUERY
    classifier = sized(as_classifier(model))
    try:
        if not classifier.differentiable:
            raise ValueError("it has no gradients")
        if classifier.host is None and not is_known(classifier.traced()):
            shape = jax.ShapeDtypeStruct(np.shape(images), jnp.float32)
            jax.eval_shape(jax.grad(lambda x: jnp.sum(classifier(x))), shape)
    except Exception as error:
        classifier = sized(on_numpy(model))
        if oracle == "auto":
            return classifier, QUERY
        classifier(images[:1])  # what is wrong with its output comes first
        reason, *_ = str(error).splitlines() or [""]
        raise ValueError(
            f"model cannot be differentiated by JAX ({type(error).__name__}: {reason}). Write it with jax.numpy, pass "
            "the adapter of its framework (lft_jax.models.from_torch, ...), or oracle='query' to evaluate it only."
        ) from error
    return classifier, None


def _as_recipe(recipe, estimator, target, constraint, shape) -> AttackRecipe:
    """The recipe, or the default one, with its loss resolved and checked against the oracle and the target."""
    if recipe is None:
        recipe = AttackRecipe() if estimator is not None else _default_recipe(target, constraint, shape)
    loss = as_attack_loss(LOSS if recipe.loss is None else recipe.loss, target=target)
    if target is not None:
        if loss.target not in (None, target):
            raise ValueError(f"target: {target} is not that of the recipe's loss, {loss.target}.")
        loss = dataclasses.replace(loss, target=target)
    recipe = dataclasses.replace(recipe, loss=loss).resolved(loss)
    if estimator is not None and loss.kind == "dominant":
        raise ValueError(f"loss: 'dominant' is for exact gradients only, got {estimator}.")
    return recipe


def _default_recipe(target, constraint, shape) -> AttackRecipe:
    """The recipe for exact gradients."""
    if min(shape[:2]) < LARGE:
        return AttackRecipe(augmentation=Proxies(), search=None if constraint.epsilon is None else SEARCH)
    tiled = constraint.norm == "linf" and target is None and fits(shape)
    return TILED if tiled else AttackRecipe(augmentation=Proxies())


def _check_max_queries(max_queries, images, searched, cost):
    least = images + searched + cost
    if max_queries is not None and max_queries < least:
        search = f"{searched} for the search of a start, " if searched else ""
        raise ValueError(
            f"max_queries must be at least {least}: {images} for the clean images, {search}and {cost} for the "
            f"first step; got {max_queries}."
        )


def _stored(name):
    try:
        return load_fine_tuner(name)
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from error


#: Cached, since jitted steps have the wrapped optimizer as a static argument: a new object would compile again.
_extra_args = functools.lru_cache(maxsize=16)(optax.with_extra_args_support)
