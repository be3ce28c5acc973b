"""Few-shot image classification: a network's weights are fine-tuned on a few images of classes not met before."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lft_jax import base, oracles
from lft_jax.base import Episode, Oracle, PyTree, TaskFamily
from lft_jax.data import TaskSize, check_images_labels, class_table, draw_rows, resized, unit_range
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
      size: classes, support and query images of a task.
      architecture: "linear", "mlp" or "conv4".
      width: of its layers.
    """

    images: jax.Array
    table: jax.Array
    counts: jax.Array
    size: TaskSize = dataclasses.field(metadata=_STATIC)
    architecture: str = dataclasses.field(metadata=_STATIC)
    width: int = dataclasses.field(metadata=_STATIC)

    def sample(self, key: jax.Array) -> Episode:
        """Draws classes, then disjoint support and query images of each: a `Batch` of each set."""
        support, query = draw_rows(key, self.table, self.counts, self.size)

        def batch(rows):
            labels = jnp.repeat(jnp.arange(self.size.ways, dtype=jnp.int32), rows.shape[1])
            return Batch(unit_range(self.images[rows.ravel()]), labels)

        return Episode(batch(support), batch(query))

    def init(self, key: jax.Array) -> PyTree:
        """Random weights, see `init_network`."""
        dtype = self.images.dtype if jnp.issubdtype(self.images.dtype, jnp.floating) else jnp.float32
        return init_network(self.architecture, self.width, self.images.shape[1:], self.size.ways, key, dtype)

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
    query_shots: int = 15,
    architecture: str = "conv4",
    width: int | None = None,
    size: int | None = None,
    classes: Sequence[int] | None = None,
) -> ClassificationFamily:
    """A family of N-way M-shot tasks: `ways` classes, `shots` support and `query_shots` query images of each.

    Args:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` integers from 0; a label without images is no class.
      ways: classes of a task, at least 2.
      shots: support images per class.
      query_shots: query images per class, disjoint from the support images.
      architecture: of the network, "linear", "mlp" or "conv4".
      width: of its layers; None for the customary one, see `lft_jax.tasks.networks`.
      size: height and width that images are scaled to; None for their own.
      classes: those that tasks are drawn from, for meta-training and meta-test on different ones; None for all.

    Raises:
      ValueError: for images outside [0, 1], labels or classes out of range, a class with fewer than
        `shots + query_shots` images, fewer than `ways` classes, and names or numbers out of range.
    """
    base.check_at_least("ways", ways, 2)
    task_size = TaskSize(ways, shots, query_shots)
    width = check_network(architecture, width)
    check_images_labels(images, labels)
    images, labels = np.asarray(images), np.asarray(labels)
    present = np.unique(labels)
    classes = present if classes is None else np.unique(classes)
    if not np.isin(classes, present).all():
        raise ValueError(f"classes must be labels of images, got {np.setdiff1d(classes, present).tolist()} besides.")
    if len(classes) < ways:
        raise ValueError(f"ways: {ways} classes per task were asked for, but there are only {len(classes)}.")
    kept = np.flatnonzero(np.isin(labels, classes))
    images, labels = images[kept], np.searchsorted(classes, labels[kept])
    table, counts = class_table(labels, len(classes))
    if counts.min() < task_size.per_class:
        raise ValueError(
            f"shots + query_shots: class {classes[counts.argmin()]} has {counts.min()} images, fewer than the "
            f"{task_size.per_class} asked for."
        )
    if size is not None:
        images = resized(images, size)
    arrays = (jnp.asarray(x) for x in (images, table, counts))
    return ClassificationFamily(*arrays, task_size, architecture, width)
