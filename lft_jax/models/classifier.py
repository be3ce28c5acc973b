"""A classifier of any framework as one function of images, and what a wrong one is told."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax.models._preparation import as_logits

#: Adapters of objects that are no functions of images, by the package of their class or of one that it derives from.
ADAPTERS = {
    "equinox": "from_equinox(module)",
    "flax.linen": "from_flax(module, variables)",
    "flax.nnx": "from_nnx(module)",
    "torch": "from_torch(module, mean=..., std=...)",
    "keras": "from_keras(model)",
    "tensorflow": "from_keras(model), or from_function with oracle='query'",
    "sklearn": "from_sklearn(estimator)",
    "onnxruntime": "from_onnx(session)",
    "onnx": "from_onnx(path)",
}


@dataclasses.dataclass(frozen=True, eq=False)
class HostModel:
    """A model that runs outside of JAX, on NumPy arrays.

    Attributes:
      values: images `[N, H, W, C]`, float32 in [0, 1], read-only -> scores `[N, columns]` or `[N]`.
      pull_back: the same images -> `(scores, vjp)`, where `vjp` takes an array like the scores to one like the images:
        the derivative of their scalar product. None for a model without gradients.
      output: "logits" or "probabilities": what the scores are; one column stands for two classes.
      fixed_batch: the one number of images that the model takes, or None if it takes any.
      pads: whether a smaller last batch is padded to `batch_size`. False for a model that is paid for each image.

    Examples:
      >>> HostModel(lambda images: images.mean((1, 2))).scores(np.ones((2, 4, 4, 3), np.float32)).tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    values: Callable[[np.ndarray], Any]
    pull_back: Callable[[np.ndarray], tuple[Any, Callable[[np.ndarray], Any]]] | None = None
    output: str = "logits"
    fixed_batch: int | None = None
    pads: bool = True

    def scores(self, images: Any, batch_size: int | None = None) -> np.ndarray:
        """The scores `[N, columns]` of images `[N, H, W, C]`, at most `batch_size` of them in a call."""
        images = np.asarray(images, np.float32)
        parts = [self._scores(self.values(batch), batch)[:used] for batch, used in self._batches(images, batch_size)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def pulled(self, images: Any, batch_size: int | None = None) -> tuple[np.ndarray, Callable[[Any], np.ndarray]]:
        """The scores of images, and the function that takes an array like them to one like the images.

        In more than one batch, each is computed again for its derivatives, so that one batch at a time is in memory.
        """
        assert self.pull_back is not None
        pull_back, dtype = self.pull_back, images.dtype
        images = np.asarray(images, np.float32)
        batches = self._batches(images, batch_size)
        if len(batches) > 1:
            return self.scores(images, batch_size), lambda cotangent: _in_parts(
                pull_back, batches, np.asarray(cotangent)
            ).astype(dtype)
        ((batch, used),) = batches
        scores, vjp = pull_back(batch)

        def pull(cotangent):
            return np.asarray(vjp(_padded(np.asarray(cotangent), len(batch), 0.0)), dtype)[:used]

        return self._scores(scores, batch)[:used], pull

    def _batches(self, images, batch_size):
        """`[(images of a call, number that count)]`; if the model takes any batch, at most a remainder is padded."""
        size = self.fixed_batch or batch_size or max(len(images), 1)
        parts = [images[first : first + size] for first in range(0, max(len(images), 1), size)]
        least = size if self.fixed_batch or (self.pads and len(parts) > 1) else 0
        return [(_padded(part, least), len(part)) for part in parts]

    def _scores(self, scores, batch):
        scores = np.asarray(scores)
        scores = scores if np.issubdtype(scores.dtype, np.floating) else scores.astype(np.float32)
        scores = scores[:, None] if scores.ndim == 1 and len(scores) == len(batch) else scores
        if scores.ndim != 2 or len(scores) != len(batch):
            raise ValueError(f"model must return [{len(batch)}, classes], got shape {scores.shape}.")
        return scores.astype(np.float32)


def _in_parts(pull_back, batches, cotangent):
    """The gradient of images in batches, one graph at a time in memory."""
    found, first = [], 0
    for batch, used in batches:
        _, vjp = pull_back(batch)
        rows = _padded(cotangent[first : first + used], len(batch), 0.0)
        found.append(np.asarray(vjp(rows), batch.dtype)[:used])
        first += used
    return np.concatenate(found)


def _padded(rows, length, value=None):
    """Rows `[n, ...]`, filled up to `length` with the last one or with a value."""
    missing = length - len(rows)
    if missing <= 0:
        return rows
    fill = rows[-1:] if value is None else np.full_like(rows[-1:], value)
    return np.concatenate([rows, np.repeat(fill, missing, 0)])


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier: called with images `[N, H, W, C]` in [0, 1], it returns logits `[N, classes]`.

    The functions of `lft_jax.models` make one of a model of any framework. JAX traces it, or else calls it back: one of
    a host model runs eagerly where it can, which computes each value once for the logits and their gradient.

    Attributes:
      function: images `[N, H, W, C]`, floating-point in [0, 1] -> logits. For a JAX function a
        `jax.tree_util.Partial`, whose arguments are its weights. Of a host model, the model as JAX sees it.
      host: the model outside of JAX, or None for a JAX function.
      num_classes: number of classes, or None if unknown.
      input_shape: `(H, W, C)` of its images, None for an axis of any length; or None if unknown.
      batch_size: largest number of images in one call of the model, or None for no limit. For a JAX function, a
        remainder is padded; with a gradient, each batch is computed twice, so that one at a time is in memory.
      refresh: for a module whose weights change in place: returns the `function` with its present weights.

    Examples:
      >>> from lft_jax.models import from_function
      >>> from_function(lambda images: images.mean((1, 2)))(np.ones((2, 4, 4, 3), np.uint8) * 255).tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    function: Callable[[Any], Any]
    host: HostModel | None = None
    num_classes: int | None = None
    input_shape: tuple[int | None, ...] | None = None
    batch_size: int | None = None
    refresh: Callable[[], Callable[[Any], Any]] | None = None

    def __post_init__(self):
        try:
            valid = self.batch_size is None or operator.index(self.batch_size) >= 1
        except TypeError:
            valid = False
        if not valid or isinstance(self.batch_size, bool):
            raise ValueError(f"batch_size must be an integer, at least 1, got {self.batch_size!r}.")

    @property
    def differentiable(self) -> bool:
        """Whether it has gradients."""
        return self.host is None or self.host.pull_back is not None

    def __call__(self, images: Any) -> jax.Array:
        """The logits `[N, classes]` of images `[N, H, W, C]`, floating-point in [0, 1], or uint8.

        Raises:
          ValueError: for images of another shape than the model's, or of other integers; for an output that is not
            `[N, classes]`.
        """
        images = jnp.asarray(images)
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be uint8 or floating-point, got {images.dtype}.")
        images = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
        self.check_shape(images.shape)
        if self.host is not None:
            return _called_back(self.host, self.batch_size, images)
        return self.traced()(images)

    def __repr__(self) -> str:
        """Without the weights."""
        of = "a JAX function" if self.host is None else "a host model"
        gradients = "with gradients" if self.differentiable else "without gradients"
        known = {name: getattr(self, name) for name in ("num_classes", "input_shape", "batch_size")}
        said = "".join(f", {name}={value}" for name, value in known.items() if value is not None)
        return f"Classifier({of}, {gradients}{said})"

    def traced(self) -> jax.tree_util.Partial:
        """The function with its present weights, in batches, as JAX traces it: images -> logits."""
        if self.host is not None:
            return jax.tree_util.Partial(self)
        function = self.function if self.refresh is None else self.refresh()
        function = function if isinstance(function, jax.tree_util.Partial) else jax.tree_util.Partial(function)
        return function if self.batch_size is None else jax.tree_util.Partial(_Batched(self.batch_size), function)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises a ValueError unless images of this shape `(N, H, W, C)` are what the model takes."""
        known = self.input_shape or (None, None, None)
        if len(shape) != 4 or any(side not in (None, given) for side, given in zip(known, shape[1:], strict=True)):
            sides = ", ".join(name if side is None else str(side) for side, name in zip(known, "HWC", strict=True))
            raise ValueError(f"images must be [N, {sides}] for this model, got {tuple(shape)}.")


def as_classifier(model: Any) -> Classifier:
    """The model itself if it is a `Classifier`, or one of a function of images in [0, 1].

    Args:
      model: a `Classifier`, or a function of images `[N, H, W, C]`.

    Returns:
      The classifier, whose `function` is a `jax.tree_util.Partial` of the given one.

    Raises:
      TypeError: for an object of another framework, with the adapter to use; for what cannot be called.

    Examples:
      >>> as_classifier(lambda images: images.mean((1, 2))).differentiable
      True
      >>> as_classifier("resnet20")
      Traceback (most recent call last):
      ...
      TypeError: model must be a function of images [N, H, W, C] or a Classifier of lft_jax.models, got str.
    """
    if isinstance(model, Classifier):
        return model
    for kind in type(model).__mro__:
        packages = itertools.accumulate(kind.__module__.split("."), "{}.{}".format)
        adapter = next((ADAPTERS[package] for package in packages if package in ADAPTERS), None)
        if adapter is not None:
            raise TypeError(
                f"model is of {kind.__module__}.{kind.__qualname__}, got {type(model).__name__}: pass "
                f"lft_jax.models.{adapter}."
            )
    if not callable(model):
        raise TypeError(
            f"model must be a function of images [N, H, W, C] or a Classifier of lft_jax.models, got "
            f"{type(model).__name__}."
        )
    partial = model if isinstance(model, jax.tree_util.Partial) else jax.tree_util.Partial(model)
    return Classifier(jax.tree_util.Partial(_logits, partial))


def _logits(model, images):
    return as_logits(model(images), "logits", len(images))


def on_numpy(model: Any) -> Classifier:
    """The model itself if it is a `Classifier`, or one of any function of NumPy images, which is never differentiated.

    Args:
      model: a `Classifier`, or a function of writable NumPy images `[N, H, W, C]`.

    Returns:
      The classifier.

    Raises:
      TypeError: as `as_classifier`.

    Examples:
      >>> on_numpy(lambda images: images.mean((1, 2))).differentiable
      False
    """
    if isinstance(model, Classifier):
        return model
    as_classifier(model)  # refuses what is no function
    return host_classifier(HostModel(lambda batch: as_logits(model(np.array(batch)), "logits", len(batch))))


def host_classifier(
    host: HostModel,
    *,
    num_classes: int | None = None,
    input_shape: tuple[int | None, ...] | None = None,
    batch_size: int | None = None,
) -> Classifier:
    """The classifier of a model outside of JAX.

    Args:
      host: the model.
      num_classes: number of classes, or None if unknown.
      input_shape: `(H, W, C)` of its images, None for an axis of any length; or None if unknown.
      batch_size: largest number of images in one call, or None for no limit.

    Returns:
      The classifier.

    Examples:
      >>> model = host_classifier(HostModel(lambda images: images.mean((1, 2))), batch_size=1)
      >>> model(np.ones((2, 4, 4, 3), np.float32)).shape, model.differentiable
      ((2, 3), False)
    """
    return Classifier(functools.partial(_called_back, host, None), host, num_classes, input_shape, batch_size)


@dataclasses.dataclass(frozen=True)
class _Batched:
    """A JAX function of images in batches, one at a time in memory, also when it is differentiated."""

    size: int

    def __call__(self, function, images):
        return function(images) if len(images) <= self.size else in_batches(function, images, self.size)


def in_batches(function: Callable[[jax.Array], Any], images: jax.Array, size: int) -> Any:
    """What a JAX function returns for images `[N, H, W, C]`, in batches of exactly `size`; the last one is padded.

    One batch at a time is in memory, also when it is differentiated.

    Args:
      function: images `[size, H, W, C]` -> a pytree of arrays `[size, ...]`.
      images: any number of them.
      size: number of images in a batch.

    Returns:
      The pytree of arrays `[N, ...]`.
    """
    count, sides = len(images), images.shape[1:]
    padding = jnp.broadcast_to(images[-1:], (-count % size, *sides))
    batches = jnp.concatenate([images, padding]).reshape(-1, size, *sides)
    if isinstance(images, jax.core.Tracer):
        results = jax.lax.map(jax.checkpoint(function), batches)
    else:  # `lax.map` would compile again in each call
        results = jax.tree.map(lambda *parts: jnp.stack(parts), *map(function, batches))
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:count], results)


def _called_back(host, batch_size, images):
    """Logits of a host model: eagerly one pass for logits and gradient, under JAX transformations by callbacks."""
    if not isinstance(images, jax.core.Tracer):
        return as_logits(host.scores(images, batch_size), host.output, len(images))

    def columns():
        return host.scores(np.zeros((1, *images.shape[1:]), np.float32)).shape[1:]

    def scores(images):
        return host.scores(images, batch_size)

    @jax.custom_vjp
    def call(images):
        shape = jax.ShapeDtypeStruct((len(images), *columns()), jnp.float32)
        return jax.pure_callback(scores, shape, images, vmap_method="sequential")

    def forward(images):
        if host.pull_back is None:
            raise ValueError("model has no gradients; pass oracle='query' (or an estimator) to evaluate it only.")
        if isinstance(images, jax.core.Tracer):
            return call(images), images
        found, pull = host.pulled(images, batch_size)
        return jnp.asarray(found), _Opaque(pull)

    def backward(saved, cotangent):
        if isinstance(saved, _Opaque):
            return (jnp.asarray(saved.value(cotangent)),)
        shape = jax.ShapeDtypeStruct(saved.shape, saved.dtype)

        def again(images, cotangent):
            return host.pulled(images, batch_size)[1](cotangent)

        return (jax.pure_callback(again, shape, saved, cotangent, vmap_method="sequential"),)

    call.defvjp(forward, backward)
    return as_logits(call(images), host.output, len(images))


@jax.tree_util.register_pytree_node_class
class _Opaque:
    """What JAX hands from the forward to the backward pass of an eager call without looking inside."""

    def __init__(self, value):
        self.value = value

    def tree_flatten(self):
        return (), self

    @classmethod
    def tree_unflatten(cls, opaque, _):
        return opaque
