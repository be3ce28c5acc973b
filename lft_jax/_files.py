"""Trees of arrays as safetensors files, and atomic replacement of files and directories."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import jax
import numpy as np
import safetensors
import safetensors.numpy

from lft_jax.base import PyTree


def save_arrays(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes a tree of arrays as a safetensors file; the name of a leaf is its path in the tree, joined by dots."""
    safetensors.numpy.save_file({name: np.asarray(leaf) for name, leaf in _named(tree)}, path)


def read_arrays(content: bytes, like: PyTree) -> PyTree:
    """Reads a tree of arrays from the content of a safetensors file.

    Args:
      content: content of a file that `save_arrays` wrote.
      like: tree of arrays or `jax.ShapeDtypeStruct` with the expected structure and shapes; dtypes are those stored.

    Returns:
      The tree, with the structure of `like`.

    Raises:
      ValueError: if the content is damaged, its names and shapes are not those of `like`, or its values not of the
        same kind and finite. The message is meant to follow the name of the file.
    """
    try:
        stored = safetensors.numpy.load(content)
    except Exception as error:  # SafetensorError; KeyError for a dtype that NumPy lacks
        raise ValueError(f"cannot be read ({error}); is it truncated?") from error
    wanted = {name: leaf.shape for name, leaf in _named(like)}
    found = {name: value.shape for name, value in stored.items()}
    if wanted != found:
        raise ValueError(f"holds other weights than expected: {found}, not {wanted}")
    for name, leaf in _named(like):
        floating = jax.numpy.issubdtype(leaf.dtype, np.floating)
        if jax.numpy.issubdtype(stored[name].dtype, np.floating) != floating:
            raise ValueError(f"holds {stored[name].dtype} under {name}, expected {leaf.dtype}")
        if floating and not np.all(np.isfinite(stored[name])):
            raise ValueError(f"holds NaN or infinite values under {name}")
    leaves = [jax.numpy.asarray(stored[name]) for name, _ in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def load_arrays(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """`read_arrays` of a file; also raises a ValueError if the file cannot be read."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error})") from error
    return read_arrays(content, like)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file, open for writing, that takes the place of `path` at the end, when it is on disk.

    At any time `path` has its old content or the new one. An error inside leaves it as it was.

    Args:
      path: name of the file, in a folder that is made if it is not there.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with replacing(f"{folder}/new/numbers.npy") as file:
      ...         np.save(file, np.arange(3))
      ...     np.load(f"{folder}/new/numbers.npy").tolist()
      [0, 1, 2]
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def replace_directory(new: str | os.PathLike, path: str | os.PathLike) -> None:
    """Moves the directory `new` to `path`. A directory at `path` is deleted last, and restored if the move fails."""
    path = Path(path)
    aside = path.with_name(path.name + ".replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if path.is_dir():
        os.replace(path, aside)
    try:
        os.replace(new, path)
    except OSError:
        if aside.is_dir():
            os.replace(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def remove_directory(path: str | os.PathLike) -> None:
    """Deletes a directory. If it is interrupted, there is no half of it under its name."""
    aside = Path(f"{path}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    shutil.rmtree(aside)


def _named(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]
