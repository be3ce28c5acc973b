"""Decoded images on disk, as one .npz file a set."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np


def user_folder() -> Path:
    """Where the package keeps what it can make again: lft_jax in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lft_jax"


def cached(
    key: str, decode: Callable[[], tuple[np.ndarray, np.ndarray]], cache_dir: str | os.PathLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """`decode()`, images and labels, or what it returned the last time that it was asked for under this key.

    Args:
      key: the stem of the file; names the set, its version and its split.
      decode: called without arguments.
      cache_dir: the folder; `user_folder()` if None.
    """
    path = (user_folder() if cache_dir is None else Path(cache_dir)) / f"{key}.npz"
    # Not there, or damaged in one of the many ways that numpy knows: decode.
    with contextlib.suppress(Exception), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"]
    images, labels = decode()
    # Decoding again is slow, not wrong: a cache that cannot be written is left alone.
    with contextlib.suppress(OSError):
        _write(path, images=images, labels=labels)
    return images, labels


def _write(path, **arrays):
    """Writes an .npz file so that no reader ever sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        np.savez(whole, **arrays)
        whole.replace(path)
