"""The attack on a single image by queries alone, the experiment of ZO-L2L (Ruan et al. 2020, section 4.1)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import base, oracles
from lft_jax.base import Episode, Oracle, TaskFamily
from lft_jax.data import check_images_labels, unit_range
from lft_jax.tasks.perturbation import AttackLoss, Batch, norm, perturb

HINGE = AttackLoss("hinge")
#: The published estimator, but for its smoothing of 1e-6, which takes float64.
ESTIMATOR = oracles.ZerothOrder(20, smoothing=1e-4, directions="gaussian", antithetic=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SingleImageFamily(TaskFamily):
    """Fool a victim on one image, which is both the support and the query set. Build it with `single_image_family`.

    The optimizee is the change `theta` of the image `x`, and its loss that of `x' = clip(x + theta, 0, 1)`::

        attack_loss(x') + penalty * |x' - x|_1

    It differs from `UapFamily` of one way and shot in that the distance is measured after clipping and that the oracle
    estimates the whole loss, its penalty too, from queries. Nothing bounds `theta` itself.

    Attributes:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` int32.
      logits_fn: `images -> logits`, the victim.
      attack_loss: the first part; the hinge on logits is that on log-probabilities.
      penalty: weight of the distance.
      noise: `[]`, standard deviation of the random start.
      estimator: None for exact gradients, or `(example_losses, *, num_examples) -> Oracle`.
    """

    images: jax.Array
    labels: jax.Array
    logits_fn: Callable[[jax.Array], jax.Array]
    attack_loss: AttackLoss
    penalty: float
    noise: float
    estimator: Callable[..., Oracle] | None = dataclasses.field(default=None, metadata={"static": True})

    def sample(self, key: jax.Array) -> Episode:
        """Draws one image; the batch of it, `[1, H, W, C]`, is both sets."""
        row = jax.random.randint(key, (1,), 0, len(self.labels))
        batch = Batch(unit_range(self.images[row]), self.labels[row])
        return Episode(batch, batch)

    def init(self, key: jax.Array) -> jax.Array:
        """`[H, W, C]`, noise."""
        dtype = unit_range(self.images[:1]).dtype
        return jnp.asarray(self.noise, dtype) * jax.random.normal(key, self.images.shape[1:], dtype)

    def oracle(self, support: Batch) -> Oracle:
        """The gradient of the loss, or an estimate of it."""
        if self.estimator is None:
            return oracles.gradient(lambda theta: self.loss(theta, support))
        return self.estimator(lambda theta: self.loss(theta, support)[None], num_examples=1)

    def loss(self, theta: jax.Array, data: Batch) -> jax.Array:
        """`[]`, see above."""
        attacked = perturb(data.images, theta)
        distance = norm(attacked - data.images, "l1")
        return self.attack_loss(self.logits_fn(attacked), data.labels)[0] + self.penalty * distance

    def project(self, theta: jax.Array) -> jax.Array:
        """The identity: the loss clips the image."""
        return theta

    def metrics(self, theta: jax.Array, data: Batch) -> dict[str, jax.Array]:
        """`loss`, `success` (0 or 1), and the norms `l1`, `l2`, `linf` of what the image was changed by."""
        attacked = perturb(data.images, theta)
        success = self.attack_loss.success(self.logits_fn(attacked), data.labels)[0]
        sizes = {kind: norm(attacked - data.images, kind) for kind in ("l1", "l2", "linf")}
        return {"loss": self.loss(theta, data), "success": success.astype(theta.dtype), **sizes}


def single_image_family(
    images: np.ndarray,
    labels: np.ndarray,
    victim_logits_fn: Callable[[jax.Array], jax.Array],
    *,
    loss: AttackLoss = HINGE,
    penalty: float = 0.1,
    noise: float = 1e-4,
    estimator: Callable[..., Oracle] | None = ESTIMATOR,
) -> SingleImageFamily:
    """A family of attacks on single images that the victim gets right. The defaults are those of ZO-L2L.

    Args:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1]; all are given to the victim at once.
      labels: `[N]` integers from 0.
      victim_logits_fn: images `[n, H, W, C]` in [0, 1] -> logits `[n, classes]`; best a `jax.tree_util.Partial`, as
        for `lft_jax.uap_family`.
      loss: what the attacker minimises.
      penalty: weight of the l1 distance, above 0.
      noise: standard deviation of the random start, above 0, in units of the image range.
      estimator: None for exact gradients, or `(example_losses, *, num_examples) -> Oracle`.

    Raises:
      ValueError: for images outside [0, 1], labels out of range, numbers out of range, or a victim that is right on no
        image.
    """
    base.check_positive("penalty", penalty)
    base.check_positive("noise", noise)
    if not isinstance(victim_logits_fn, jax.tree_util.Partial):
        victim_logits_fn = jax.tree_util.Partial(victim_logits_fn)
    check_images_labels(images, labels)
    images, labels = np.asarray(images), np.asarray(labels).astype(np.int32)
    logits = jax.jit(lambda x: victim_logits_fn(unit_range(x)))(images)
    check_images_labels(images, labels, logits.shape[-1])
    loss.check(logits.shape[-1])
    right = np.flatnonzero(np.argmax(np.asarray(logits), -1) == labels)
    if not len(right):
        raise ValueError(
            f"images: the victim is right on none of the {len(labels)} images, there is nothing to attack."
        )
    arrays = (jnp.asarray(images[right]), jnp.asarray(labels[right]))
    return SingleImageFamily(*arrays, victim_logits_fn, loss, penalty, noise, estimator)
