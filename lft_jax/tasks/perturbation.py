"""The parts of a universal attack: how a perturbation meets an image, what it is judged by, what bounds it.

Images are `[N, H, W, C]` in [0, 1]; a perturbation is `[H, W, C]`, added to every image, or `[N, H, W, C]`, one copy
an image (which is how per-image gradients are read off one backward pass).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lft_jax import base
from lft_jax.base import safe_sqrt

LOSSES = ("hinge", "cross_entropy", "dominant")
NORMS = ("linf", "l2", "l1")
_REACH = 20.0  # nats: how far from the dominant label an image may be to have a say


class Batch(NamedTuple):
    """Images `[N, H, W, C]`, floating-point in [0, 1], and their labels `[N]` int32."""

    images: jax.Array
    labels: jax.Array


def perturb(images: jax.Array, theta: jax.Array) -> jax.Array:
    """`clip(images + theta, 0, 1)`, `[N, H, W, C]`."""
    return jnp.clip(images + (theta if theta.ndim == images.ndim else theta[None]), 0, 1)


def margins(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`[N]`, the logit of the label minus the largest other one: above 0 where the label is predicted."""
    at_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.max(jnp.where(at_label, logits, -jnp.inf), -1) - jnp.max(jnp.where(at_label, -jnp.inf, logits), -1)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class AttackLoss:
    """What an attacker minimises for each image (PAPER "The application").

    Most images that a universal perturbation fools are taken for one class, its dominant label (Moosavi-Dezfooli et al.
    2017, Universal adversarial perturbations). "dominant" pulls the images there from the first step on, to the class
    that they all are nearest to: few images agree better on where to go than on what to leave.

    Its fields are leaves of a pytree (the kind as its place in `LOSSES`), so that programs are not compiled anew for
    another loss, only for targeted and untargeted ones.

    Attributes:
      kind: "hinge", the C&W hinge `max(margin, -kappa)`; or "cross_entropy", untargeted `-min(CE(label), beta)` (the
        clamp of UAP-SGD, Shafahi et al. 2020: images fooled beyond doubt stop counting), targeted `CE(target)`;
        or "dominant", `min(CE(t), 20)`, `t` the class where its mean over the images given is lowest, if not all of
        them are of it (ours): a loss of a batch, which exact gradients are for.
      kappa: margin, in logits, by which an image should be fooled; at least 0 (hinge only).
      beta: bound on an image's cross-entropy, in nats; above 0 (cross-entropy only).
      target: the class that images should be taken for, or None: any wrong class.
    """

    kind: str | jax.Array = "hinge"
    kappa: float | jax.Array = 0.0
    beta: float | jax.Array = 12.0
    target: int | jax.Array | None = None

    def tree_flatten(self):
        kind = LOSSES.index(self.kind) if isinstance(self.kind, str) else self.kind
        return (kind, self.kappa, self.beta, self.target), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)

    def check(self, num_classes: int | None = None) -> "AttackLoss":
        """Returns itself; raises a ValueError if a field is out of range (the target, where the classes are known)."""
        base.check_name("loss", self.kind, LOSSES)
        base.check_at_least("kappa", self.kappa, 0)
        base.check_positive("beta", self.beta)
        if None not in (self.target, num_classes) and not 0 <= self.target < num_classes:
            raise ValueError(f"target: {self.target} is not one of the victim's {num_classes} classes.")
        return self

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """`[N, classes]`, `[N]` -> `[N]`."""
        goal = labels if self.target is None else jnp.full_like(labels, self.target)
        sign = 1 if self.target is None else -1
        hinge = jnp.maximum(sign * margins(logits, goal), -jnp.asarray(self.kappa, logits.dtype))
        log_probabilities = jax.nn.log_softmax(logits)
        entropy = -jnp.take_along_axis(log_probabilities, goal[:, None], axis=-1)[:, 0]
        distances = jnp.minimum(-log_probabilities, jnp.asarray(_REACH, logits.dtype))
        shared = jnp.all(labels[:, None] == jnp.arange(logits.shape[-1])[None], axis=0)  # where all are already
        means = jnp.where(shared, jnp.inf, jnp.mean(distances, 0))
        nearest = jnp.argmin(means) if self.target is None else self.target
        pull = jnp.take(distances, nearest, axis=1)
        if self.target is None:
            entropy = -jnp.minimum(entropy, jnp.asarray(self.beta, logits.dtype))
        (kind, *_), _ = self.tree_flatten()
        losses = (hinge, entropy, pull)  # in the order of LOSSES
        return jnp.select([kind == number for number in range(len(LOSSES))], losses)

    def success(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """`[N]` bool, whether the attack has its will."""
        predicted = jnp.argmax(logits, -1)
        return predicted != labels if self.target is None else predicted == self.target


def norm(theta: jax.Array, kind: str) -> jax.Array:
    """`[]`, the l1, l2 or linf norm, with derivative 0 where the l2 norm is 0."""
    if kind == "l2":
        return safe_sqrt(jnp.sum(theta**2))
    return jnp.sum(jnp.abs(theta)) if kind == "l1" else jnp.max(jnp.abs(theta))


_INWARD = 0.1  # derivative of a clipped coordinate towards the inside of the ball


@jax.custom_vjp
def _clip(theta, epsilon):
    """`clip(theta, -epsilon, epsilon)`, with a small derivative at a clipped coordinate for a pull back into the ball.

    The true derivative there is 0: once a rule's steps carry every coordinate over the border, its meta-gradient
    vanishes and it never learns to come back (seen after 100 meta-steps on digits). With the full derivative, 1, the
    pulls of the many clipped coordinates drown those of the others (seen as well).
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
    """What keeps a perturbation small.

    Attributes:
      norm: "linf" or "l2" for a ball, "l1" or "l2" for a penalty.
      epsilon: radius of the ball that steps are projected onto, in units of the image range, or None.
      penalty: weight of the norm in the loss, or None. Exactly one of the two is given.
    """

    norm: str = dataclasses.field(default="linf", metadata={"static": True})
    epsilon: float | None = None
    penalty: float | None = None

    def check(self) -> "Constraint":
        """Returns itself; raises a ValueError if the fields are out of range or do not go together."""
        base.check_name("norm", self.norm, NORMS)
        if (self.epsilon is None) == (self.penalty is None):
            raise ValueError(
                f"give exactly one of epsilon (a ball) and penalty, got {self.epsilon!r} and {self.penalty!r}."
            )
        if self.epsilon is not None:
            base.check_positive("epsilon", self.epsilon)
        else:
            base.check_positive("penalty", self.penalty)
        if self.norm == ("l1" if self.penalty is None else "linf"):
            kind, others = ("ball", "'linf', 'l2'") if self.penalty is None else ("penalty", "'l1', 'l2'")
            raise ValueError(f"norm: there is no {self.norm!r} {kind}, choose one of {others}.")
        return self

    def project(self, theta: jax.Array) -> jax.Array:
        """The nearest point of the ball; `theta` itself where there is none."""
        if self.epsilon is None:
            return theta
        epsilon = jnp.asarray(self.epsilon, theta.dtype)
        if self.norm == "linf":
            return _clip(theta, epsilon)
        length = norm(theta, "l2")
        return theta * jnp.where(length > epsilon, epsilon / jnp.where(length > 0, length, 1), 1)

    def cost(self, theta: jax.Array) -> jax.Array:
        """`[]`, what the constraint adds to the loss: 0 for a ball."""
        if self.penalty is None:
            return jnp.zeros((), theta.dtype)
        return jnp.asarray(self.penalty, theta.dtype) * norm(theta, self.norm)

    def scale(self, theta: jax.Array) -> jax.Array:
        """`[]`, the size of a coordinate: that of a ball's corner (linf), of an even spread over it (l2), or 0.1."""
        if self.epsilon is None:
            return jnp.full((), 0.1, theta.dtype)
        epsilon = jnp.asarray(self.epsilon, theta.dtype)
        return epsilon if self.norm == "linf" else epsilon / theta.size**0.5


def as_constraint(norm: str, epsilon: float | None, constraint: Constraint | None) -> Constraint:
    """The constraint that is given, or a ball of the norm and radius, checked.

    Raises:
      ValueError: if both are given, or a field is out of range.
    """
    if constraint is None:
        return Constraint(norm, epsilon).check()
    if epsilon is not None or norm not in ("linf", constraint.norm):
        raise ValueError(f"constraint: leave norm and epsilon out, got {constraint} with {norm!r} and {epsilon!r}.")
    return constraint.check()
