"""Few-shot image classification: the weights of a network are fine-tuned on a few images of new classes."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Integer, PRNGKeyArray, Shaped

from lft_jax import base, oracles
from lft_jax._deprecation import renamed
from lft_jax.base import Episode, Oracle, PyTree, TaskFamily
from lft_jax.data import TaskSize, check_images_labels, class_table, draw_rows, resized, unit_range
from lft_jax.tasks._networks import apply_network, check_network, init_network
from lft_jax.tasks.perturbation import Batch

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassificationFamily(TaskFamily):
    """N-way M-shot classification tasks. Built by `classification_family`.

    A task draws `ways` classes, labels them 0 to ways - 1 in random order, and draws disjoint support and query images
    of each. The loss is the mean cross-entropy. The optimizee is the weights of a network of `lft_jax.tasks._networks`.
    Families of different image sizes, architectures or widths are incongruous: their optimizees have different shapes.

    Attributes:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      table: `[classes, most]` int32, the indices into `images` of each class, padded; see `lft_jax.data.class_table`.
      counts: `[classes]` int32, number of valid entries in each row of `table`.
      size: numbers of classes, support and query images of a task.
      architecture: "linear", "mlp", "conv4" or "conv4_strided".
      width: units of the hidden layer, or channels of each convolution.
    """

    images: jax.Array
    table: jax.Array
    counts: jax.Array
    size: TaskSize = dataclasses.field(metadata=_STATIC)
    architecture: str = dataclasses.field(metadata=_STATIC)
    width: int = dataclasses.field(metadata=_STATIC)

    def sample(self, key: PRNGKeyArray) -> Episode:
        """Draws classes, then disjoint support and query images of each; both sets are a `Batch`."""
        support, query = draw_rows(key, self.table, self.counts, self.size)

        def batch(rows):
            labels = jnp.repeat(jnp.arange(self.size.ways, dtype=jnp.int32), rows.shape[1])
            return Batch(unit_range(self.images[rows.ravel()]), labels)

        return Episode(batch(support), batch(query))

    def init(self, key: PRNGKeyArray) -> PyTree:
        """The start: random weights, see `lft_jax.tasks._networks.init_network`."""
        dtype = self.images.dtype if jnp.issubdtype(self.images.dtype, jnp.floating) else jnp.float32
        return init_network(self.architecture, self.width, self.images.shape[1:], self.size.ways, key, dtype)

    def oracle(self, support: Batch) -> Oracle:
        """The exact gradient, at one query per image."""
        return oracles.gradient(lambda theta: self.loss(theta, support), evaluations=len(support.labels))

    def loss(self, theta: PyTree, data: Batch) -> Float[Array, ""]:
        """The mean cross-entropy, in nats."""
        return _cross_entropy(apply_network(theta, data.images), data.labels)

    def project(self, theta: PyTree) -> PyTree:
        """The identity."""
        return theta

    def metrics(self, theta: PyTree, data: Batch) -> dict[str, Float[Array, ""]]:
        """`loss`, the mean cross-entropy in nats, and `accuracy`, in [0, 1]."""
        logits = apply_network(theta, data.images)
        return {
            "loss": _cross_entropy(logits, data.labels),
            "accuracy": jnp.mean(jnp.argmax(logits, -1) == data.labels, dtype=logits.dtype),
        }


def _cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@renamed(queries="query_shots")
def classification_family(
    images: Shaped[Array | np.ndarray, "N H W C"],
    labels: Integer[Array | np.ndarray, " N"],
    *,
    ways: int = 5,
    shots: int = 1,
    query_shots: int = 15,
    architecture: str = "conv4",
    width: int | None = None,
    size: int | None = None,
    classes: Sequence[int] | np.ndarray | None = None,
) -> ClassificationFamily:
    """A family of N-way M-shot classification tasks; see `ClassificationFamily`.

    Args:
      images: `[N, H, W, C]` uint8, or floating-point in [0, 1].
      labels: `[N]` integers from 0. Values without images are allowed.
      ways: classes of a task, at least 2.
      shots: support images per class, at least 1.
      query_shots: query images per class, disjoint from the support images, at least 1.
      architecture: "linear" (the head alone), "mlp" (one hidden layer), "conv4" (four convolutions with max pooling,
        after arXiv 1606.04080) or "conv4_strided" (four convolutions of stride 2 with batch statistics, which MAML uses
        for Omniglot, arXiv 1703.03400). The last one normalizes the query images together: transductive, as published.
      width: units of the hidden layer (32 if None), or channels of each convolution (16 if None, 64 if strided).
      size: height and width that images are scaled to; None keeps them as they are.
      classes: labels of the classes that tasks draw from; None for all. Meta-training and meta-test can so use
        different classes of one set.

    Returns:
      The family, a pytree.

    Raises:
      ValueError: for images outside [0, 1], labels or classes out of range, a class with fewer than
        `shots + query_shots` images, fewer than `ways` classes, or another argument out of range.

    Examples:
      >>> images, labels = np.zeros((30, 4, 4, 1), np.uint8), np.arange(30) % 3
      >>> family = classification_family(images, labels, ways=2, shots=1, query_shots=5, architecture="linear")
      >>> support, query = jax.eval_shape(family.sample, jax.random.key(0))
      >>> support.images.shape, query.images.shape
      ((2, 4, 4, 1), (10, 4, 4, 1))
    """
    base.check_at_least("ways", ways, 2)
    task_size = TaskSize(ways, shots, query_shots)
    width = check_network(architecture, width)
    check_images_labels(images, labels)
    images, labels = np.asarray(images), np.asarray(labels)
    present = np.unique(labels)
    chosen = present if classes is None else np.unique(np.asarray(classes))
    if not np.isin(chosen, present).all():
        missing = np.setdiff1d(chosen, present).tolist()
        raise ValueError(f"classes: no image has the labels {missing}.")
    if len(chosen) < ways:
        raise ValueError(f"ways: a task needs {ways} classes, but there are only {len(chosen)}.")
    kept = np.flatnonzero(np.isin(labels, chosen))
    images, labels = images[kept], np.searchsorted(chosen, labels[kept])
    table, counts = class_table(labels, len(chosen))
    if counts.min() < task_size.per_class:
        raise ValueError(
            f"shots + query_shots: class {chosen[counts.argmin()]} has {counts.min()} images, but a task needs "
            f"{task_size.per_class} per class."
        )
    if size is not None:
        images = resized(images, size)
    return ClassificationFamily(
        images=jnp.asarray(images),
        table=jnp.asarray(table),
        counts=jnp.asarray(counts),
        size=task_size,
        architecture=architecture,
        width=width,
    )
