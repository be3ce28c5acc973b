"""Trees of arrays on disk. Nothing else in the package knows orbax."""

import contextlib
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from lft_jax import base
from lft_jax._files import replace_directory

PyTree = base.PyTree


def save_tree(path: str | os.PathLike, tree: PyTree) -> None:
    """Writes a tree of arrays to the directory `path`, whole or not at all, in place of one that is there.

    Under `jax.distributed` all processes call it, with one path that they share, and each writes its part.

    Raises:
      ValueError: if a leaf is no array, or an array without elements (orbax stores none).
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")  # one name for all processes
    first = jax.process_index() == 0
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(scratch / "tree", args=ocp.args.StandardSave(tree), force=True)
        if first:
            replace_directory(scratch / "tree", path)
    finally:
        if first:
            shutil.rmtree(scratch, ignore_errors=True)


def load_tree(path: str | os.PathLike, like: PyTree) -> PyTree:
    """Reads a tree that `save_tree` wrote.

    Args:
      path: the directory.
      like: a tree of arrays or `jax.ShapeDtypeStruct` of the structure and shapes expected; the dtypes are its own.

    Returns:
      The tree, its arrays on the default device.

    Raises:
      ValueError: if nothing is there, it is damaged, or its structure or shapes are not those of `like`.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"path: there is no checkpoint at {path}.")
    like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    try:
        with _checkpointer() as checkpointer:
            tree = checkpointer.restore(path, args=ocp.args.StandardRestore(like))
        shapes, expected = jax.tree.map(np.shape, tree), jax.tree.map(np.shape, like)
        if shapes != expected:
            raise ValueError(f"its shapes are {shapes}, expected {expected}")
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise ValueError(f"path: the checkpoint at {path} is damaged or of another structure ({error}).") from error
    # By way of numpy: what orbax itself puts on a device is bound to it, and would share no jitted program with others.
    return jax.tree.map(jnp.asarray, tree)


@contextlib.contextmanager
def _checkpointer():
    """Orbax's, without the thirty lines of information a checkpoint that it gives to absl's log."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.WARNING))
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            yield checkpointer
    finally:
        logging.set_verbosity(verbosity)
