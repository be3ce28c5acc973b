"""Flags of a model and of images of one's own, which several scripts share."""

import dataclasses
import math
from typing import Any

from lft_jax.cli import config
from lft_jax.cli._model import load_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnFlags:
    """What stands between images in [0, 1] and the model, and how pictures of a folder are read."""

    mean: tuple[float, ...] = config.option((), "Of the model: mean of each channel, in units of --input_range.")
    std: tuple[float, ...] = config.option((), "Of the model: standard deviation of each channel, likewise.")
    channels: str | None = config.option(
        None,
        "Of the model: it takes [N, C, H, W] (first) or [N, H, W, C] (last). Default: first for a torch.nn.Module, "
        "else last.",
        ("first", "last"),
    )
    input_range: tuple[float, ...] = config.option(
        (), "Of the model: what 0 and 1 are for it before mean and std: 0,255 say. Default: 0,1."
    )
    model_output: str | None = config.option(
        None, "Of the model: logits (default), probabilities, or the key or index of the logits in what it returns."
    )
    image_size: int | None = config.option(
        None, "For a folder: the shorter side of pictures is scaled to it (bilinear), then the centre is cropped."
    )
    image_channels: int | None = config.option(
        None, "For a folder: 1 for grey, 3 for RGB. Default: 1 if all pictures are grey, else 3."
    )


def check_own(flags: OwnFlags) -> None:
    """Raises a ValueError for an --input_range that is no range, or other --image_channels than 1 and 3."""
    if flags.input_range and len(flags.input_range) != 2:
        raise ValueError(f"--input_range: expected two numbers, such as 0,255, got {flags.input_range}.")
    if flags.image_channels not in (None, 1, 3):
        raise ValueError(f"--image_channels: expected 1 or 3, got {flags.image_channels}.")


def own_model(name: str, flags: OwnFlags) -> Any:
    """The model that `--model=package.module:function` names, by its adapter; errors are those of `load_model`."""
    output = flags.model_output
    options = {
        "mean": flags.mean or None,
        "std": flags.std or None,
        "channels": flags.channels,
        "input_range": flags.input_range or None,
        "output": int(output) if output is not None and output.removeprefix("-").isdecimal() else output,
    }
    return load_model(name, {name: value for name, value in options.items() if value is not None})


def radius(flag: str, text: str) -> float:
    """A radius: a number or a fraction.

    Examples:
      >>> radius("--epsilon", "51/255")
      0.2

    Raises:
      ValueError: for what is no number above 0.
    """
    try:
        above, slash, below = str(text).partition("/")  # as numbers, since fractions of "1e999999999" take forever
        found = float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        found = math.nan
    if not 0 < found < math.inf:
        raise ValueError(f"{flag}: expected a number above 0 or a fraction such as 8/255, got {text!r}.")
    return found
