"""What an attack does with its support images: their loss and augmentation, and the start."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lft_jax import _periods, _spectrum, base, oracles
from lft_jax._deprecation import renamed_fields
from lft_jax.base import Estimate, Oracle
from lft_jax.tasks._searching import Searched
from lft_jax.tasks.augmentation import Augmentation
from lft_jax.tasks.patterns import PatternSearch
from lft_jax.tasks.perturbation import LOSSES, AttackLoss, Batch, Constraint, perturb
from lft_jax.tasks.proxies import Proxies
from lft_jax.tasks.tile import repeated_tile
from lft_jax.tasks.waves import WaveSearch

STARTS = ("zeros", "random", "tile")
_STATIC = {"static": True}
_SEARCHED = 12  # proxies that a search evaluates patterns on
_GAIN = 0.1  # by how much the best pattern must lower the loss of the support images themselves
_CHECKED = 50  # support images that this is measured on, at most

#: Images `[N, H, W, C]` in [0, 1] -> logits `[N, classes]`.
LogitsFn = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@renamed_fields(waves="search")
@dataclasses.dataclass(frozen=True)
class AttackRecipe:
    """What a universal attack does with its support images, for any optimizer.

    `uap_family` and `universal_perturbation` take the same recipes, so a rule can be used as it was meta-trained.

    Attributes:
      loss: the loss on the support images, an `AttackLoss` or the name of its kind. None for the default: the objective
        of a family, the clamped cross-entropy in `universal_perturbation`.
      augmentation: random changes of the support images in each step: an `Augmentation`, which costs no queries, or
        `Proxies`, new images made from parts of them; None for none. Without either, a perturbation overfits a few
        images.
      start: the initial perturbation: "zeros", "random", uniform within the scale of the constraint, or "tile", a tile
        of 32x32 pixels that fools a public model of natural images, repeated, for images of three channels.
      search: a search for a better start among patterns, a `PatternSearch` or `WaveSearch` (plane waves alone), or
        None. With a few thousand queries, it gains more than all the steps that follow.
      batch: support images of a step, drawn at random without replacement; None for all. Not with `Proxies`, which
        have a size of their own.
      step_scale: factor of the scale that optimizers are told, and so of the steps of those that use it; above 0.
        Below 1 for a good start, which long steps would undo.

    Examples:
      >>> AttackRecipe(loss="hinge", search=WaveSearch.within(100)).check().start
      'zeros'
    """

    loss: str | AttackLoss | None = None
    augmentation: Augmentation | Proxies | None = dataclasses.field(default=Augmentation(), metadata=_STATIC)
    start: str = dataclasses.field(default="zeros", metadata=_STATIC)
    search: WaveSearch | PatternSearch | None = dataclasses.field(default=None, metadata=_STATIC)
    batch: int | None = dataclasses.field(default=None, metadata=_STATIC)
    step_scale: float = dataclasses.field(default=1.0, metadata=_STATIC)

    def check(self) -> "AttackRecipe":
        """Returns itself.

        Raises:
          ValueError: for a field out of range.
        """
        base.check_name("start", self.start, STARTS)
        base.check_positive("step_scale", self.step_scale)
        for part in (self.augmentation, self.search):
            if part is not None:
                part.check()
        if self.batch is not None:
            base.check_at_least("batch of the recipe", self.batch, 1)
            if isinstance(self.augmentation, Proxies):
                raise ValueError(f"batch of the recipe: Proxies(size=...) is that of a step, got batch={self.batch!r}.")
        return self

    def resolved(self, objective: AttackLoss, num_classes: int | None = None) -> "AttackRecipe":
        """The recipe with its loss as an `AttackLoss`, checked.

        Args:
          objective: the loss if the recipe has none. A loss that is given by name takes its target.
          num_classes: classes of the model, to check targets; None if unknown.

        Raises:
          ValueError: for a field out of range.
        """
        self.check()
        loss = objective if self.loss is None else as_attack_loss(self.loss, "loss of the recipe", objective.target)
        return dataclasses.replace(self, loss=loss.check(num_classes))


def as_attack_loss(loss: str | AttackLoss, argument: str = "loss", target: int | jax.Array | None = None) -> AttackLoss:
    """An `AttackLoss`, checked; a loss that is given by name takes `target`."""
    if not isinstance(loss, AttackLoss):
        loss = AttackLoss(base.check_name(argument, loss, LOSSES), target=target)
    return loss.check()


def resolved_loss(recipe: AttackRecipe) -> AttackLoss:
    """The loss of a recipe that is resolved.

    Raises:
      ValueError: if it is not.
    """
    if not isinstance(recipe.loss, AttackLoss):
        raise ValueError(f"recipe: its loss must be an AttackLoss (see AttackRecipe.resolved), got {recipe.loss!r}.")
    return recipe.loss


def initial_perturbation(
    start: str, constraint: Constraint, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, key: PRNGKeyArray
) -> Float[Array, "H W C"]:
    """Zeros, or uniform or the tile within the scale of the constraint, and projected; see `AttackRecipe.start`.

    Raises:
      ValueError: for the tile and images without three channels.
    """
    theta = jnp.zeros(shape, dtype)
    if start == "zeros":
        return theta
    unit = jnp.asarray(repeated_tile(shape), dtype) if start == "tile" else jax.random.uniform(key, shape, dtype, -1, 1)
    return constraint.project(constraint.scale(theta) * unit)


def search_start(
    logits_fn: LogitsFn,
    support: Batch,
    recipe: AttackRecipe,
    constraint: Constraint,
    theta: Float[Array, "H W C"],
    key: PRNGKeyArray,
) -> tuple[Float[Array, "H W C"], int]:
    """The better one of a start and the best pattern, if the recipe searches for one.

    Args:
      logits_fn: the model, which JAX traces.
      support: the support images and their labels.
      recipe: resolved; its `search` is the one.
      constraint: the ball or the penalty.
      theta: `[H, W, C]`, the start.
      key: PRNG key of the search.

    Returns:
      The start, and the queries that the search costs.
    """
    if recipe.search is None:
        return theta, 0
    fixed = jax.lax.stop_gradient(theta)  # the comparison has no derivative, a kept start has its own
    batch, state = begin_search(logits_fn, support, recipe, constraint, fixed, key)

    def turn(state, number):
        return search_turn(logits_fn, batch, recipe, constraint, fixed, state, number)[0], None

    numbers = jnp.arange(recipe.search.evaluations, dtype=jnp.int32)
    state, _ = jax.lax.scan(turn, state, numbers)
    best = end_search(logits_fn, support, recipe, constraint, theta, state)
    return best, search_queries(recipe, support.images.shape)


def searched_in_turns(
    ask: Callable[..., Any],
    support: Batch,
    recipe: AttackRecipe,
    constraint: Constraint,
    theta: Float[Array, "H W C"],
    key: PRNGKeyArray,
    watch: Callable[[jax.Array, jax.Array], object] | None = None,
) -> Float[Array, "H W C"]:
    """What `search_start` finds, one turn at a time, with a recipe that has a search.

    Args:
      ask: `(program, *args) -> program(model, *args)`, for the programs below.
      support: the support images and their labels.
      recipe: resolved; its `search` is the one.
      constraint: the ball or the penalty.
      theta: `[H, W, C]`, the start.
      key: PRNG key of the search.
      watch: called with each perturbation that is tried and its loss; or None.
    """
    assert recipe.search is not None
    batch, state = ask(begin_search, support, recipe, constraint, theta, key)
    for number in range(recipe.search.evaluations):
        state, tried, loss = ask(search_turn, batch, recipe, constraint, theta, state, np.int32(number))
        if watch is not None:
            watch(tried, loss)
    return ask(end_search, support, recipe, constraint, theta, state)


def begin_search(logits_fn, support, recipe, constraint, theta, key) -> tuple[Batch, Searched]:
    """What patterns are tried on, and the search before its first turn."""
    if isinstance(recipe.augmentation, Proxies):
        few, scale = _searched(recipe.augmentation), constraint.scale(theta)
        batch = _proxies(logits_fn, support, few, jax.random.fold_in(key, 2), scale)
    else:
        batch = _minibatch(support, recipe, jax.random.fold_in(key, 2))
    return batch, recipe.search.begin(theta, key)


def search_turn(logits_fn, batch, recipe, constraint, theta, state, number):
    """A turn of the search, as `Search.turn`."""
    loss_on = functools.partial(_loss_on, logits_fn, batch, recipe, constraint)
    return recipe.search.turn(state, number, theta, constraint.scale(theta), loss_on)


def end_search(logits_fn, support, recipe, constraint, theta, state) -> Float[Array, "H W C"]:
    """The better one of the start and the best pattern."""
    best = recipe.search.end(state, theta, constraint.scale(theta))
    if isinstance(recipe.augmentation, Proxies):
        # Where jigsaws resemble no image, as those of digits, a pattern may fool them alone, and steps keep to it.
        checked = Batch(support.images[:_CHECKED], support.labels[:_CHECKED])
        at_start, at_best = (
            _loss_on(logits_fn, checked, recipe, constraint, jax.lax.stop_gradient(x)) for x in (theta, best)
        )
        best = jnp.where(at_start - at_best > _GAIN, best, theta)
    return best


def _loss_on(logits_fn, batch, recipe, constraint, theta):
    """The mean loss of a batch under a perturbation, plus the penalty; without derivatives."""
    losses = resolved_loss(recipe)(_evaluate(logits_fn)(perturb(batch.images, theta)), batch.labels)
    return jnp.mean(losses) + constraint.cost(theta)


def _evaluate(logits_fn):
    """The model where it is not differentiated; a replayed program has a way of its own to ask for that."""
    return getattr(logits_fn, "evaluate", logits_fn)


def better_end(
    logits_fn: LogitsFn,
    support: Batch,
    recipe: AttackRecipe,
    constraint: Constraint,
    start: Float[Array, "H W C"],
    end: Float[Array, "H W C"],
    key: PRNGKeyArray,
) -> Bool[Array, ""]:
    """Whether steps ended below the loss of the pattern that they started from, on new proxies.

    A good pattern fools most images at once, few steps may undo it, and the loss of ten images does not show that.

    Args:
      logits_fn: the model.
      support: the support images and their labels.
      recipe: resolved, with `Proxies`.
      constraint: the ball or the penalty.
      start: `[H, W, C]`, what a search found.
      end: `[H, W, C]`, the perturbation after the steps.
      key: PRNG key of the proxies, none of those of the search and the steps.
    """
    batch = _proxies(logits_fn, support, recipe.augmentation, key, constraint.scale(start))
    at_start, at_end = (_loss_on(logits_fn, batch, recipe, constraint, theta) for theta in (start, end))
    return at_end < at_start


def end_queries(recipe: AttackRecipe, shape: tuple[int, ...]) -> int:
    """The queries of `better_end` for support images of shape `(N, H, W, C)`; 0 without a search or proxies."""
    if recipe.search is None or not isinstance(recipe.augmentation, Proxies):
        return 0
    return recipe.augmentation.jigsaws(shape[1:]) + 2 * recipe.augmentation.size


def _searched(proxies):
    """The proxies that patterns are tried on: a few, since they only have to rank patterns."""
    return dataclasses.replace(proxies, size=min(proxies.size, _SEARCHED))


def _proxies(logits_fn, support, proxies, key, scale) -> Batch:
    """A batch of proxies: whole images with their labels, jigsaws with the model's predictions."""
    images, sources = proxies(support.images, key, scale=scale)
    labels = support.labels[sources]
    if len(sources) < len(images):
        logits = _evaluate(logits_fn)(images[len(sources) :])
        labels = jnp.concatenate([labels, jnp.argmax(logits, -1).astype(labels.dtype)])
    return Batch(images, labels)


def _batch_size(recipe, count) -> int:
    """The number of support images in a step, of `count`."""
    return count if recipe.batch is None else min(recipe.batch, count)


def _minibatch(support, recipe, key) -> Batch:
    """Random support images and their labels; all of them, in their order, if the recipe does not limit them."""
    count = len(support.labels)
    size = _batch_size(recipe, count)
    if size == count:
        return support
    rows = jax.random.permutation(key, count)[:size]
    return Batch(support.images[rows], support.labels[rows])


def attack_oracle(
    logits_fn: LogitsFn,
    support: Batch,
    recipe: AttackRecipe,
    constraint: Constraint,
    estimator: Callable[..., Oracle] | None = None,
) -> Oracle:
    """The oracle of the support loss of a recipe, with the extras that a rule for perturbations can use.

    Args:
      logits_fn: the model.
      support: the support images and their labels.
      recipe: resolved.
      constraint: the ball or the penalty.
      estimator: None for exact gradients, or a zeroth-order one, `(example_losses, *, num_examples) -> Oracle`.
    """

    images, augmentation = support.images, recipe.augmentation
    minibatches = _batch_size(recipe, len(support.labels)) < len(support.labels)

    def losses(loss, batch):
        return lambda theta: loss(logits_fn(perturb(batch.images, theta)), batch.labels)

    def attack(batch):
        num_examples = len(batch.labels)
        if estimator is not None:
            return estimator(losses(recipe.loss, batch), num_examples=num_examples)
        return oracles.per_example_gradient(
            losses(recipe.loss, batch),
            num_examples=num_examples,
            summarize=lambda copies: {
                "periods": _periods.summarized(copies),
                "noise": _spectrum.noise_of_mean(copies),
            },
        )

    def draw(key, scale):
        if isinstance(augmentation, Proxies):
            return _proxies(logits_fn, support, augmentation, key, scale), augmentation.jigsaws(images.shape[1:])
        part = support
        if minibatches:
            key, key_rows = jax.random.split(key)
            part = _minibatch(support, recipe, key_rows)
        return part if augmentation is None else part._replace(images=augmentation(part.images, key)), 0

    return constrained_oracle(
        lambda changed: attack(support if changed is None else changed),
        constraint,
        images,
        None if augmentation is None and not minibatches else draw,
        recipe.step_scale,
    )


def search_queries(recipe: AttackRecipe, shape: tuple[int, ...]) -> int:
    """The queries of `search_start` for support images of shape `(N, H, W, C)`."""
    if recipe.search is None:
        return 0
    if isinstance(recipe.augmentation, Proxies):
        few = _searched(recipe.augmentation)
        return few.jigsaws(shape[1:]) + recipe.search.evaluations * few.size + 2 * min(shape[0], _CHECKED)
    return recipe.search.evaluations * _batch_size(recipe, shape[0])


def step_queries(recipe: AttackRecipe, shape: tuple[int, ...], evaluations: int = 1) -> int:
    """The queries of one answer of `attack_oracle`.

    Args:
      recipe: resolved.
      shape: `(N, H, W, C)`, that of the support images.
      evaluations: of each example, by an estimator; 1 for exact gradients.
    """
    if isinstance(recipe.augmentation, Proxies):
        return recipe.augmentation.jigsaws(shape[1:]) + evaluations * recipe.augmentation.size
    return evaluations * _batch_size(recipe, shape[0])


def constrained_oracle(
    attack: Callable[[Any], Oracle],
    constraint: Constraint,
    images: Float[Array, "S H W C"],
    draw: Callable[[jax.Array, jax.Array], tuple[Any, int]] | None = None,
    step_scale: float = 1.0,
) -> Oracle:
    """An oracle of the attack loss plus the penalty, if any, with the extras `scale` and `context`.

    Args:
      attack: what `draw` returns, or None -> an oracle of the attack loss.
      constraint: the ball or the penalty.
      images: `[S, H, W, C]`, the support images.
      draw: `(key, scale of the constraint) -> (data for attack, queries that it took)`, called in each step; or None.
      step_scale: factor of the scale that optimizers are told.
    """
    context = jnp.stack([jnp.mean(images, 0), jnp.std(images, 0)])

    def oracle(theta, key, **sampling):
        data, queries, scale = None, 0, constraint.scale(theta)
        if draw is not None:
            key, key_data = jax.random.split(key)
            data, queries = draw(key_data, scale)
        estimate = attack(data)(theta, key, **sampling)
        extras = {**estimate.extras, "scale": step_scale * scale, "context": context}
        # The penalty costs no queries, so its gradient is always exact.
        cost, pull = jax.value_and_grad(constraint.cost)(theta)
        return Estimate(estimate.value + cost, estimate.grads + pull, estimate.queries + queries, extras)

    return oracle
