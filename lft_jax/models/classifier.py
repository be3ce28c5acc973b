"""A classifier as a function of images, and what stands between those images and the model of a framework."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import base

CHANNELS = ("first", "last")
OUTPUTS = ("logits", "probabilities")


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier: called with images `[N, H, W, C]` in [0, 1], it returns logits `[N, classes]`.

    Attributes:
      function: what is called.
      traceable: whether it is traced by `jax.jit`. If not, it runs eagerly where it can, which saves work: each value
        is computed once for the logits and their gradient. Under `jit`, `vmap` and `scan` it is called back.

    Examples:
      >>> Classifier(lambda images: images.mean((1, 2)))(np.ones((2, 4, 4, 3), np.float32)).shape
      (2, 3)
    """

    function: Callable[[Any], Any]
    traceable: bool = True

    def __call__(self, images: Any) -> Any:
        """The logits `[N, classes]` of images `[N, H, W, C]`."""
        return self.function(images)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What turns images in [0, 1] into the input of a model: `(x * (high - low) + low - mean) / std`, then channels.

    Attributes:
      mean: of each channel, or one number, in units of `input_range`; None for 0.
      std: the same of the standard deviation, above 0; None for 1.
      channels: "first" for `[N, C, H, W]`, "last" for `[N, H, W, C]`.
      input_range: what 0 and 1 are for the model before `mean` and `std`: (0, 255), say.
    """

    mean: Sequence[float] | float | None = None
    std: Sequence[float] | float | None = None
    channels: str = "last"
    input_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        base.check_name("channels", self.channels, CHANNELS)
        low, high = self.input_range
        if not low < high:
            raise ValueError(f"input_range must be two ascending numbers, such as (0, 255), got {self.input_range!r}.")
        for name in ("mean", "std"):
            value = np.asarray(0.5 if getattr(self, name) is None else getattr(self, name))
            if value.ndim > 1 or not np.all(np.isfinite(value)) or (name == "std" and not np.all(value > 0)):
                raise ValueError(
                    f"{name} must be a finite number{' above 0' * (name == 'std')}, or one per channel, got "
                    f"{getattr(self, name)!r}."
                )

    def scale_and_offset(self) -> tuple[np.ndarray, np.ndarray]:
        """`(scale, offset)`, float32 `[C]` or `[1]`: the input of the model is `x * scale + offset`."""
        low, high = self.input_range
        mean = np.atleast_1d(np.asarray(0.0 if self.mean is None else self.mean, np.float64))
        std = np.atleast_1d(np.asarray(1.0 if self.std is None else self.std, np.float64))
        return ((high - low) / std).astype(np.float32), ((low - mean) / std).astype(np.float32)


def from_function(
    function: Callable[[Any], Any],
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: str = "last",
    input_range: tuple[float, float] = (0.0, 1.0),
    output: str | int | Callable[[Any], Any] = "logits",
) -> Classifier:
    """A classifier that is a JAX function, with what its images must look like.

    Args:
      function: traced and differentiated by JAX; images as described by the other arguments -> its output.
      mean: of each channel, or one number, in units of `input_range`; None for 0.
      std: the same of the standard deviation; None for 1.
      channels: "last" if it takes `[N, H, W, C]`, "first" for `[N, C, H, W]`.
      input_range: what 0 and 1 are for it before `mean` and `std`: (0, 255), say.
      output: "logits" or "probabilities" (whose logarithm is taken), `[N, classes]` or one column for two classes; or
        a key, an index or a function that finds the logits in what it returns.

    Returns:
      The classifier.

    Raises:
      ValueError: for arguments out of range; when called, for an output that is not `[N, classes]`.

    Examples:
      >>> model = from_function(lambda x: x.mean((2, 3)), mean=0.5, std=0.25, channels="first")
      >>> model(np.ones((1, 4, 4, 3), np.float32)).tolist()
      [[2.0, 2.0, 2.0]]
    """
    scale, offset = Preparation(mean, std, channels, input_range).scale_and_offset()

    def call(images):
        images = jnp.asarray(images)
        x = images * scale.astype(images.dtype)[None, None, None] + offset.astype(images.dtype)[None, None, None]
        return as_logits(function(jnp.moveaxis(x, -1, 1) if channels == "first" else x), output, len(images))

    return Classifier(call)


def select_output(result: Any, output: str | int | Callable[[Any], Any]) -> Any:
    """The part of what a model returns that `output` names: "logits", "probabilities", a key, an index, a function."""
    if callable(output):
        return output(result)
    if isinstance(output, int) or output not in OUTPUTS:
        return result[output]
    if isinstance(result, dict) or hasattr(result, "keys"):
        if output in result:
            return result[output]
        raise ValueError(f"output: the model returns a dictionary of {sorted(result)}; name the key of its logits.")
    if result is None or isinstance(result, tuple | list):
        raise ValueError(
            f"output: the model returns a {type(result).__name__}; give the index of its logits, or a function."
        )
    return result


def as_logits(result: Any, output: str | int | Callable[[Any], Any], num_images: int) -> jax.Array:
    """Logits `[N, classes]` from what a model returns, two classes from one column, logarithms of probabilities."""
    values = jnp.asarray(select_output(result, output))
    if values.ndim == 1 and len(values) == num_images:
        values = values[:, None]
    if values.ndim != 2 or len(values) != num_images:
        raise ValueError(f"model must return [{num_images}, classes], got shape {values.shape}.")
    if output == "probabilities":
        tiny = jnp.finfo(values.dtype).tiny
        values = jnp.concatenate([1 - values, values], 1) if values.shape[1] == 1 else values
        return jnp.log(jnp.maximum(values, tiny))
    return jnp.concatenate([jnp.zeros_like(values), values], 1) if values.shape[1] == 1 else values
