"""Decoded images on disk, one .npz file per data set and split."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lft_jax._files import replacing
from lft_jax._reading import read_npz
from lft_jax.data.checks import check_images_labels


def user_folder() -> Path:
    """Folder of files that can be recomputed: lft_jax in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lft_jax"


def cached(
    key: str, decode: Callable[[], tuple[np.ndarray, np.ndarray]], cache_dir: str | os.PathLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and labels from the cache, or from `decode()`, whose result is then stored.

    Args:
      key: stem of the file; names the data set, its version and its split.
      decode: called without arguments if the file is missing or damaged; returns images and labels.
      cache_dir: folder of the file; `user_folder()` if None.
    """
    path = (user_folder() if cache_dir is None else Path(cache_dir)) / f"{key}.npz"
    # Decode if the file is missing or damaged.
    with contextlib.suppress(OSError, ValueError, KeyError):
        arrays = read_npz(path, ("images", "labels"))
        check_images_labels(arrays["images"], arrays["labels"])
        return arrays["images"], arrays["labels"]
    images, labels = decode()
    # A cache that cannot be written is ignored: decoding again is only slow.
    with contextlib.suppress(OSError), replacing(path) as file:
        np.savez(file, images=images, labels=labels)
    return images, labels
