"""Few-shot universal adversarial perturbations (UAPs): one perturbation for all images of a task.

The task follows arXiv 2009.13714; UAPs are from arXiv 1610.08401.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray, Shaped

from lft_jax import base
from lft_jax._deprecation import old_keywords, renamed
from lft_jax._present import as_partial, refreshed
from lft_jax.base import Episode, Oracle, TaskFamily
from lft_jax.data import TaskSize, check_images_labels, class_table, draw_rows, unit_range
from lft_jax.tasks.perturbation import AttackLoss, Batch, Constraint, as_constraint, margins, norm, perturb
from lft_jax.tasks.recipe import (
    AttackRecipe,
    LogitsFn,
    as_attack_loss,
    attack_oracle,
    initial_perturbation,
    resolved_loss,
    search_start,
)

_STATIC = {"static": True}
#: The default of `uap_family`: no augmentation, and a start of zeros.
PLAIN = AttackRecipe(augmentation=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UapFamily(TaskFamily):
    """UAP tasks on one image source against one victim. Built by `uap_family`, which checks its arguments.

    A task draws classes, and disjoint support and query images of each. Its optimizee `theta`, `[H, W, C]`, is added to
    all images, and its loss is the mean over them, plus the penalty, if any::

        mean_i objective(logits_fn(clip(x_i + theta, 0, 1)), y_i) + penalty * ||theta||

    Fields can be changed with `dataclasses.replace` and `with_recipe`; the copies share their arrays.

    Attributes:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` int32, the true classes.
      table: `[classes, most]` int32, the indices into `images` of each class, padded; see `lft_jax.data.class_table`.
      counts: `[classes]` int32, number of valid entries in each row of `table`; 0 for a class that is never drawn.
      logits_fn: the victim: images `[n, H, W, C]` in [0, 1] -> logits `[n, classes]`.
      objective: the loss that the outer loss and the metrics use.
      constraint: the ball or the penalty.
      recipe: what is done with the support images; its loss is resolved (`AttackRecipe.resolved`).
      size: numbers of classes, support and query images of a task.
      estimator: None for exact gradients, or a zeroth-order one, `(example_losses, *, num_examples) -> Oracle`, such as
        `lft_jax.ZerothOrder()`.
      radius_factor: each task has a radius of its own, log-uniform between that of the ball divided by this factor and
        multiplied by it; 1 for the same radius.
    """

    images: jax.Array
    labels: jax.Array
    table: jax.Array
    counts: jax.Array
    logits_fn: jax.tree_util.Partial
    objective: AttackLoss
    constraint: Constraint
    recipe: AttackRecipe
    size: TaskSize = dataclasses.field(metadata=_STATIC)
    estimator: Callable[..., Oracle] | None = dataclasses.field(default=None, metadata=_STATIC)
    radius_factor: float = dataclasses.field(default=1.0, metadata=_STATIC)

    @renamed(waves="search")
    def with_recipe(self, **changes: Any) -> "UapFamily":
        """The family with some fields of its recipe replaced, a loss given by kind or as `AttackLoss`.

        Raises:
          ValueError: for unknown names.
        """
        if isinstance(changes.get("loss"), str):
            changes["loss"] = as_attack_loss(changes["loss"], "loss", self.objective.target)
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **changes).check())

    def refreshed(self) -> "UapFamily":
        """The family with the present weights of its victim, if these are no arguments of `logits_fn`."""
        return dataclasses.replace(self, logits_fn=refreshed(self.logits_fn))

    def drawn(self, key: PRNGKeyArray) -> "UapFamily":
        """The family with a random radius; see `radius_factor`."""
        if self.radius_factor == 1:
            return self
        exponent = jax.random.uniform(key, (), jnp.float32, -1, 1)
        epsilon = jnp.asarray(self.constraint.epsilon, jnp.float32) * self.radius_factor**exponent
        return dataclasses.replace(self, constraint=dataclasses.replace(self.constraint, epsilon=epsilon))

    def sample(self, key: PRNGKeyArray) -> Episode:
        """Draws classes, then disjoint support and query images of each; both sets are a `Batch`."""
        support, query = draw_rows(key, self.table, self.counts, self.size)
        return Episode(self.batch(support.ravel()), self.batch(query.ravel()))

    def batch(self, rows: Integer[Array | np.ndarray, " n"]) -> Batch:
        """The images with these indices `[n]`, in [0, 1], and their labels."""
        return Batch(unit_range(self.images[rows]), self.labels[rows])

    def init(self, key: PRNGKeyArray) -> Float[Array, "H W C"]:
        """The start of the recipe, before any search."""
        dtype = self.images.dtype if jnp.issubdtype(self.images.dtype, jnp.floating) else jnp.float32
        return initial_perturbation(self.recipe.start, self.constraint, self.images.shape[1:], dtype, key)

    def warm_start(
        self, theta: Float[Array, "H W C"], support: Batch, key: PRNGKeyArray
    ) -> tuple[Float[Array, "H W C"], int]:
        """The better one of `theta` and what the recipe's search on the support images finds, and its queries."""
        return search_start(self.logits_fn, support, self.recipe, self.constraint, theta, key)

    def oracle(self, support: Batch) -> Oracle:
        """The gradient of the support loss or an estimate of it, with the extras that a rule can use."""
        return attack_oracle(self.logits_fn, support, self.recipe, self.constraint, self.estimator)

    def loss(self, theta: Float[Array, "H W C"], data: Batch) -> Float[Array, ""]:
        """The mean objective over the images, plus the penalty, if any."""
        losses = self.objective(self.logits_fn(perturb(data.images, theta)), data.labels)
        return jnp.mean(losses) + self.constraint.cost(theta)

    def project(self, theta: Float[Array, "H W C"]) -> Float[Array, "H W C"]:
        """The projection onto the ball; the identity under a penalty."""
        return self.constraint.project(theta)

    def metrics(self, theta: Float[Array, "H W C"], data: Batch) -> dict[str, Float[Array, ""]]:
        """`asr`, `clean_accuracy`, `margin`, `loss`, `l1`, `l2`, `linf`; see `lft_jax.tasks.uap.attack_metrics`."""
        clean, attacked = self.logits_fn(data.images), self.logits_fn(perturb(data.images, theta))
        return attack_metrics(clean, attacked, data.labels, theta, self.objective, self.constraint)


def attack_metrics(
    clean_logits: Float[Array, "N classes"],
    logits: Float[Array, "N classes"],
    labels: Integer[Array, " N"],
    theta: Float[Array, "H W C"],
    loss: AttackLoss,
    constraint: Constraint,
) -> dict[str, Float[Array, ""]]:
    """Success rate, loss and size of a perturbation.

    Args:
      clean_logits: `[N, classes]` of the clean images.
      logits: `[N, classes]` of the perturbed images.
      labels: `[N]`, the true classes.
      theta: `[H, W, C]`, the perturbation.
      loss: the objective. If it has a target, images of the target class are left out of the success rate.
      constraint: the ball, or the penalty that is added to the loss.

    Returns:
      A dictionary of scalars:

      - `asr`: the share in [0, 1] of the images classified correctly when clean that the attack succeeds on; 0 if
        there are none. An image with a NaN among its logits does not count as a success.
      - `fooling_rate`: the share in [0, 1] of the images whose predicted class changes.
      - `clean_accuracy`: in [0, 1].
      - `margin`: mean difference between the logit of the true class and the largest other logit.
      - `loss`: the mean loss, plus the penalty, if any.
      - `l1`, `l2`, `linf`: norms of the perturbation.
    """
    correct = jnp.argmax(clean_logits, -1) == labels
    counted = correct if loss.target is None else correct & (labels != loss.target)
    success = loss.success(logits, labels) & counted
    changed = AttackLoss().success(logits, jnp.argmax(clean_logits, -1))
    return {
        "asr": jnp.sum(success) / jnp.maximum(jnp.sum(counted), 1),
        "fooling_rate": jnp.mean(changed),
        "clean_accuracy": jnp.mean(correct),
        "margin": jnp.mean(margins(logits, labels)),
        "loss": jnp.mean(loss(logits, labels)) + constraint.cost(theta),
        **{kind: norm(theta, kind) for kind in ("l1", "l2", "linf")},
    }


def _present_keywords(old, kwargs):
    if "victim_logits_fn" in old:
        kwargs["logits_fn"] = old.pop("victim_logits_fn")
    if "queries" in old:
        kwargs["query_shots"] = old.pop("queries")
    if isinstance(old.get("support_loss"), str):  # whose target was none, whatever that of the objective
        old["support_loss"] = as_attack_loss(old["support_loss"], "support_loss")
    if "penalty" in old:
        penalty, name, epsilon = old.pop("penalty"), kwargs.pop("norm", "linf"), kwargs.pop("epsilon", None)
        kwargs["constraint"] = Constraint(name, epsilon, penalty)
    if old:
        fields: dict[str, Any] = {"augmentation": None}
        names = {"support_loss": "loss", "waves": "search"}
        fields |= {names.get(name, name): value for name, value in old.items()}
        kwargs["recipe"] = AttackRecipe(**fields)
    return kwargs


@old_keywords(
    _present_keywords,
    victim_logits_fn="logits_fn=",
    queries="query_shots=",
    penalty="constraint=Constraint(norm, penalty=...)",
    support_loss="recipe=AttackRecipe(loss=...)",
    start="recipe=AttackRecipe(start=...)",
    waves="recipe=AttackRecipe(search=...)",
    augmentation="recipe=AttackRecipe(augmentation=...)",
)
def uap_family(
    images: Shaped[Array | np.ndarray, "N H W C"],
    labels: Integer[Array | np.ndarray, " N"],
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
    radius_factor: float = 1.0,
) -> UapFamily:
    """A family of UAP tasks against one victim; see `UapFamily`.

    Args:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1]; kept on the device in this dtype.
      labels: `[N]` integers from 0, the true classes.
      logits_fn: the victim: images `[n, H, W, C]` in [0, 1] -> logits `[n, classes]`, traceable, or a
        `lft_jax.models.Classifier`. A `jax.tree_util.Partial` whose arguments are its weights lets victims of one
        architecture share a compilation.
      ways: classes of a task, at least 1.
      shots: support images per class, at least 1.
      query_shots: query images per class, disjoint from the support images, at least 1.
      norm: "linf" or "l2", the norm of the ball.
      epsilon: radius of the ball, in units of the image range.
      constraint: instead of `norm` and `epsilon`, for example `Constraint("l1", penalty=0.01)`.
      loss: the objective, an `AttackLoss` or the name of its kind. The outer loss and the metrics use it. With a target
        class, tasks draw no images of that class.
      recipe: what is done with the support images: their loss and augmentation, and the start. By default the loss is
        the objective, without augmentation, from a start of zeros.
      estimator: None for exact gradients, or a zeroth-order one, `(example_losses, *, num_examples) -> Oracle`, such as
        `lft_jax.ZerothOrder()`.
      radius_factor: each task has a radius of its own, log-uniform between `epsilon / radius_factor` and `epsilon *
        radius_factor`; at least 1, and 1 without a ball. For meta-training: a rule then serves these radii.

    Returns:
      The family, a pytree.

    Raises:
      ValueError: for images outside [0, 1], labels out of range, a class with fewer than `shots + query_shots` images,
        fewer than `ways` classes, a victim that JAX cannot trace, or names or numbers out of range.

    Examples:
      >>> images = np.random.default_rng(0).uniform(size=(20, 4, 4, 1)).astype(np.float32)
      >>> weights = jax.random.normal(jax.random.key(0), (16, 2))
      >>> model = lambda x: x.reshape(len(x), -1) @ weights
      >>> family = uap_family(images, np.arange(20) % 2, model, ways=2, shots=3, query_shots=5, epsilon=0.1)
      >>> support, query = jax.eval_shape(family.sample, jax.random.key(0))
      >>> support.images.shape, query.images.shape, family.init(jax.random.key(0)).shape
      ((6, 4, 4, 1), (10, 4, 4, 1), (4, 4, 1))

    References:
      Zhao et al. 2021, Learned fine-tuner for incongruous few-shot adversarial learning, arXiv 2009.13714.
    """
    size = TaskSize(ways, shots, query_shots)
    constraint = as_constraint(norm, epsilon, constraint)
    base.check_at_least("radius_factor", radius_factor, 1)
    if constraint.epsilon is None and radius_factor != 1:
        raise ValueError(f"radius_factor: a penalty has no radius; leave it out, got {radius_factor!r}.")
    objective = as_attack_loss(loss)
    recipe = recipe.resolved(objective)
    if estimator is not None and "dominant" in (objective.kind, resolved_loss(recipe).kind):
        raise ValueError("loss: 'dominant' is a loss of a whole batch, for exact gradients only; leave out estimator.")
    check_images_labels(images, labels)
    logits_fn = as_partial(logits_fn, images, exact=estimator is None)
    num_classes = jax.eval_shape(lambda x: logits_fn(unit_range(x)), images[:1]).shape[-1]
    check_images_labels(images, labels, num_classes)
    objective.check(num_classes)
    recipe.resolved(objective, num_classes)
    images, labels = np.asarray(images), np.asarray(labels).astype(np.int32)
    table, counts = _table_without_target(labels, objective.target, size.per_class)
    if np.sum(counts > 0) < ways:
        raise ValueError(f"ways: a task needs {ways} classes, but there are only {np.sum(counts > 0)}.")
    return UapFamily(
        images=jnp.asarray(images),
        labels=jnp.asarray(labels),
        table=jnp.asarray(table),
        counts=jnp.asarray(counts),
        logits_fn=logits_fn,
        objective=objective,
        constraint=constraint,
        recipe=recipe,
        size=size,
        estimator=estimator,
        radius_factor=float(radius_factor),
    )


def _table_without_target(labels, target, needed):
    """`class_table`, with a count of 0 for the target class; every other class has at least `needed` images or none."""
    table, counts = class_table(labels, int(labels.max()) + 1)
    if target is not None and target < len(counts):
        counts = np.where(np.arange(len(counts)) == target, 0, counts).astype(np.int32)
    for label, count in enumerate(counts):
        if 0 < count < needed:
            raise ValueError(
                f"shots + query_shots: class {label} has {count} images, but a task needs {needed} per class."
            )
    return table, counts
