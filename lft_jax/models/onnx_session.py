"""ONNX models as classifiers, which are evaluated only."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lft_jax.models._frameworks import required
from lft_jax.models._preparation import OUTPUTS, Preparation
from lft_jax.models.classifier import Classifier, HostModel, host_classifier

#: Types of an input, as onnxruntime names them.
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}


def from_onnx(
    model: Any,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: str = "first",
    input_range: tuple[float, float] = (0.0, 1.0),
    output: str | int = "logits",
    batch_size: int | None = None,
) -> Classifier:
    """A classifier that is an ONNX model, run by onnxruntime; it has no gradients.

    If the file has a fixed number of images, the last batch is padded. An input of type uint8 gets rounded values.

    Args:
      model: path of a `.onnx` file, its bytes, or an `onnxruntime.InferenceSession`. A file runs on the CPU; make a
        session for another device.
      mean: of each channel, or one number, in units of `input_range`; None for 0.
      std: the same of the standard deviation; None for 1.
      channels: "first" if it takes `[N, C, H, W]`, "last" for `[N, H, W, C]`.
      input_range: what 0 and 1 are for it before `mean` and `std`: (0, 255), say.
      output: "logits" or "probabilities" (whose logarithm is taken), `[N, classes]` or one column for two classes, of
        a model with one output; or the name or the index of the output with the logits.
      batch_size: largest number of images in one call, or None for no limit; see `Classifier`.

    Returns:
      The classifier, for attacks by queries (`oracle="query"`).

    Raises:
      ModuleNotFoundError: if onnxruntime is not installed.
      FileNotFoundError: for a path without a file.
      TypeError: for another kind of model.
      ValueError: for a file that onnxruntime cannot read; a model that has not one input of images, of a type in
        float32, float16, double and uint8; arguments out of range; when called, for an output that is not
        `[N, classes]`.

    Examples:
      With onnxruntime installed::

        model = lft_jax.models.from_onnx("mnist.onnx", input_range=(0, 255))
        result = lft_jax.universal_perturbation(model, images, labels, epsilon=0.2, oracle="query")
    """
    with required("onnxruntime", "onnx"):
        import onnxruntime

    preparation = Preparation(mean, std, channels, input_range)
    if isinstance(model, str | os.PathLike):
        if not Path(model).is_file():
            raise FileNotFoundError(f"model: there is no file {os.fspath(model)!r}.")
        session = _session(os.fspath(model), repr(os.fspath(model)))
    elif isinstance(model, bytes):
        session = _session(model, f"{len(model)} bytes")
    elif isinstance(model, onnxruntime.InferenceSession):
        session = model
    else:
        raise TypeError(
            "model must be the path of a .onnx file, its bytes, or an onnxruntime.InferenceSession, got "
            f"{type(model).__name__}."
        )
    given, dtype = _image_input(session)
    if dtype == np.uint8 and preparation.input_range[1] <= 1:
        raise ValueError(
            f"input_range must be that of uint8 images for the input {given.name!r} of the model, such as (0, 255), "
            f"got {input_range!r}."
        )
    found = _named_output(session, output)
    batch, *sides = (side if isinstance(side, int) else None for side in given.shape or (None,) * 4)
    shape = (*sides[1:], sides[0]) if channels == "first" else tuple(sides)
    classes = found.shape[-1] if len(found.shape or ()) == 2 and isinstance(found.shape[-1], int) else None

    def values(images):
        x = preparation.on_numpy(images)
        x = np.clip(np.rint(x), 0, 255) if dtype == np.uint8 else x
        return session.run([found.name], {given.name: np.ascontiguousarray(x, dtype)})[0]

    host = HostModel(values, output="probabilities" if output == "probabilities" else "logits", fixed_batch=batch)
    return host_classifier(host, num_classes=2 if classes == 1 else classes, input_shape=shape, batch_size=batch_size)


def _session(model, said):
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many kinds of exceptions for a damaged file
        raise ValueError(f"model: {said}: no ONNX model that onnxruntime can read ({error}).") from error


def _image_input(session):
    """The only input of a session, and its dtype."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(f"{i.name!r} {i.shape}" for i in inputs)
        raise ValueError(f"model must have one input, the images, got {len(inputs)}: {names}.")
    (given,) = inputs
    if given.type not in DTYPES:
        raise ValueError(f"model: its input {given.name!r} must be one of {sorted(DTYPES)}, got {given.type}.")
    if given.shape and len(given.shape) != 4:
        raise ValueError(f"model: its input {given.name!r} must be images with 4 axes, got {given.shape}.")
    return given, DTYPES[given.type]


def _named_output(session, output):
    """The output of a session that `output` names: by name, by index, or the only one."""
    outputs = {o.name: o for o in session.get_outputs()}
    if isinstance(output, int) and not isinstance(output, bool) and 0 <= output < len(outputs):
        return list(outputs.values())[output]
    if output in outputs:
        return outputs[output]
    if output in OUTPUTS and len(outputs) == 1:
        return next(iter(outputs.values()))
    raise ValueError(f"output must be one of {sorted(outputs)}, the outputs of the model, or an index, got {output!r}.")
