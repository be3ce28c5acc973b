"""What stands between images in [0, 1] and the input of a model, and between its output and logits."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import base

CHANNELS = ("first", "last")
OUTPUTS = ("logits", "probabilities")


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
        for name in ("mean", "std"):  # hashable, so that equal ones share compiled programs
            value = getattr(self, name)
            if value is not None:
                value = np.asarray(value)
                object.__setattr__(self, name, tuple(value.tolist()) if value.ndim else value.item())
        base.check_name("channels", self.channels, CHANNELS)
        bounds = np.atleast_1d(np.asarray(self.input_range))
        if bounds.shape != (2,) or not bounds[0] < bounds[1]:
            raise ValueError(f"input_range must be two ascending numbers, such as (0, 255), got {self.input_range!r}.")
        object.__setattr__(self, "input_range", tuple(bounds.tolist()))
        for name in ("mean", "std"):
            value = np.asarray(0.5 if getattr(self, name) is None else getattr(self, name))
            if value.ndim > 1 or not np.all(np.isfinite(value)) or (name == "std" and not np.all(value > 0)):
                raise ValueError(
                    f"{name} must be a finite number{' above 0' * (name == 'std')}, or one per channel, got "
                    f"{getattr(self, name)!r}."
                )

    def check_images(self, images: Any) -> None:
        """Raises a ValueError where `mean` or `std` are of another number of channels than images `[N, H, W, C]`."""
        for name in ("mean", "std"):
            given = np.size(getattr(self, name) or 0.0)
            if given not in (1, images.shape[-1]):
                raise ValueError(
                    f"{name} must be a number, or one per channel of the images {tuple(images.shape)}, got {given}."
                )

    def scale_and_offset(self) -> tuple[np.ndarray, np.ndarray]:
        """`(scale, offset)`, float32 `[C]` or `[1]`: the input of the model is `x * scale + offset`."""
        low, high = self.input_range
        mean = np.atleast_1d(np.asarray(0.0 if self.mean is None else self.mean, np.float64))
        std = np.atleast_1d(np.asarray(1.0 if self.std is None else self.std, np.float64))
        return ((high - low) / std).astype(np.float32), ((low - mean) / std).astype(np.float32)

    def on_numpy(self, images: np.ndarray) -> np.ndarray:
        """The input of the model, of NumPy images `[N, H, W, C]` in [0, 1]."""
        self.check_images(images)
        scale, offset = self.scale_and_offset()
        x = images * scale + offset
        return np.moveaxis(x, -1, 1) if self.channels == "first" else x


def select_output(result: Any, output: str | int | Callable[[Any], Any]) -> Any:
    """The part of what a model returns that `output` names: "logits", "probabilities", a key, an index, a function."""
    if callable(output):
        return output(result)
    if isinstance(output, int) or output not in OUTPUTS:
        if hasattr(result, "shape"):
            raise ValueError(
                f"output: the model returns one array {tuple(result.shape)}, which has no part {output!r}; pass "
                "'logits' or 'probabilities', or a function."
            )
        try:
            return result[output]
        except (LookupError, TypeError) as error:
            there = sorted(map(str, result.keys())) if hasattr(result, "keys") else type(result).__name__
            raise ValueError(f"output: {output!r} is no part of what the model returns, {there}.") from error
    advice = "an adapter (lft_jax.models.from_function, from_torch, ...) takes output="
    if hasattr(result, "keys"):
        names = sorted(map(str, result.keys()))
        if output in result:
            return result[output]
        raise ValueError(
            f"output: the model returns a {type(result).__name__} of {names}; {advice} the key of its logits."
        )
    if result is None:
        raise ValueError("output: the model returns None, got no logits [N, classes]; does its function return?")
    if isinstance(result, list) and not any(hasattr(part, "shape") for part in result):
        return np.asarray(result)
    if isinstance(result, tuple | list):
        raise ValueError(
            f"output: the model returns a {type(result).__name__} of {len(result)}; {advice} the index of its logits, "
            "or a function."
        )
    if not hasattr(result, "shape"):
        raise ValueError(
            f"output: the model returns a {type(result).__name__}, which is no array; {advice} a function that finds "
            "the logits."
        )
    return result


def as_logits(result: Any, output: str | int | Callable[[Any], Any], num_images: int) -> jax.Array:
    """Logits `[N, classes]` from what a model returns, two classes from one column, logarithms of probabilities."""
    values = jnp.asarray(select_output(result, output))
    if not jnp.issubdtype(values.dtype, jnp.floating) or values.dtype.itemsize < 4:  # too coarse for losses
        values = values.astype(jnp.float32)
    if values.ndim == 1 and len(values) == num_images:
        values = values[:, None]
    if values.ndim != 2 or len(values) != num_images:
        raise ValueError(f"model must return [{num_images}, classes], got shape {values.shape}.")
    if output == "probabilities":
        tiny = jnp.finfo(values.dtype).tiny
        values = jnp.concatenate([1 - values, values], 1) if values.shape[1] == 1 else values
        return jnp.log(jnp.maximum(values, tiny))
    return jnp.concatenate([jnp.zeros_like(values), values], 1) if values.shape[1] == 1 else values
