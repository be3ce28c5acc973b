"""The parts of a universal attack: the perturbed image, the loss, and the constraint.

Images are `[N, H, W, C]` in [0, 1]. A perturbation is `[H, W, C]` and is added to every image, or `[N, H, W, C]`, one
copy per image, from which one backward pass gives per-image gradients.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from lft_jax import base
from lft_jax.base import safe_sqrt

LOSSES = ("hinge", "cross_entropy", "dominant")
NORMS = ("linf", "l2", "l1")
_REACH = 20.0  # nats: images whose cross-entropy with the dominant label is higher have no gradient


class Batch(NamedTuple):
    """Images and their labels.

    Attributes:
      images: `[N, H, W, C]`, floating-point in [0, 1].
      labels: `[N]` int32.
    """

    images: jax.Array
    labels: jax.Array


def perturb(
    images: Float[Array | np.ndarray, "N H W C"],
    theta: Float[Array | np.ndarray, "H W C"] | Float[Array | np.ndarray, "N H W C"],
) -> Float[Array, "N H W C"]:
    """The perturbed images, `clip(images + theta, 0, 1)`.

    Args:
      images: `[N, H, W, C]` in [0, 1].
      theta: `[H, W, C]`, added to every image, or `[N, H, W, C]`, one copy per image.

    Returns:
      `[N, H, W, C]` in [0, 1].

    Examples:
      >>> perturb(jnp.full((2, 1, 1, 1), 0.75), jnp.full((1, 1, 1), 0.5)).ravel().tolist()
      [1.0, 1.0]
    """
    return jnp.clip(images + (theta if theta.ndim == images.ndim else theta[None]), 0, 1)


def margins(
    logits: Float[Array | np.ndarray, "N classes"], labels: Integer[Array | np.ndarray, " N"]
) -> Float[Array, " N"]:
    """`[N]`, the logit of the label minus the largest other logit: above 0 where the label is predicted."""
    at_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.max(jnp.where(at_label, logits, -jnp.inf), -1) - jnp.max(jnp.where(at_label, -jnp.inf, logits), -1)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class AttackLoss:
    """The loss that an attacker minimizes, for each image.

    Of logits `z` and a true class `y`, with `CE(c) = logsumexp(z) - z_c`::

        kind             untargeted                                      with a target t
        hinge            max(z_y - max over j != y of z_j, -kappa)       max(max over j != t of z_j - z_t, -kappa)
        cross_entropy    -min(CE(y), beta)                               CE(t)
        dominant         min(CE(s), 20)                                  min(CE(t), 20)

    The clamp at `beta` makes images that are already fooled with certainty stop counting.

    Most images that a universal perturbation fools are classified as one class, its dominant label. The kind "dominant"
    pulls all images towards one class `s` from the first step on: the class whose mean loss over the batch is lowest,
    except a class that all images of the batch belong to. The few images of a task agree better on a class to move to
    than on how to leave their own. It is a loss of a whole batch, for exact gradients only.

    The fields are leaves of a pytree, `kind` as its index in `LOSSES`. So one compiled program serves all untargeted
    losses, and one all targeted losses.

    Attributes:
      kind: "hinge", "cross_entropy" or "dominant".
      kappa: confidence: the margin, in logits, by which an image should be fooled; at least 0 ("hinge" only).
      beta: bound on the cross-entropy of an image, in nats; above 0 (untargeted "cross_entropy" only).
      target: the class that images should be classified as, or None for any wrong class.

    Examples:
      >>> logits, labels = jnp.asarray([[3.0, 1.0], [0.0, 2.0]]), jnp.asarray([0, 0])
      >>> AttackLoss("hinge", kappa=1.0)(logits, labels).tolist()
      [2.0, -1.0]
      >>> AttackLoss("hinge", kappa=5.0)(logits, labels).tolist()
      [2.0, -2.0]

    References:
      Hinge: Carlini & Wagner 2017, arXiv 1608.04644. Clamp: Shafahi et al. 2020, UAP-SGD, arXiv 1811.11304. Dominant
      labels: Moosavi-Dezfooli et al. 2017, arXiv 1610.08401.
    """

    kind: str | jax.Array = "hinge"
    kappa: float | jax.Array = 0.0
    beta: float | jax.Array = 12.0
    target: int | jax.Array | None = None

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        kind = LOSSES.index(self.kind) if isinstance(self.kind, str) else self.kind
        return (kind, self.kappa, self.beta, self.target), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple[Any, ...]) -> "AttackLoss":
        return cls(*leaves)

    def check(self, num_classes: int | None = None) -> "AttackLoss":
        """Returns itself.

        Args:
          num_classes: classes of the model, to check the target; None if unknown.

        Raises:
          ValueError: for a field out of range.
        """
        base.check_name("loss", self.kind, LOSSES)
        base.check_at_least("kappa", self.kappa, 0)
        base.check_positive("beta", self.beta)
        if self.target is not None and num_classes is not None and not 0 <= self.target < num_classes:
            raise ValueError(f"target: {self.target} is not one of the victim's {num_classes} classes.")
        return self

    def __call__(
        self, logits: Float[Array | np.ndarray, "N classes"], labels: Integer[Array | np.ndarray, " N"]
    ) -> Float[Array, " N"]:
        """The loss of each image.

        Args:
          logits: `[N, classes]` of the perturbed images.
          labels: `[N]`, the true classes.

        Returns:
          `[N]`.
        """
        labels = jnp.asarray(labels)
        goal = labels if self.target is None else jnp.full_like(labels, self.target)
        sign = 1 if self.target is None else -1
        hinge = jnp.maximum(sign * margins(logits, goal), -jnp.asarray(self.kappa, logits.dtype))
        log_probabilities = jax.nn.log_softmax(logits)
        entropy = -jnp.take_along_axis(log_probabilities, goal[:, None], axis=-1)[:, 0]
        distances = jnp.minimum(-log_probabilities, jnp.asarray(_REACH, logits.dtype))
        classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)
        shared = jnp.all(labels[:, None] == classes[None], axis=0)  # true class of all images
        means = jnp.where(shared, jnp.inf, jnp.mean(distances, 0))
        dominant = jnp.argmin(means) if self.target is None else self.target
        pull = jnp.take(distances, dominant, axis=1)
        if self.target is None:
            entropy = -jnp.minimum(entropy, jnp.asarray(self.beta, logits.dtype))
        (kind, *_), _ = self.tree_flatten()
        losses = (hinge, entropy, pull)  # in the order of LOSSES
        return jnp.select([kind == number for number in range(len(LOSSES))], losses)

    def success(
        self, logits: Float[Array | np.ndarray, "N classes"], labels: Integer[Array | np.ndarray, " N"]
    ) -> Bool[Array, " N"]:
        """Whether the attack succeeds: the image is classified as the target or, without one, as a wrong class.

        With a NaN among its logits, an image has no class, so it is no success.

        Args:
          logits: `[N, classes]` of the perturbed images.
          labels: `[N]`, the true classes.

        Returns:
          `[N]` bool.

        Examples:
          >>> AttackLoss().success(jnp.asarray([[3.0, 1.0], [0.0, 2.0]]), jnp.asarray([0, 0])).tolist()
          [False, True]
        """
        predicted = jnp.argmax(logits, -1)
        hit = predicted != labels if self.target is None else predicted == self.target
        return hit & ~jnp.any(jnp.isnan(logits), -1)


def norm(theta: Float[Array, "*shape"], kind: str) -> Float[Array, ""]:
    """The "l1", "l2" or "linf" norm; the l2 norm has derivative 0 at 0."""
    if kind == "l2":
        return safe_sqrt(jnp.sum(theta**2))
    return jnp.sum(jnp.abs(theta)) if kind == "l1" else jnp.max(jnp.abs(theta))


_INWARD = 0.1  # derivative of a clipped coordinate towards the inside of the ball


@jax.custom_vjp
def _clip(theta, epsilon):
    """`clip(theta, -epsilon, epsilon)`, with a small derivative at a clipped coordinate towards the inside of the ball.

    The true derivative there is 0: once a rule's steps carry every coordinate over the border, its meta-gradient
    vanishes and it never learns to come back (observed after 100 meta-steps on digits). With a derivative of 1, the
    many clipped coordinates outweigh the others (observed as well).
    """
    return jnp.clip(theta, -epsilon, epsilon)


def _clip_backward(saved, cotangent):
    theta, epsilon = saved
    # Descent goes against the cotangent.
    pulled = jnp.where(cotangent * jnp.sign(theta) > 0, _INWARD * cotangent, 0)
    return jnp.where(jnp.abs(theta) <= epsilon, cotangent, pulled), jnp.zeros_like(epsilon)


_clip.defvjp(lambda theta, epsilon: (_clip(theta, epsilon), (theta, epsilon)), _clip_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constraint:
    """What keeps a perturbation small: a ball that steps are projected onto, or a penalty in the loss.

    Exactly one of `epsilon` and `penalty` is given::

        ball       ||theta|| <= epsilon
        penalty    loss + penalty * ||theta||

    Attributes:
      norm: "linf" or "l2" for a ball, "l1" or "l2" for a penalty.
      epsilon: radius of the ball, in units of the image range, or None.
      penalty: coefficient of the norm in the loss, or None.

    Examples:
      >>> theta = jnp.asarray([0.5, -0.125])
      >>> Constraint("linf", epsilon=0.25).check().project(theta).tolist()
      [0.25, -0.125]
      >>> float(Constraint("l1", penalty=2.0).check().cost(theta))
      1.25
    """

    norm: str = dataclasses.field(default="linf", metadata={"static": True})
    epsilon: float | jax.Array | None = None
    penalty: float | None = None

    def check(self) -> "Constraint":
        """Returns itself.

        Raises:
          ValueError: for a field out of range, both or neither of epsilon and penalty, or a norm that does not fit.
        """
        base.check_name("norm", self.norm, NORMS)
        if (self.epsilon is None) == (self.penalty is None):
            raise ValueError(
                f"give exactly one of epsilon (for a ball) and penalty, got {self.epsilon!r} and {self.penalty!r}."
            )
        if self.epsilon is not None:
            base.check_positive("epsilon", self.epsilon)
            if self.norm == "linf" and self.epsilon > 1:
                raise ValueError(
                    f"epsilon must be at most 1, in units of the image range, got {self.epsilon!r}: "
                    f"{self.epsilon:g} / 255 = {self.epsilon / 255:.4g}?"
                )
        if self.penalty is not None:
            base.check_positive("penalty", self.penalty)
        if self.norm == ("l1" if self.penalty is None else "linf"):
            kind, others = ("ball", "'linf', 'l2'") if self.penalty is None else ("penalty", "'l1', 'l2'")
            raise ValueError(f"norm: there is no {self.norm!r} {kind}, choose one of {others}.")
        return self

    def project(self, theta: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The nearest point of the ball; under a penalty `theta` itself."""
        if self.epsilon is None:
            return theta
        epsilon = jnp.asarray(self.epsilon, theta.dtype)
        if self.norm == "linf":
            return _clip(theta, epsilon)
        length = norm(theta, "l2")
        return theta * jnp.where(length > epsilon, epsilon / jnp.where(length > 0, length, 1), 1)

    def cost(self, theta: Float[Array, "*shape"]) -> Float[Array, ""]:
        """What the constraint adds to the loss: `penalty * ||theta||`, or 0 for a ball."""
        if self.penalty is None:
            return jnp.zeros((), theta.dtype)
        return jnp.asarray(self.penalty, theta.dtype) * norm(theta, self.norm)

    def scale(self, theta: Float[Array, "*shape"]) -> Float[Array, ""]:
        """The size of a coordinate in the feasible set, with `d` coordinates.

        epsilon for an linf ball, `epsilon / sqrt(d)` for an l2 ball, 0.1 under a penalty.
        """
        if self.epsilon is None:
            return jnp.full((), 0.1, theta.dtype)
        epsilon = jnp.asarray(self.epsilon, theta.dtype)
        return epsilon if self.norm == "linf" else epsilon / theta.size**0.5


def as_constraint(norm: str, epsilon: float | None, constraint: Constraint | None) -> Constraint:
    """The given constraint, or else a ball of this norm and radius, checked.

    Raises:
      ValueError: if a constraint and a ball are given, or a field is out of range.
    """
    if constraint is None:
        return Constraint(norm, epsilon).check()
    if epsilon is not None or norm not in ("linf", constraint.norm):
        raise ValueError(
            f"constraint: leave out norm and epsilon when a constraint is given, got {constraint} with {norm!r} and "
            f"{epsilon!r}."
        )
    return constraint.check()
