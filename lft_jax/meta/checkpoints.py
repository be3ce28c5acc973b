"""Trees of arrays on disk, by orbax, which no other module imports."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from lft_jax._files import replace_directory
from lft_jax._reading import read_object
from lft_jax.base import PyTree

#: File of a checkpoint that holds the checksums of the others.
CHECKSUMS = "sha256.json"


def save_tree(path: str | os.PathLike, tree: PyTree) -> None:
    """Writes a tree of arrays to the directory `path`, which is replaced if it exists.

    The write is atomic: if it fails, the old directory stays. The file `sha256.json` in it holds the SHA-256 of each
    other file, since orbax has no checksums of the arrays. Under `jax.distributed` every process must call this
    with the same path on shared storage; each writes its part.

    Args:
      path: directory to write.
      tree: pytree of JAX or NumPy arrays.

    Raises:
      ValueError: if a leaf is not an array, or an array without elements (orbax does not store these).
      OSError: if writing fails, as on a full disk.

    Examples:
      >>> import tempfile
      >>> tree = {"weight": jnp.ones((2, 3))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_tree(f"{folder}/tree", tree)
      ...     loaded = load_tree(f"{folder}/tree", like=tree)
      >>> loaded["weight"].shape
      (2, 3)
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")  # one name for all processes
    first = jax.process_index() == 0
    try:
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(scratch / "tree", args=ocp.args.StandardSave(tree), force=True)
        except ValueError as error:  # also tensorstore's way to say that the disk is full
            if number := re.search(r"os_error_code='(\d+)'", str(error)):
                raise OSError(int(number[1]), f"{os.strerror(int(number[1]))}: {path}") from error
            raise
        if first:
            sums = json.dumps(_checksums(scratch / "tree"), indent=1)
            (scratch / "tree" / CHECKSUMS).write_text(sums + "\n", encoding="utf-8")
            replace_directory(scratch / "tree", path)
    finally:
        if first:
            shutil.rmtree(scratch, ignore_errors=True)


def load_tree(path: str | os.PathLike, like: PyTree) -> PyTree:
    """Reads a tree that `save_tree` wrote.

    Args:
      path: directory to read.
      like: tree of arrays or `jax.ShapeDtypeStruct` with the expected structure and shapes. The result has its dtypes.

    Returns:
      The tree, with its arrays on the default device. See `save_tree` for an example.

    Raises:
      ValueError: if there is no checkpoint, if a file of it is damaged, or if its structure or shapes differ from
        `like`.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"path: there is no checkpoint at {path}.")
    _check_files(path)
    like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    try:
        with _checkpointer() as checkpointer:
            tree = checkpointer.restore(path, args=ocp.args.StandardRestore(like))
        shapes, expected = jax.tree.map(np.shape, tree), jax.tree.map(np.shape, like)
        if shapes != expected:
            raise ValueError(f"its shapes are {shapes}, expected {expected}")
    except Exception as error:  # orbax and tensorstore raise many types
        raise ValueError(f"path: the checkpoint at {path} is damaged or of another structure ({error}).") from error
    # Restored as NumPy arrays: those that orbax puts on a device are committed to it, so jitted functions would be
    # compiled again for them.
    return jax.tree.map(jnp.asarray, tree)


def _checksums(folder):
    """`{name: SHA-256}` of the files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _check_files(folder):
    """Raises a ValueError if a file differs from what was written. Checkpoints of version 0.2 have no checksums."""
    path = folder / CHECKSUMS
    if not path.exists():
        return
    try:
        expected = read_object(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"path: the checkpoint at {folder} is damaged: {path} cannot be read ({error}).") from error
    found = _checksums(folder)
    for name, checksum in expected.items():
        if found.get(name) != checksum:
            state = "is not as it was written" if name in found else "is missing"
            raise ValueError(f"path: the checkpoint at {folder} is damaged: {folder / name} {state}.")


@contextlib.contextmanager
def _checkpointer():
    """An orbax checkpointer that logs nothing: at the info level thirty lines per checkpoint, and errors twice, which
    it raises too."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.FATAL))
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            yield checkpointer
    finally:
        logging.set_verbosity(verbosity)
