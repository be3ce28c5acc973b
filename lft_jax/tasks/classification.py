"""Few-shot image classification: a network's weights are fine-tuned on a few images of classes not met before."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax import base, oracles
from lft_jax.base import Episode, Oracle, PyTree, TaskFamily
from lft_jax.data import check_images_labels, class_table, draw_rows, resized, unit_range
from lft_jax.tasks.networks import apply_network, check_network, init_network
from lft_jax.tasks.perturbation import Batch

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassificationFamily(TaskFamily):
    """Tell `ways` classes apart, called 0 to ways - 1 in random order. Build it with `classification_family`.

    The optimizee is a network of `lft_jax.tasks.networks`. Families of other image sizes, architectures or widths share
    no variables: incongruous tasks.

    Attributes:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      table: `[classes, most]` int32, the rows of `images` of each class, padded.
      counts: `[classes]` int32, how many entries of each row of `table` count.
      ways: classes of a task.
      shots: support images a class.
      queries: query images a class.
      architecture: "linear", "mlp" or "conv4".
      width: of its layers.
    """

    images: jax.Array
    table: jax.Array
    counts: jax.Array
    ways: int = dataclasses.field(metadata=_STATIC)
    shots: int = dataclasses.field(metadata=_STATIC)
    queries: int = dataclasses.field(metadata=_STATIC)
    architecture: str = dataclasses.field(metadata=_STATIC)
    width: int = dataclasses.field(metadata=_STATIC)

    def sample(self, key: jax.Array) -> Episode:
        """Draws classes, then disjoint support and query images of each: `Batch`es of ways * shots, ways * queries."""
        rows = draw_rows(key, self.table, self.counts, self.ways, self.shots + self.queries)

        def batch(rows):
            labels = jnp.repeat(jnp.arange(self.ways, dtype=jnp.int32), rows.shape[1])
            return Batch(unit_range(self.images[rows.ravel()]), labels)

        return Episode(batch(rows[:, : self.shots]), batch(rows[:, self.shots :]))

    def init(self, key: jax.Array) -> PyTree:
        """Random weights, see `init_network`."""
        dtype = self.images.dtype if jnp.issubdtype(self.images.dtype, jnp.floating) else jnp.float32
        return init_network(self.architecture, self.width, self.images.shape[1:], self.ways, key, dtype)

    def oracle(self, support: Batch) -> Oracle:
        """The exact gradient; a query is an image."""
        return oracles.gradient(lambda theta: self.loss(theta, support), evaluations=len(support.labels))

    def loss(self, theta: PyTree, data: Batch) -> jax.Array:
        """`[]`, the mean cross-entropy in nats."""
        return _cross_entropy(apply_network(theta, data.images), data.labels)

    def project(self, theta: PyTree) -> PyTree:
        """The identity."""
        return theta

    def metrics(self, theta: PyTree, data: Batch) -> dict[str, jax.Array]:
        """`loss`, the mean cross-entropy in nats, and `accuracy`, in [0, 1]."""
        logits = apply_network(theta, data.images)
        return {
            "loss": _cross_entropy(logits, data.labels),
            "accuracy": jnp.mean(jnp.argmax(logits, -1) == data.labels, dtype=logits.dtype),
        }


def _cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def classification_family(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    architecture: str = "conv4",
    width: int | None = None,
    size: int | None = None,
    classes: Sequence[int] | None = None,
) -> ClassificationFamily:
    """A family of N-way M-shot tasks: `ways` classes, `shots` support and `queries` query images of each.

    Args:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` integers from 0; a label without images is no class.
      ways: classes of a task, at least 2.
      shots: support images a class.
      queries: query images a class, disjoint from the support images.
      architecture: of the network, "linear", "mlp" or "conv4".
      width: of its layers; None for the customary one, see `lft_jax.tasks.networks`.
      size: height and width that images are scaled to; None for their own.
      classes: those that tasks are drawn from, for meta-training and meta-test on different ones; None for all.

    Raises:
      ValueError: for images outside [0, 1], labels or classes out of range, a class with fewer than shots + queries
        images, fewer than `ways` classes, and names or numbers out of range.
    """
    for name, value, least in (("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1)):
        base.check_at_least(name, value, least)
    width = check_network(architecture, width)
    check_images_labels(images, labels)
    images, labels = np.asarray(images), np.asarray(labels)
    present = np.unique(labels)
    classes = present if classes is None else np.unique(classes)
    if not np.isin(classes, present).all():
        raise ValueError(f"classes must be labels of images, got {np.setdiff1d(classes, present).tolist()} besides.")
    if len(classes) < ways:
        raise ValueError(f"ways: {ways} classes a task were asked for, but there are only {len(classes)}.")
    kept = np.flatnonzero(np.isin(labels, classes))
    images, labels = images[kept], np.searchsorted(classes, labels[kept])
    table, counts = class_table(labels, len(classes))
    if counts.min() < shots + queries:
        few = f"class {classes[counts.argmin()]} has {counts.min()} images, fewer than the {shots + queries} asked for"
        raise ValueError(f"shots + queries: {few}.")
    if size is not None:
        images = resized(images, size)
    arrays = (jnp.asarray(x) for x in (images, table, counts))
    return ClassificationFamily(*arrays, ways, shots, queries, architecture, width)
