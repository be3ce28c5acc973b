"""Few-shot universal adversarial perturbations (UAPs): one perturbation for all images of a task.

Task, losses and metrics follow arXiv 2009.13714; UAPs are from arXiv 1610.08401.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax._deprecation import old_keywords
from lft_jax.base import Episode, Oracle, TaskFamily
from lft_jax.data import TaskSize, check_images_labels, class_table, draw_rows, unit_range
from lft_jax.tasks.perturbation import AttackLoss, Batch, Constraint, as_constraint, margins, norm, perturb
from lft_jax.tasks.recipe import (
    AttackRecipe,
    LogitsFn,
    as_attack_loss,
    attack_oracle,
    initial_perturbation,
    search_start,
)

_STATIC = {"static": True}
#: The default of `uap_family`: the support images as they are, from a start of zeros.
PLAIN = AttackRecipe(augmentation=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UapFamily(TaskFamily):
    """UAP tasks on one image source against one victim. Build it with `uap_family`, which checks its arguments.

    Losses, oracle and start can be changed with `dataclasses.replace` and `with_recipe`; the arrays are then shared.

    Attributes:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` int32.
      table: `[classes, most]` int32, the rows of `images` of each class that episodes draw from, padded.
      counts: `[classes]` int32, how many entries of each row of `table` count.
      logits_fn: `images -> logits`, the victim.
      objective: the loss that the outer loss and the metrics are made of.
      constraint: the ball or the penalty.
      recipe: what is done with the support images, its losses resolved (`AttackRecipe.resolved`).
      size: classes, support and query images of a task.
      estimator: None for exact gradients, or `(example_losses, *, num_examples) -> Oracle`, for instance
        `lft_jax.oracles.ZerothOrder(num_directions=20)`.
    """

    images: jax.Array
    labels: jax.Array
    table: jax.Array
    counts: jax.Array
    logits_fn: LogitsFn
    objective: AttackLoss
    constraint: Constraint
    recipe: AttackRecipe
    size: TaskSize = dataclasses.field(metadata=_STATIC)
    estimator: Callable[..., Oracle] | None = dataclasses.field(default=None, metadata=_STATIC)

    def with_recipe(self, **changes: Any) -> "UapFamily":
        """The family with other fields of its recipe, losses among them given as `AttackLoss`."""
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **changes))

    def sample(self, key: jax.Array) -> Episode:
        """Draws classes, then disjoint support and query images of each: a `Batch` of each set."""
        support, query = draw_rows(key, self.table, self.counts, self.size)
        return Episode(self.batch(support.ravel()), self.batch(query.ravel()))

    def batch(self, rows: jax.Array) -> Batch:
        """The images of the given rows `[n]`, in [0, 1]."""
        return Batch(unit_range(self.images[rows]), self.labels[rows])

    def init(self, key: jax.Array) -> jax.Array:
        """`[H, W, C]`, the initial perturbation."""
        dtype = self.images.dtype if jnp.issubdtype(self.images.dtype, jnp.floating) else jnp.float32
        return initial_perturbation(self.recipe.start, self.constraint, self.images.shape[1:], dtype, key)

    def warm_start(self, theta: jax.Array, support: Batch, key: jax.Array) -> tuple[jax.Array, int]:
        """The best of `theta` and of the recipe's search for a start on the support images, if there is one."""
        return search_start(self.logits_fn, support, self.recipe, self.constraint, theta, key)

    def oracle(self, support: Batch) -> Oracle:
        """The gradient of the support loss, with the extras that a rule for perturbations can use."""
        return attack_oracle(self.logits_fn, support, self.recipe, self.constraint, self.estimator)

    def loss(self, theta: jax.Array, data: Batch) -> jax.Array:
        """`[]`, the mean objective over the images plus the penalty, if any."""
        losses = self.objective(self.logits_fn(perturb(data.images, theta)), data.labels)
        return jnp.mean(losses) + self.constraint.cost(theta)

    def project(self, theta: jax.Array) -> jax.Array:
        """Onto the ball; the identity under a penalty."""
        return self.constraint.project(theta)

    def metrics(self, theta: jax.Array, data: Batch) -> dict[str, jax.Array]:
        """See `attack_metrics`."""
        clean, attacked = self.logits_fn(data.images), self.logits_fn(perturb(data.images, theta))
        return attack_metrics(clean, attacked, data.labels, theta, self.objective, self.constraint)


def attack_metrics(
    clean_logits: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    theta: jax.Array,
    loss: AttackLoss,
    constraint: Constraint,
) -> dict[str, jax.Array]:
    """Attack success rate over the images that are right when clean, and the perturbation's size.

    Args:
      clean_logits: `[N, classes]` of the clean images.
      logits: `[N, classes]` of the perturbed images.
      labels: `[N]`.
      theta: `[H, W, C]`, the perturbation.
      loss: the objective; if it has a target, images of the target class do not count.
      constraint: whose penalty, if any, is part of the loss.

    Returns:
      `asr` and `clean_accuracy` in [0, 1] (`asr` is 0 if no image is right when clean), `margin` (mean logit of the
      label above the largest other), `loss`, and the norms `l1`, `l2`, `linf`.
    """
    right = jnp.argmax(clean_logits, -1) == labels
    counted = right if loss.target is None else right & (labels != loss.target)
    success = loss.success(logits, labels) & counted
    return {
        "asr": jnp.sum(success) / jnp.maximum(jnp.sum(counted), 1),
        "clean_accuracy": jnp.mean(right),
        "margin": jnp.mean(margins(logits, labels)),
        "loss": jnp.mean(loss(logits, labels)) + constraint.cost(theta),
        **{kind: norm(theta, kind) for kind in ("l1", "l2", "linf")},
    }


def _present_keywords(old, kwargs):
    if "queries" in old:
        kwargs["query_shots"] = old.pop("queries")
    if "penalty" in old:
        penalty, name, epsilon = old.pop("penalty"), kwargs.pop("norm", "linf"), kwargs.pop("epsilon", None)
        kwargs["constraint"] = Constraint(name, epsilon, penalty)
    if old:
        old = {"loss" if name == "support_loss" else name: value for name, value in old.items()}
        kwargs["recipe"] = AttackRecipe(**{"augmentation": None, **old})
    return kwargs


@old_keywords(
    _present_keywords,
    queries="query_shots=",
    penalty="constraint=Constraint(norm, penalty=...)",
    support_loss="recipe=AttackRecipe(loss=...)",
    second_loss="recipe=AttackRecipe(second_loss=...)",
    start="recipe=AttackRecipe(start=...)",
    waves="recipe=AttackRecipe(waves=...)",
    augmentation="recipe=AttackRecipe(augmentation=...)",
)
def uap_family(
    images: np.ndarray,
    labels: np.ndarray,
    logits_fn: LogitsFn,
    *,
    ways: int = 10,
    shots: int = 1,
    query_shots: int = 5,
    norm: str = "linf",
    epsilon: float | None = None,
    constraint: Constraint | None = None,
    loss: str | AttackLoss = "hinge",
    recipe: AttackRecipe = PLAIN,
    estimator: Callable[..., Oracle] | None = None,
) -> UapFamily:
    """A family of UAP tasks: `ways` classes, `shots` support and `query_shots` query images of each, one victim.

    Args:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1]; kept on the device as they are.
      labels: `[N]` integers from 0.
      logits_fn: the victim, images `[n, H, W, C]` in [0, 1] -> logits `[n, classes]`. A `jax.tree_util.Partial` whose
        arguments are its weights lets victims of one architecture share a compilation.
      ways: classes of a task.
      shots: support images per class.
      query_shots: query images per class, disjoint from the support images.
      norm: "linf" or "l2", of the ball.
      epsilon: radius of the ball, in units of the image range.
      constraint: given instead of `norm` and `epsilon`: `Constraint("l1", penalty=0.01)`, say.
      loss: the objective, a kind of `AttackLoss` or one of those: what the outer loss and the metrics are made of.
      recipe: what is done with the support images: their loss, augmentation, start. By default the objective
        is minimised on them as they are, from zeros.
      estimator: None for exact gradients, or `(example_losses, *, num_examples) -> Oracle`, such as
        `lft_jax.oracles.ZerothOrder()`.

    Returns:
      The family, a pytree.

    Raises:
      ValueError: for images outside [0, 1], labels out of range, a class with fewer than `shots + query_shots` images,
        fewer than `ways` classes, names or numbers out of range, and a second loss with another target than the
        objective's, or with an estimator.

    References:
      Zhao et al. 2021, Learned fine-tuner for incongruous few-shot adversarial learning, arXiv 2009.13714.
    """
    size = TaskSize(ways, shots, query_shots)
    constraint = as_constraint(norm, epsilon, constraint)
    objective = as_attack_loss(loss)
    if recipe.second_loss is not None and estimator is not None:
        raise ValueError("second_loss: a zeroth-order estimate is of one loss; leave it or the estimator out.")
    recipe = recipe.resolved(objective)
    if not isinstance(logits_fn, jax.tree_util.Partial):
        logits_fn = jax.tree_util.Partial(logits_fn)
    check_images_labels(images, labels)
    num_classes = jax.eval_shape(lambda x: logits_fn(unit_range(x)), images[:1]).shape[-1]
    check_images_labels(images, labels, num_classes)
    objective.check(num_classes)
    recipe.resolved(objective, num_classes)
    images, labels = np.asarray(images), np.asarray(labels).astype(np.int32)
    table, counts = _drawn_classes(labels, objective.target, size.per_class)
    if np.sum(counts > 0) < ways:
        raise ValueError(f"ways: {ways} classes per task were asked for, but the labels have {np.sum(counts > 0)}.")
    arrays = [jnp.asarray(x) for x in (images, labels, table, counts)]
    return UapFamily(*arrays, logits_fn, objective, constraint, recipe, size, estimator)


def _drawn_classes(labels, target, needed):
    table, counts = class_table(labels, int(labels.max()) + 1)
    if target is not None and target < len(counts):
        counts = np.where(np.arange(len(counts)) == target, 0, counts).astype(np.int32)
    for label, count in enumerate(counts):
        if 0 < count < needed:
            raise ValueError(
                f"shots + query_shots: class {label} has {count} images, fewer than the {needed} asked for."
            )
    return table, counts
