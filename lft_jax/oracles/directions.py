"""Random directions of finite differences, and the subspaces that directions can be restricted to.

Here the optimizee is one vector, the coordinates of all its leaves.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax.base import PyTree

BASES = ("tiles", "dct")


def _gaussian(key, size, dtype):
    return jax.random.normal(key, (size,), dtype)


def _sphere(key, size, dtype):
    u = _gaussian(key, size, dtype)
    return u / jnp.maximum(jnp.sqrt(jnp.sum(u**2)), jnp.finfo(dtype).tiny)  # a single coordinate can be 0


def _rademacher(key, size, dtype):
    return jax.random.rademacher(key, (size,), dtype)


def _coordinate(index, size, dtype):
    return (jnp.arange(size) == index).astype(dtype)


#: `{name: (seed, size, dtype) -> z [size]}`.
DRAW = {"gaussian": _gaussian, "sphere": _sphere, "rademacher": _rademacher, "coordinate": _coordinate}
UNIT_LENGTH = ("sphere", "coordinate")  # |z| = 1; for the others E|z|^2 = size


def direction_seeds(directions: str, key: jax.Array, num_directions: int, size: int) -> jax.Array:
    """The seeds of the directions, with leading axis `[q]`: PRNG keys, or indices of coordinates for "coordinate"."""
    if directions != "coordinate":
        return jax.random.split(key, num_directions)
    if num_directions > size:
        raise ValueError(
            f"num_directions must be at most {size}, the number of coordinates of theta, for "
            f"directions='coordinate', got {num_directions!r}."
        )
    return jax.random.permutation(key, size)[:num_directions]


@dataclasses.dataclass(frozen=True)
class Subspace:
    """The subspace of the directions, `u = B z` for `z [size]`.

    The coordinates of `u` have the same mean square as those of `z`.

    Attributes:
      shapes: shapes of the optimizee's leaves, with `d` coordinates in total.
      resolution: number `r` of tiles or frequencies along each of the first two axes of a leaf `[H, W]` or `[H, W, C]`
        (separately per channel), and along the flattened coordinates of any other leaf; None for all `d` dimensions.
      basis: "tiles" for directions that are constant on tiles, "dct" for the lowest frequencies of a discrete cosine
        transform.
    """

    shapes: tuple[tuple[int, ...], ...]
    resolution: int | None = None
    basis: str = "tiles"

    @classmethod
    def of(cls, theta: PyTree, resolution: int | None, basis: str) -> "Subspace":
        """The subspace for the optimizee `theta`."""
        return cls(tuple(leaf.shape for leaf in jax.tree.leaves(theta)), resolution, basis)

    @property
    def size(self) -> int:
        """Number of dimensions."""
        if self.resolution is None:
            return sum(map(math.prod, self.shapes))
        if self.basis == "dct":
            return sum(math.prod(self._frequencies(shape)) for shape in self._images())
        return int(self._tiles.max()) + 1

    def expand(self, zs: jax.Array) -> jax.Array:
        """`B z` for a batch: `[n, size] -> [n, d]`."""
        if self.resolution is None:
            return zs
        if self.basis == "tiles":
            return zs[:, self._tiles]
        pieces, first = [], 0
        for shape in self._images():
            counts = self._frequencies(shape)
            z = zs[:, first : first + math.prod(counts)].reshape(len(zs), *counts)
            first += math.prod(counts)
            for axis, (length, count) in enumerate(zip(shape[:2], counts[:2], strict=True), start=1):
                waves = jnp.asarray(_waves(length, count), zs.dtype)
                z = jnp.moveaxis(jnp.tensordot(waves, z, (1, axis), precision="highest"), 0, axis)
            pieces.append(z.reshape(len(zs), -1))
        return jnp.concatenate(pieces, axis=1)

    def project(self, total: jax.Array) -> jax.Array:
        """Scales `B B^T g`, `[d]`, to the orthogonal projection of `g` onto the subspace."""
        if self.resolution is None:
            return total
        if self.basis == "tiles":
            return total / np.bincount(self._tiles)[self._tiles].astype(total.dtype)
        ratios = [math.prod(self._frequencies(shape)) / math.prod(shape) for shape in self._images()]
        sizes = [math.prod(shape) for shape in self._images()]
        return total * np.repeat(ratios, sizes).astype(total.dtype)

    def _images(self) -> list[tuple[int, ...]]:
        """Shapes of the leaves that are not empty: of images as they are, of others flattened to one axis."""
        shapes = (shape for shape in self.shapes if math.prod(shape))
        return [shape if len(shape) in (2, 3) else (math.prod(shape),) for shape in shapes]

    def _frequencies(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        assert self.resolution is not None
        return tuple(min(self.resolution, length) if axis < 2 else length for axis, length in enumerate(shape))

    @functools.cached_property
    def _tiles(self) -> np.ndarray:
        """`[d]`, the index of the tile of each coordinate."""
        assert self.resolution is not None
        parts, first = [], 0
        for shape in self._images():
            index = np.zeros(shape, np.int64)
            for axis, length in enumerate(shape):
                tile = -(-length // self.resolution) if axis < 2 else 1  # channels are separate
                along = np.arange(length) // tile
                index = index * (along[-1] + 1) + along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
            parts.append(first + index.ravel())
            first += index.max() + 1
        return np.concatenate(parts)


def _waves(length, count):
    """`[length, count]`, orthogonal cosines of the lowest frequencies; the mean square of a row is about 1."""
    angles = np.pi / length * np.outer(np.arange(length) + 0.5, np.arange(count))
    return np.cos(angles) * np.where(np.arange(count) > 0, math.sqrt(2), 1) / math.sqrt(count)


def floats(theta: PyTree) -> PyTree:
    """`theta` as JAX arrays; raises a ValueError unless all leaves are floating-point."""
    theta = jax.tree.map(jnp.asarray, theta)
    for path, x in jax.tree_util.tree_leaves_with_path(theta):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            name = "theta" + jax.tree_util.keystr(path)
            raise ValueError(f"{name} must be a floating-point array, got {x.dtype}.")
    return theta


def flatten(theta: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """Flattens `theta` to a vector `[d]` in its widest dtype, at least float32.

    Returns:
      The vector, and a function that turns a batch `[n, d]` of vectors into a tree like `theta` with leading axis
      `[n]`, in the dtypes of `theta`.

    Raises:
      ValueError: for a `theta` without coordinates, or with leaves that are not floating-point.
    """
    leaves, treedef = jax.tree.flatten(floats(theta))
    if not any(x.size for x in leaves):
        raise ValueError("theta must have at least one coordinate, got none.")
    dtype = max((x.dtype for x in leaves), key=lambda dtype: dtype.itemsize)
    dtype = dtype if dtype.itemsize >= 4 else jnp.float32
    ends = np.cumsum([x.size for x in leaves]).tolist()

    def unflatten(batch):
        pieces = [batch[:, end - x.size : end] for x, end in zip(leaves, ends, strict=True)]
        pieces = [piece.reshape(len(batch), *x.shape).astype(x.dtype) for piece, x in zip(pieces, leaves, strict=True)]
        return treedef.unflatten(pieces)

    return jnp.concatenate([x.astype(dtype).reshape(-1) for x in leaves]), unflatten
