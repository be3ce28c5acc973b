"""Images of another library, and ours."""

import dataclasses

import numpy as np

from lft_jax import base

CHANNELS = ("first", "last")
_ROUNDING = 1e-3  # of values beyond black and white, in units of the image range


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a library writes images: the order of their axes, and the values of black and white.

    Attributes:
      channels: "first" for `[N, C, H, W]`, "last" for `[N, H, W, C]`.
      low: value that is 0 here.
      high: value that is 1 here, above `low`.
      image_shape: `(H, W, C)` where images are flat, `[N, H * W * C]`; None where they are not.
    """

    channels: str = "last"
    low: float = 0.0
    high: float = 1.0
    image_shape: tuple[int, int, int] | None = None

    def check(self) -> "Layout":
        """Returns itself; raises a ValueError for a field out of range."""
        base.check_name("channels", self.channels, CHANNELS)
        if not self.low < self.high:
            raise ValueError(f"bounds must be two ascending numbers, got {self.low} and {self.high}.")
        return self

    @property
    def width(self) -> float:
        """What a perturbation of 1 is for the library."""
        return self.high - self.low

    def ours(self, x: np.ndarray) -> np.ndarray:
        """Images of the library -> `[N, H, W, C]` float32 in [0, 1]."""
        x = self._axes(np.asarray(x, np.float32), "x")
        x = (x - np.float32(self.low)) / np.float32(self.width)
        if x.size and not -_ROUNDING <= np.min(x) <= np.max(x) <= 1 + _ROUNDING:  # NaN too
            least, most = (float(value) * self.width + self.low for value in (np.min(x), np.max(x)))
            raise ValueError(f"x must lie in [{self.low:g}, {self.high:g}], got values from {least:g} to {most:g}.")
        return np.clip(x, 0, 1)

    def theirs(self, images: np.ndarray) -> np.ndarray:
        """`[N, H, W, C]` in [0, 1] -> float32 images of the library."""
        return self.difference(images) + np.float32(self.low)

    def difference(self, perturbations: np.ndarray) -> np.ndarray:
        """Perturbations `[N, H, W, C]`, in units of the image range -> those that the library adds."""
        x = np.asarray(perturbations, np.float32) * np.float32(self.width)
        if self.image_shape is not None:
            return np.ascontiguousarray(x.reshape(len(x), -1))
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2) if self.channels == "first" else x)

    def gradient(self, of_theirs: np.ndarray) -> np.ndarray:
        """The gradient with respect to images of the library -> that with respect to ours, `[N, H, W, C]`."""
        return self._axes(np.asarray(of_theirs, np.float32), "gradient") * np.float32(self.width)

    def _axes(self, x, name):
        if self.image_shape is not None:
            if x.ndim != 2 or x.shape[1] != np.prod(self.image_shape):
                raise ValueError(f"{name} must be [N, {np.prod(self.image_shape)}], flat images, got shape {x.shape}.")
            return x.reshape(len(x), *self.image_shape)
        if x.ndim != 4:
            axes = "[N, C, H, W]" if self.channels == "first" else "[N, H, W, C]"
            hint = "; pass image_shape=(H, W, C) for flat images" if x.ndim == 2 else ""
            raise ValueError(f"{name} must be {axes}, got shape {x.shape}{hint}.")
        return x.transpose(0, 2, 3, 1) if self.channels == "first" else x
