"""How the support images of an attack become gradients and a start, whichever optimizer makes the steps."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lft_jax import base, oracles
from lft_jax.base import Estimate, Oracle
from lft_jax.tasks.augmentation import Augmentation
from lft_jax.tasks.perturbation import LOSSES, AttackLoss, Batch, Constraint, perturb
from lft_jax.tasks.waves import WaveSearch

STARTS = ("zeros", "random")
_STATIC = {"static": True}

#: Images `[N, H, W, C]` in [0, 1] -> logits `[N, classes]`.
LogitsFn = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttackRecipe:
    """What a universal attack does with the support images, whichever optimizer makes the steps.

    `uap_family` and `universal_perturbation` take the same recipes, so that a rule can be used as it was meta-trained.

    Attributes:
      loss: what is minimised on the support images, a kind of `AttackLoss` or one of those. None: the objective of a
        family, the clamped cross-entropy of `universal_perturbation`.
      second_loss: added to it, a kind of `AttackLoss` or one of those, for a second backward pass; a rule may see its
        gradient alone too (the feature "second"). None for none. For exact gradients only. A search for a start
        ignores it.
      augmentation: how the support images are re-sampled in each step, which costs no queries; None to keep them as
        they are. A few images are overfitted without it; on hundreds of images it was not measured.
      start: the initial perturbation, "zeros", or "random": uniform within the scale of the constraint.
      waves: a search among plane waves for a better start, or None. Where only a few thousand queries can be made, it
        finds more than all the steps that follow.

    Examples:
      >>> AttackRecipe(loss="hinge", waves=WaveSearch.within(100)).check().start
      'zeros'
    """

    loss: str | AttackLoss | None = None
    second_loss: str | AttackLoss | None = None
    augmentation: Augmentation | None = dataclasses.field(default=Augmentation(), metadata=_STATIC)
    start: str = dataclasses.field(default="zeros", metadata=_STATIC)
    waves: WaveSearch | None = dataclasses.field(default=None, metadata=_STATIC)

    def check(self) -> "AttackRecipe":
        """Returns itself; raises a ValueError if a field is out of range."""
        base.check_name("start", self.start, STARTS)
        for part in (self.augmentation, self.waves):
            if part is not None:
                part.check()
        return self

    def resolved(self, objective: AttackLoss, num_classes: int | None = None) -> "AttackRecipe":
        """The recipe with both losses as `AttackLoss`, checked.

        Args:
          objective: the loss where the recipe names none; the second loss must have its target.
          num_classes: of the model, to check targets; None if unknown.

        Raises:
          ValueError: for a field out of range, and a second loss with another target than the objective's.
        """
        self.check()
        loss = objective if self.loss is None else as_attack_loss(self.loss, "loss of the recipe", objective.target)
        second = self.second_loss
        if second is not None:
            second = as_attack_loss(second, "second_loss", objective.target)
            if second.target != objective.target:
                raise ValueError(
                    f"second_loss: its target {second.target} is not that of the objective, {objective.target}."
                )
            second.check(num_classes)
        return dataclasses.replace(self, loss=loss.check(num_classes), second_loss=second)


def as_attack_loss(loss: str | AttackLoss, argument: str = "loss", target: int | None = None) -> AttackLoss:
    """An `AttackLoss`, checked; a kind that is only named is given the target."""
    if not isinstance(loss, AttackLoss):
        loss = AttackLoss(base.check_name(argument, loss, LOSSES), target=target)
    return loss.check()


def initial_perturbation(
    start: str, constraint: Constraint, shape: tuple[int, ...], dtype: jnp.dtype, key: jax.Array
) -> jax.Array:
    """`[H, W, C]` of zeros, or uniform within the scale of the constraint, projected; see `AttackRecipe.start`."""
    theta = jnp.zeros(shape, dtype)
    if start == "zeros":
        return theta
    return constraint.project(constraint.scale(theta) * jax.random.uniform(key, shape, dtype, -1, 1))


def search_start(
    logits_fn: LogitsFn,
    support: Batch,
    recipe: AttackRecipe,
    constraint: Constraint,
    theta: jax.Array,
    key: jax.Array,
    *,
    opaque: bool = False,
) -> tuple[jax.Array, int]:
    """The better of a start and of the recipe's search for one, and the queries that the search costs.

    Args:
      logits_fn: the model.
      support: the support images and their labels.
      recipe: resolved; whose `waves` are searched, if any.
      constraint: the ball or the penalty.
      theta: `[H, W, C]`, the start that is compared with.
      key: PRNG key of the search.
      opaque: whether JAX cannot trace `logits_fn`.
    """
    if recipe.waves is None:
        return theta, 0

    def support_loss(theta):
        losses = recipe.loss(logits_fn(perturb(support.images, theta)), support.labels)
        return jnp.mean(losses) + constraint.cost(theta)

    best = recipe.waves(support_loss, theta, constraint.scale(theta), key, opaque=opaque)
    return best, recipe.waves.evaluations * len(support.labels)


def attack_oracle(
    logits_fn: LogitsFn,
    support: Batch,
    recipe: AttackRecipe,
    constraint: Constraint,
    estimator: Callable[..., Oracle] | None = None,
) -> Oracle:
    """The gradient of the support loss of a recipe, with the extras that a rule for perturbations can use.

    Args:
      logits_fn: the model.
      support: the support images and their labels.
      recipe: resolved.
      constraint: the ball or the penalty.
      estimator: None for exact gradients, or `(example_losses, *, num_examples) -> Oracle`.
    """

    def losses(loss, images):
        return lambda theta: loss(logits_fn(perturb(images, theta)), support.labels)

    def attack(images):
        num_examples = len(support.labels)
        if estimator is not None:
            return estimator(losses(recipe.loss, images), num_examples=num_examples)
        second = None if recipe.second_loss is None else losses(recipe.second_loss, images)
        return oracles.per_example_gradient(
            losses(recipe.loss, images), num_examples=num_examples, second_losses=second
        )

    return constrained_oracle(attack, constraint, support.images, recipe.augmentation)


def constrained_oracle(
    attack: Callable[[jax.Array], Oracle],
    constraint: Constraint,
    images: jax.Array,
    augmentation: Augmentation | None = None,
) -> Oracle:
    """An oracle of the attack loss on support images, with the penalty, if any, and the extras `scale` and `context`.

    Args:
      attack: images like those given -> an oracle of the attack loss on them.
      constraint: the ball or the penalty.
      images: `[S, H, W, C]`, the support images.
      augmentation: how they are re-sampled in each step, or None.
    """
    context = jnp.stack([jnp.mean(images, 0), jnp.std(images, 0)])

    def oracle(theta, key, **sampling):
        seen = images
        if augmentation is not None:
            key, key_images = jax.random.split(key)
            seen = augmentation(images, key_images)
        estimate = attack(seen)(theta, key, **sampling)
        extras = {**estimate.extras, "scale": constraint.scale(theta), "context": context}
        # The penalty does not touch the victim: its gradient is always exact.
        cost, pull = jax.value_and_grad(constraint.cost)(theta)
        return Estimate(estimate.value + cost, estimate.grads + pull, estimate.queries, extras)

    return oracle
