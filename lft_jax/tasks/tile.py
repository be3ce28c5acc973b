"""A tile that fools models of natural images: a start that was learned, for images of any size."""

import functools
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from lft_jax._files import load_arrays

#: Pixels along a side of the tile, and its channels: red, green, blue.
SIDE, CHANNELS = 32, 3
#: Pixels along both sides from which images are large: attacked from the tile, or from zeros, by default.
LARGE = 128
#: The tile; beside it its card, a JSON file of the same stem.
PATH = Path(__file__).with_name("tile.safetensors")


def repeated_tile(shape: tuple[int, ...]) -> Float[np.ndarray, "H W 3"]:
    """The learned tile, repeated over an image from its first row and column.

    A long attack on one public ImageNet model found it, among the perturbations that repeat every 32 pixels; values are
    in units of epsilon. Related models share much of what fools them, so it is a start for others:
    `AttackRecipe(start="tile")`.

    Args:
      shape: `(H, W, 3)` of the images.

    Returns:
      `[H, W, 3]` float32 in [-1, 1].

    Raises:
      ValueError: for another number of channels.

    Examples:
      >>> tile = repeated_tile((40, 70, 3))
      >>> bool(np.all(tile[:8] == tile[32:])), float(np.abs(tile).max()) <= 1.0
      (True, True)

    References:
      Universal perturbations that carry over to other models: Moosavi-Dezfooli et al. 2017, arXiv 1610.08401, section
      3.2.
    """
    height, width, channels = shape
    if channels != CHANNELS:
        raise ValueError(f"start: the tile is for images of {CHANNELS} channels, got shape {tuple(shape)}.")
    rows, columns = (np.arange(side) % SIDE for side in (height, width))
    return _tile()[rows[:, None], columns]


def fits(shape: tuple[int, ...]) -> bool:
    """Whether images `[H, W, C]` are attacked from the tile by default: large ones of three channels."""
    return min(shape[:2]) >= LARGE and shape[2] == CHANNELS


@functools.cache
def _tile() -> np.ndarray:
    like: dict[str, Array | jax.ShapeDtypeStruct] = {"tile": jax.ShapeDtypeStruct((SIDE, SIDE, CHANNELS), np.float32)}
    return np.asarray(load_arrays(PATH, like)["tile"])
