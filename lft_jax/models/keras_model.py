"""Keras 3 models as classifiers, on each of its backends."""

import dataclasses
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lft_jax.models._frameworks import required
from lft_jax.models._preparation import Preparation, select_output
from lft_jax.models.classifier import Classifier, HostModel, host_classifier, in_batches
from lft_jax.models.functions import from_function
from lft_jax.models.torch_module import autograd_host

#: Last layers, or their activations, whose output is probabilities.
NORMALIZED = ("softmax", "sigmoid")


def from_keras(
    model: Any,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: str = "last",
    input_range: tuple[float, float] = (0.0, 1.0),
    output: str | int | Callable[[Any], Any] = "logits",
    batch_size: int | None = None,
) -> Classifier:
    """A classifier that is a Keras 3 model, called with `training=False`.

    Its gradients are those of the backend that `KERAS_BACKEND` chose: of JAX, which traces the model, of torch
    autograd, or of `tf.GradientTape`. On any other backend it is only evaluated.

    Args:
      model: a `keras.Model` of images, or the path of a `.keras` or `.h5` file, which is loaded with `safe_mode=True`.
        Weights that are changed later in place, by `model.fit`, are the ones used.
      mean: of each channel, or one number, in units of `input_range`; None for 0.
      std: the same of the standard deviation; None for 1.
      channels: "last" if it takes `[N, H, W, C]`, "first" for `[N, C, H, W]`.
      input_range: what 0 and 1 are for it before `mean` and `std`: (0, 255), say. (0, 1) for a model that begins with
        a `Rescaling` layer for images in [0, 1].
      output: "logits" or "probabilities" (whose logarithm is taken), `[N, classes]` or one column for two classes; or
        a key, an index or a function that finds the logits in what it returns.
      batch_size: largest number of images in one call, or None for no limit; see `Classifier`.

    Returns:
      The classifier. If the model has a fixed number of images, batches are padded to it.

    Raises:
      ModuleNotFoundError: if keras, or the backend that it is set to, is not installed.
      FileNotFoundError: for a path without a file.
      TypeError: for another kind of model.
      ValueError: for a model that is not built or whose input is not one batch of images, or arguments out of range;
        when called, for an output that is not `[N, classes]`.

    Examples:
      With keras installed::

        os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported
        model = lft_jax.models.from_keras("mnist.keras", output="probabilities")
        result = lft_jax.universal_perturbation(model, images, labels, epsilon=0.2)
    """
    with required("keras", "keras", "it is the backend of keras; set KERAS_BACKEND=jax before keras is imported"):
        import keras

    preparation = Preparation(mean, std, channels, input_range)
    if isinstance(model, str | os.PathLike):
        if not Path(model).is_file():
            raise FileNotFoundError(f"model: there is no file {os.fspath(model)!r}.")
        model = keras.saving.load_model(model, compile=False, safe_mode=True)
    if not isinstance(model, keras.Model):
        kind = type(model)
        raise TypeError(
            f"model must be a keras.Model of Keras 3 or the path of a .keras or .h5 file, got {kind.__qualname__} of "
            f"{kind.__module__}."
        )
    if not model.built:
        raise ValueError(f"model must be built, got {model.name!r} without weights; call it once on images.")
    fixed_batch, input_shape = _input_shape(model, channels)
    if output == "logits" and (last := _normalization(model)):
        warnings.warn(
            f"output='logits', but the last layer of the model is a {last}: output='probabilities' is likely meant.",
            stacklevel=2,
        )
    known = {"num_classes": _num_classes(model), "input_shape": input_shape, "batch_size": batch_size}
    backend = keras.backend.backend()
    if backend == "jax":
        options = {"mean": mean, "std": std, "channels": channels, "input_range": input_range, "output": output}

        def present():
            weights = ([v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables))
            return from_function(jax.tree_util.Partial(_Stateless(model, fixed_batch), *weights), **options).function

        return Classifier(present(), **known, refresh=present)
    if backend == "torch":
        host = autograd_host(model, lambda x: model(x, training=False), preparation, output, fixed_batch)
    else:
        host = _keras_host(keras, model, preparation, output, fixed_batch)
    return host_classifier(host, **known)


@dataclasses.dataclass(frozen=True)
class _Stateless:
    """Weights and prepared images -> what a Keras model on the JAX backend returns."""

    model: Any
    fixed_batch: int | None

    def __call__(self, trainable, non_trainable, images):
        def call(x):
            result, _ = self.model.stateless_call(trainable, non_trainable, x, training=False)
            return jax.tree.map(lambda y: y.astype(jnp.float32), result)

        return call(images) if self.fixed_batch is None else in_batches(call, images, self.fixed_batch)


def _keras_host(keras, model, preparation, output, fixed_batch):
    """The model on a backend that is neither JAX nor torch; TensorFlow has gradients."""
    scale, offset = preparation.scale_and_offset()

    def forward(images):
        preparation.check_images(images)
        x = images * scale + offset
        x = keras.ops.transpose(x, (0, 3, 1, 2)) if preparation.channels == "first" else x
        return keras.ops.cast(select_output(model(x, training=False), output), "float32")

    def values(images):
        return keras.ops.convert_to_numpy(forward(keras.ops.convert_to_tensor(images)))

    def pull_back(images):
        tensorflow = importlib.import_module("tensorflow")  # which keras has imported
        inputs = tensorflow.constant(images)
        with tensorflow.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(inputs)
            outputs = forward(inputs)

        def vjp(cotangent):
            return tape.gradient(outputs, inputs, tensorflow.reshape(cotangent, outputs.shape)).numpy()

        return outputs.numpy(), vjp

    known = "probabilities" if output == "probabilities" else "logits"
    return HostModel(values, pull_back if keras.backend.backend() == "tensorflow" else None, known, fixed_batch)


def _input_shape(model, channels):
    """`(fixed number of images or None, (H, W, C) or None)`; a subclass of `Model` may not know its own."""
    try:
        shape = model.input_shape
    except (AttributeError, ValueError):
        return None, None
    if not isinstance(shape, tuple) or not all(side is None or isinstance(side, int) for side in shape):
        raise ValueError(f"model must have one input, the images, got inputs of shape {shape}.")
    if len(shape) == 3 and channels == "last":  # Keras drops a last axis of length 1 itself
        shape = (*shape, 1)
    if len(shape) != 4:
        raise ValueError(f"model must take images with 4 axes, got an input of shape {shape}.")
    batch, *sides = shape
    return batch, (*sides[1:], sides[0]) if channels == "first" else tuple(sides)


def _num_classes(model):
    try:
        shape = model.output_shape
    except (AttributeError, ValueError):
        return None
    known = isinstance(shape, tuple) and len(shape) == 2 and isinstance(shape[1], int)
    return max(shape[1], 2) if known else None


def _normalization(model):
    """ "softmax" or "sigmoid" if the last layer or its activation is one, else None."""
    last = model
    while getattr(last, "layers", None):
        last = last.layers[-1]
    name = getattr(getattr(last, "activation", last), "__name__", type(last).__name__).lower()
    return name if name in NORMALIZED else None
