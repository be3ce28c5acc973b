"""Query-only attacks on single images, the experiment of ZO-L2L (arXiv 1910.09464, section 4.1)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray, Shaped

from lft_jax import base, oracles
from lft_jax._deprecation import renamed
from lft_jax._present import as_partial, refreshed
from lft_jax.base import Episode, Oracle, TaskFamily
from lft_jax.data import check_images_labels, unit_range
from lft_jax.tasks.perturbation import AttackLoss, Batch, norm, perturb

HINGE = AttackLoss("hinge")
#: The published estimator, except for its smoothing of 1e-6, which needs float64.
ESTIMATOR = oracles.ZerothOrder(20, smoothing=1e-4, directions="gaussian", antithetic=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SingleImageFamily(TaskFamily):
    """Attack tasks on one image each, which is both the support and the query set. Built by `single_image_family`.

    The optimizee is the perturbation `theta` of an image `x`. Its loss is::

        x' = clip(x + theta, 0, 1)
        objective(x') + penalty * ||x' - x||_1

    This differs in three ways from `UapFamily` with one way and one shot. The distance is measured after clipping. The
    oracle estimates the whole loss, with its penalty, from queries. And `theta` itself is not bounded.

    Attributes:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` int32, the true classes.
      logits_fn: the victim: images `[n, H, W, C]` in [0, 1] -> logits `[n, classes]`.
      objective: loss of the logits. A hinge is the same on logits and on log-probabilities.
      penalty: coefficient of the l1 distance.
      noise: standard deviation of the random start, in units of the image range.
      estimator: None for exact gradients, or a zeroth-order one, `(example_losses, *, num_examples) -> Oracle`.
    """

    images: jax.Array
    labels: jax.Array
    logits_fn: jax.tree_util.Partial
    objective: AttackLoss
    penalty: float
    noise: float
    estimator: Callable[..., Oracle] | None = dataclasses.field(default=None, metadata={"static": True})

    def sample(self, key: PRNGKeyArray) -> Episode:
        """Draws one image; both sets are the same `Batch` of it."""
        row = jax.random.randint(key, (1,), 0, len(self.labels))
        batch = Batch(unit_range(self.images[row]), self.labels[row])
        return Episode(batch, batch)

    def init(self, key: PRNGKeyArray) -> Float[Array, "H W C"]:
        """The start: Gaussian noise."""
        dtype = unit_range(self.images[:1]).dtype
        return jnp.asarray(self.noise, dtype) * jax.random.normal(key, self.images.shape[1:], dtype)

    def refreshed(self) -> "SingleImageFamily":
        """The family with the present weights of its victim, if these are no arguments of `logits_fn`."""
        return dataclasses.replace(self, logits_fn=refreshed(self.logits_fn))

    def oracle(self, support: Batch) -> Oracle:
        """The gradient of the whole loss, or an estimate of it."""
        if self.estimator is None:
            return oracles.gradient(lambda theta: self.loss(theta, support))
        return self.estimator(lambda theta: self.loss(theta, support)[None], num_examples=1)

    def loss(self, theta: Float[Array, "H W C"], data: Batch) -> Float[Array, ""]:
        """`objective(x') + penalty * ||x' - x||_1`."""
        attacked = perturb(data.images, theta)
        distance = norm(attacked - data.images, "l1")
        return self.objective(self.logits_fn(attacked), data.labels)[0] + self.penalty * distance

    def project(self, theta: Float[Array | np.ndarray, "H W C"]) -> Float[Array | np.ndarray, "H W C"]:
        """The identity: the loss clips the image."""
        return theta

    def metrics(self, theta: Float[Array, "H W C"], data: Batch) -> dict[str, Float[Array, ""]]:
        """`loss`, `success` (0 or 1), and the norms `l1`, `l2`, `linf` of `x' - x`."""
        attacked = perturb(data.images, theta)
        success = self.objective.success(self.logits_fn(attacked), data.labels)[0]
        sizes = {kind: norm(attacked - data.images, kind) for kind in ("l1", "l2", "linf")}
        return {"loss": self.loss(theta, data), "success": success.astype(theta.dtype), **sizes}


@renamed(victim_logits_fn="logits_fn")
def single_image_family(
    images: Shaped[Array | np.ndarray, "N H W C"],
    labels: Integer[Array | np.ndarray, " N"],
    logits_fn: Callable[[jax.Array], jax.Array],
    *,
    loss: AttackLoss = HINGE,
    penalty: float = 0.1,
    noise: float = 1e-4,
    estimator: Callable[..., Oracle] | None = ESTIMATOR,
) -> SingleImageFamily:
    """A family of attacks on single images that the victim classifies correctly; see `SingleImageFamily`.

    The defaults are those of ZO-L2L, except for the smoothing of its estimator.

    Args:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1]. The victim classifies all of them in one call.
      labels: `[N]` integers from 0, the true classes.
      logits_fn: images `[n, H, W, C]` in [0, 1] -> logits `[n, classes]`, traceable. A `jax.tree_util.Partial`
        whose arguments are its weights lets victims of one architecture share a compilation.
      loss: loss of the logits that the attacker minimizes.
      penalty: coefficient of the l1 distance, above 0.
      noise: standard deviation of the random start, above 0, in units of the image range.
      estimator: None for exact gradients, or a zeroth-order one, `(example_losses, *, num_examples) -> Oracle`, such as
        `lft_jax.ZerothOrder()`.

    Returns:
      The family, a pytree, of the images that are classified correctly.

    Raises:
      ValueError: for images outside [0, 1], labels or numbers out of range, or if no image is classified correctly.

    Examples:
      >>> images = np.asarray([[[[0.25]]], [[[0.75]]]], np.float32)
      >>> def brightness(x):
      ...     return jnp.stack([1 - x[:, 0, 0, 0], x[:, 0, 0, 0]], 1)
      >>> family = single_image_family(images, np.asarray([0, 0]), brightness)
      >>> len(family.images)
      1

    References:
      Ruan et al. 2020, Learning to learn by zeroth-order oracle, arXiv 1910.09464, section 4.1.
    """
    base.check_positive("penalty", penalty)
    base.check_positive("noise", noise)
    check_images_labels(images, labels)
    logits_fn = as_partial(logits_fn, images, exact=estimator is None)
    images, labels = np.asarray(images), np.asarray(labels).astype(np.int32)
    logits = jax.jit(lambda x: logits_fn(unit_range(x)))(images)
    check_images_labels(images, labels, logits.shape[-1])
    loss.check(logits.shape[-1])
    right = np.flatnonzero(np.argmax(np.asarray(logits), -1) == labels)
    if not len(right):
        raise ValueError(f"images: the victim classifies none of the {len(labels)} images correctly.")
    return SingleImageFamily(
        images=jnp.asarray(images[right]),
        labels=jnp.asarray(labels[right]),
        logits_fn=logits_fn,
        objective=loss,
        penalty=penalty,
        noise=noise,
        estimator=estimator,
    )
