"""Perturbations in files that other tools read: `.npy`, `.pt`, `.png`. None of them can run code when it is read."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Shaped

from lft_jax._files import replacing
from lft_jax._reading import check_expansion, check_pixels, read_npy
from lft_jax.attack import UniversalPerturbation
from lft_jax.models._frameworks import required

SUFFIXES = (".npy", ".pt", ".png")
#: Text chunk of a PNG file that holds the radius.
RADIUS_KEY = "lft_jax:radius"
_GREY, _LEVELS = 128, 127
_MODES = {1: "L", 3: "RGB"}


def save_perturbation(
    path: str | os.PathLike[str], perturbation: Shaped[Array | np.ndarray, "..."] | UniversalPerturbation | Any
) -> None:
    """Writes a perturbation to a file whose suffix says how.

    - `.npy`: NumPy, `[H, W, C]`, in its own dtype (bfloat16 as float32). Exact.
    - `.pt`: a torch tensor `[C, H, W]`, float32, as torch models take images. Exact for float32.
    - `.png`: a picture of 8 bits per channel, grey or RGB. With the radius `r = max |perturbation|`, which a text chunk
      of the file holds, a value `v` is stored as the level `128 + round(127 v / r)`. So 0, r and -r are exact, all
      others are off by at most half a level, `r / 254`; what is read has the same radius, and is read the same again
      when it is written again.

    Args:
      path: name of the file, which ends with `.npy`, `.pt` or `.png`. It is replaced when the new one is complete.
      perturbation: `[H, W, C]`, floating-point and finite, in units of the image range; or a result of
        `lft_jax.universal_perturbation`.

    Raises:
      ModuleNotFoundError: if torch (`.pt`) or Pillow (`.png`) is not installed.
      ValueError: for another suffix, a perturbation that is not `[H, W, C]`, floating-point and finite, or a picture of
        other than 1 or 3 channels.

    Examples:
      >>> import tempfile
      >>> theta = np.linspace(-0.25, 0.25, 12, dtype=np.float32).reshape(2, 2, 3)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_perturbation(f"{folder}/uap.png", theta)
      ...     read = load_perturbation(f"{folder}/uap.png")
      >>> bool(np.abs(read - theta).max() <= 0.25 / 254 + 1e-7), float(read.max())
      (True, 0.25)
    """
    path = _checked_path(path)
    theta = perturbation.perturbation if isinstance(perturbation, UniversalPerturbation) else perturbation
    theta = _checked(np.asarray(theta), "perturbation")
    with replacing(path) as file:
        {".npy": _write_npy, ".pt": _write_pt, ".png": _write_png}[path.suffix](file, theta)


def load_perturbation(path: str | os.PathLike[str]) -> Float[np.ndarray, "H W C"]:
    """Reads a perturbation from a file that `save_perturbation` wrote, or from one like it.

    Args:
      path: name of a `.npy` file of an array `[H, W, C]`, a `.pt` file of a tensor `[C, H, W]`, or a `.png` file with
        its radius in a text chunk, see `save_perturbation`.

    Returns:
      NumPy `[H, W, C]`: float32, or the floating dtype of an `.npy` file.

    Raises:
      FileNotFoundError: if there is none.
      ModuleNotFoundError: if torch (`.pt`) or Pillow (`.png`) is not installed.
      ValueError: for another suffix, a file of another kind or with other contents (pickled objects are never read), a
        picture without a radius, or a perturbation that is not three-dimensional, floating-point and finite.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_perturbation(f"{folder}/uap.npy", np.full((4, 4, 1), 0.5, np.float32))
      ...     load_perturbation(f"{folder}/uap.npy").shape
      (4, 4, 1)
    """
    path = _checked_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}.")
    return _checked({".npy": _read_npy, ".pt": _read_pt, ".png": _read_png}[path.suffix](path), f"path: {path}")


def _checked_path(path):
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path must end with .npy, .pt or .png, got {str(path)!r}.")
    return path


def _checked(theta, name):
    if theta.dtype.name == "bfloat16":  # no dtype of NumPy's files
        theta = theta.astype(np.float32)
    if not np.issubdtype(theta.dtype, np.floating):
        raise ValueError(f"{name} must be floating-point, in units of the image range [0, 1], got {theta.dtype}.")
    if theta.ndim != 3 or 0 in theta.shape:
        raise ValueError(f"{name} must be [H, W, C] with no axis of length 0, got shape {theta.shape}.")
    if not np.all(np.isfinite(theta)):
        raise ValueError(f"{name} must be finite, got NaN or infinite values.")
    return theta


def _write_npy(file, theta):
    np.save(file, theta)


def _read_npy(path):
    if zipfile.is_zipfile(path):
        raise ValueError(f"path: {path} is an archive of arrays, not one array.")
    try:
        return read_npy(path)
    except ValueError as error:
        raise ValueError(f"path: {path} {error}.") from error


def _write_pt(file, theta):
    with required("torch", "torch"):
        import torch

    torch.save(torch.from_numpy(np.ascontiguousarray(theta.transpose(2, 0, 1), np.float32)), file)


def _read_pt(path):
    with required("torch", "torch"):
        import torch

    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:  # as torch writes since version 1.6
            check_expansion(archive.infolist(), size)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of exceptions for a damaged file
        raise ValueError(
            f"path: {path} is no .pt file of a tensor alone ({type(error).__name__}); write it with "
            "torch.save(tensor, path)."
        ) from error
    if not isinstance(found, torch.Tensor) or found.ndim != 3 or not found.is_floating_point():
        kind = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"path: {path} must hold a floating-point tensor [C, H, W], got {kind}.")
    if found.layout != torch.strided or found.device.type != "cpu" or found.numel() * found.element_size() > size:
        raise ValueError(f"path: {path} must hold all elements of its tensor {tuple(found.shape)}, in {size} bytes.")
    return found.detach().float().numpy().transpose(1, 2, 0)


def _write_png(file, theta):
    with required("PIL", "images"):
        from PIL import Image, PngImagePlugin

    channels = theta.shape[2]
    if channels not in _MODES:
        raise ValueError(f"perturbation must have 1 or 3 channels for a .png file, got {channels}; use .npy or .pt.")
    theta = theta.astype(np.float32)
    radius = np.abs(theta).max()
    unit = theta / radius if radius > 0 else theta
    levels = (_GREY + np.rint(_LEVELS * unit)).astype(np.uint8)
    text = PngImagePlugin.PngInfo()
    text.add_text(RADIUS_KEY, repr(float(radius)))
    picture = Image.fromarray(levels[..., 0] if channels == 1 else levels, _MODES[channels])
    picture.save(file, format="PNG", pnginfo=text)


def _read_png(path):
    with required("PIL", "images"):
        from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            check_pixels(picture.size)
            levels = np.asarray(picture)
            mode, text = picture.mode, getattr(picture, "text", {})
    except Exception as error:  # Pillow raises many kinds of exceptions for a damaged file
        raise ValueError(f"path: {path} is no .png file ({error}).") from error
    if mode not in _MODES.values():
        raise ValueError(f"path: {path} must be a picture of 8 bits in grey or RGB, got mode {mode!r}.")
    try:
        radius = np.float32(text[RADIUS_KEY])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"path: {path} has no radius in a text chunk {RADIUS_KEY!r}, so that its levels have no unit."
        ) from error
    if not (np.isfinite(radius) and radius >= 0):
        raise ValueError(f"path: the radius of {path} must be finite and at least 0, got {radius}.")
    levels = levels[..., None] if levels.ndim == 2 else levels
    return np.clip((levels.astype(np.float32) - _GREY) / _LEVELS, -1, 1) * radius
