"""Few-shot universal adversarial perturbations: one for all images of a task (PAPER "The application")."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import base, oracles
from lft_jax.base import Episode, Estimate, Oracle, TaskFamily
from lft_jax.data import check_images_labels, class_table, draw_rows, unit_range
from lft_jax.tasks.augmentation import Augmentation
from lft_jax.tasks.perturbation import LOSSES, AttackLoss, Batch, Constraint, margins, norm, perturb
from lft_jax.tasks.waves import WaveSearch

STARTS = ("zeros", "random")
_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UapFamily(TaskFamily):
    """UAP tasks on one image source against one victim. Build it with `uap_family`, which checks its arguments.

    The losses, the oracle and the start can be changed with `dataclasses.replace`; the arrays are then shared.

    Attributes:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` int32.
      table: `[classes, most]` int32, the rows of `images` of each class that episodes draw from, padded.
      counts: `[classes]` int32, how many entries of each row of `table` count.
      logits_fn: `images -> logits`, the victim.
      attack_loss: the objective, what the outer loss and the metrics are made of.
      support_loss: what is minimised on the support images.
      second_loss: added to it, its gradient also the extra `second`; or None, as it is with an estimator.
      constraint: the ball or the penalty.
      ways: classes of a task.
      shots: support images a class.
      queries: query images a class.
      start: "zeros", or "random": uniform in the constraint's scale.
      waves: what a start is compared with on the support images first, and gives way to, or None.
      estimator: None for exact gradients, or `(example_losses, *, num_examples) -> Oracle`, for instance
        `lft_jax.oracles.ZerothOrder(num_directions=20)`.
      augmentation: how the support images are changed anew in each step, or None.
    """

    images: jax.Array
    labels: jax.Array
    table: jax.Array
    counts: jax.Array
    logits_fn: Callable[[jax.Array], jax.Array]
    attack_loss: AttackLoss
    support_loss: AttackLoss
    constraint: Constraint
    ways: int = dataclasses.field(metadata=_STATIC)
    shots: int = dataclasses.field(metadata=_STATIC)
    queries: int = dataclasses.field(metadata=_STATIC)
    second_loss: AttackLoss | None = None
    start: str = dataclasses.field(default="zeros", metadata=_STATIC)
    waves: WaveSearch | None = dataclasses.field(default=None, metadata=_STATIC)
    estimator: Callable[..., Oracle] | None = dataclasses.field(default=None, metadata=_STATIC)
    augmentation: Augmentation | None = dataclasses.field(default=None, metadata=_STATIC)

    def sample(self, key: jax.Array) -> Episode:
        """Draws classes, then disjoint support and query images of each: `Batch`es of ways * shots, ways * queries."""
        rows = draw_rows(key, self.table, self.counts, self.ways, self.shots + self.queries)
        return Episode(self.batch(rows[:, : self.shots].ravel()), self.batch(rows[:, self.shots :].ravel()))

    def batch(self, rows: jax.Array) -> Batch:
        """The images of the given rows `[n]`, in [0, 1]."""
        return Batch(unit_range(self.images[rows]), self.labels[rows])

    def init(self, key: jax.Array) -> jax.Array:
        """`[H, W, C]`, the initial perturbation."""
        dtype = self.images.dtype if jnp.issubdtype(self.images.dtype, jnp.floating) else jnp.float32
        theta = jnp.zeros(self.images.shape[1:], dtype)
        if self.start == "zeros":
            return theta
        scale = self.constraint.scale(theta)
        return self.project(scale * jax.random.uniform(key, theta.shape, dtype, -1, 1))

    def warm_start(self, theta: jax.Array, support: Batch, key: jax.Array) -> tuple[jax.Array, int]:
        """The best of `theta` and of plane waves on the support images, if `waves` are asked for."""
        if self.waves is None:
            return theta, 0

        def support_loss(theta):
            losses = self.support_loss(self.logits_fn(perturb(support.images, theta)), support.labels)
            return jnp.mean(losses) + self.constraint.cost(theta)

        best = self.waves(support_loss, theta, self.constraint.scale(theta), key)
        return best, self.waves.evaluations * len(support.labels)

    def oracle(self, support: Batch) -> Oracle:
        """The gradient of the support loss, with the extras that a rule for perturbations can use."""

        def attack(images):
            data = Batch(images, support.labels)
            if self.estimator is None:
                return exact_attack(self.logits_fn, data, self.support_loss, self.second_loss)
            losses = image_losses(self.logits_fn, data, self.support_loss)
            return self.estimator(losses, num_examples=len(support.labels))

        return constrained_oracle(attack, self.constraint, support.images, self.augmentation)

    def loss(self, theta: jax.Array, data: Batch) -> jax.Array:
        """`[]`, the mean attack loss over the images plus the penalty, if any."""
        losses = self.attack_loss(self.logits_fn(perturb(data.images, theta)), data.labels)
        return jnp.mean(losses) + self.constraint.cost(theta)

    def project(self, theta: jax.Array) -> jax.Array:
        """Onto the ball; the identity under a penalty."""
        return self.constraint.project(theta)

    def metrics(self, theta: jax.Array, data: Batch) -> dict[str, jax.Array]:
        """See `attack_metrics`."""
        clean, attacked = self.logits_fn(data.images), self.logits_fn(perturb(data.images, theta))
        return attack_metrics(clean, attacked, data.labels, theta, self.attack_loss, self.constraint)


def image_losses(
    logits_fn: Callable[[jax.Array], jax.Array], data: Batch, loss: AttackLoss
) -> Callable[[jax.Array], jax.Array]:
    """`theta -> [N]`, the attack loss of each image, for one perturbation or a copy for each image."""
    return lambda theta: loss(logits_fn(perturb(data.images, theta)), data.labels)


def exact_attack(
    logits_fn: Callable[[jax.Array], jax.Array], data: Batch, loss: AttackLoss, second_loss: AttackLoss | None
) -> Oracle:
    """The gradient of the attack losses, and that of the second one alone too, if there is one."""
    second = None if second_loss is None else image_losses(logits_fn, data, second_loss)
    losses = image_losses(logits_fn, data, loss)
    return oracles.per_example_gradient(losses, num_examples=len(data.labels), second_losses=second)


def checked_second_loss(loss: str | AttackLoss, target: int | None) -> AttackLoss:
    """A second loss that has the objective's target, or is named and given it; a ValueError says what it lacks."""
    if not isinstance(loss, AttackLoss):
        return AttackLoss(base.check_name("second_loss", loss, LOSSES), target=target)
    if loss.target != target:
        raise ValueError(f"second_loss: its target {loss.target} is not that of the objective, {target}.")
    return loss.check()


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
      augmentation: how they are changed anew in each step, or None.
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


def uap_family(
    images: np.ndarray,
    labels: np.ndarray,
    victim_logits_fn: Callable[[jax.Array], jax.Array],
    *,
    ways: int = 10,
    shots: int = 1,
    queries: int = 5,
    norm: str = "linf",
    epsilon: float | None = None,
    penalty: float | None = None,
    loss: str | AttackLoss = "hinge",
    support_loss: str | AttackLoss | None = None,
    second_loss: str | AttackLoss | None = None,
    start: str = "zeros",
    waves: WaveSearch | None = None,
    estimator: Callable[..., Oracle] | None = None,
    augmentation: Augmentation | None = None,
) -> UapFamily:
    """A family of UAP tasks: `ways` classes, `shots` support and `queries` query images of each, one victim.

    Args:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1]; kept on the device as they are.
      labels: `[N]` integers from 0.
      victim_logits_fn: images `[n, H, W, C]` in [0, 1] -> logits `[n, classes]`. A `jax.tree_util.Partial` whose
        arguments are its weights lets victims of one architecture share a compilation.
      ways: classes of a task.
      shots: support images a class.
      queries: query images a class, disjoint from the support images.
      norm: "linf" or "l2" with `epsilon`, "l1" or "l2" with `penalty`.
      epsilon: radius of the ball, in units of the image range.
      penalty: weight of the norm in the loss.
      loss: the objective, a kind of `AttackLoss` or one of those.
      support_loss: what is minimised on the support images; the objective if None.
      second_loss: what is added to it, and whose gradient a rule also sees alone (the feature "second"); or None. For
        exact gradients; a search for a start is by the support loss.
      start: "zeros" or "random".
      waves: a search on the support images for a better start, or None.
      estimator: None for exact gradients, or `(example_losses, *, num_examples) -> Oracle`.
      augmentation: how the support images are changed anew in each step, or None.

    Raises:
      ValueError: for images outside [0, 1], labels out of range, a class with fewer than shots + queries images,
        fewer than `ways` classes, names or numbers out of range, and a second loss with another target than the
        objective's, or with an estimator.
    """
    for name, value in (("ways", ways), ("shots", shots), ("queries", queries)):
        base.check_at_least(name, value, 1)
    base.check_name("start", start, STARTS)
    constraint = Constraint(norm, epsilon, penalty).check()
    for checked in (augmentation, waves):
        if checked is not None:
            checked.check()
    attack_loss = _attack_loss(loss)
    support_loss = attack_loss if support_loss is None else _attack_loss(support_loss, "support_loss")
    if second_loss is not None:
        second_loss = checked_second_loss(second_loss, attack_loss.target)
        if estimator is not None:
            raise ValueError("second_loss: a zeroth-order estimate is of one loss; leave it or the estimator out.")
    if not isinstance(victim_logits_fn, jax.tree_util.Partial):
        victim_logits_fn = jax.tree_util.Partial(victim_logits_fn)
    check_images_labels(images, labels)
    num_classes = jax.eval_shape(lambda x: victim_logits_fn(unit_range(x)), images[:1]).shape[-1]
    check_images_labels(images, labels, num_classes)
    for used in (attack_loss, support_loss, second_loss):
        if used is not None:
            used.check(num_classes)
    images, labels = np.asarray(images), np.asarray(labels).astype(np.int32)
    table, counts = _drawn_classes(labels, attack_loss.target, shots + queries)
    if np.sum(counts > 0) < ways:
        raise ValueError(f"ways: {ways} classes a task were asked for, but the labels have only {np.sum(counts > 0)}.")
    arrays = [jnp.asarray(x) for x in (images, labels, table, counts)]
    return UapFamily(
        *arrays,
        victim_logits_fn,
        attack_loss,
        support_loss,
        constraint,
        ways,
        shots,
        queries,
        second_loss,
        start,
        waves,
        estimator,
        augmentation,
    )


def _attack_loss(loss, argument="loss"):
    return (loss if isinstance(loss, AttackLoss) else AttackLoss(base.check_name(argument, loss, LOSSES))).check()


def _drawn_classes(labels, target, needed):
    table, counts = class_table(labels, int(labels.max()) + 1)
    if target is not None and target < len(counts):
        counts = np.where(np.arange(len(counts)) == target, 0, counts).astype(np.int32)
    for label, count in enumerate(counts):
        if 0 < count < needed:
            raise ValueError(f"shots + queries: class {label} has {count} images, fewer than the {needed} asked for.")
    return table, counts
