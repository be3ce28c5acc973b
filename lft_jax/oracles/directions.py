"""Random directions that finite differences are taken along, and the subspaces that they may be kept to.

The optimizee is here one vector of all its leaves' coordinates.
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
    return u / jnp.maximum(jnp.sqrt(jnp.sum(u**2)), jnp.finfo(dtype).tiny)  # one coordinate alone can be 0


def _rademacher(key, size, dtype):
    return jax.random.rademacher(key, (size,), dtype)


def _coordinate(index, size, dtype):
    return (jnp.arange(size) == index).astype(dtype)


#: `(seed, size, dtype) -> z [size]`.
DRAW = {"gaussian": _gaussian, "sphere": _sphere, "rademacher": _rademacher, "coordinate": _coordinate}
UNIT_LENGTH = ("sphere", "coordinate")  # |z| = 1; for the others E|z|^2 = size


def direction_seeds(directions: str, key: jax.Array, num_directions: int, size: int) -> jax.Array:
    """What the directions are drawn from, leading axis `[q]`: a key each, or the index of a coordinate."""
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
    """Where directions lie: `u = B z` for `z [size]`, whose coordinates are as large as those of `z` on average.

    Attributes:
      shapes: of the optimizee's leaves, together d coordinates.
      resolution: `r` tiles, or frequencies, along each of the first two axes of a leaf `[H, W]` or `[H, W, C]` (each
        channel on its own), and along the line of coordinates of any other leaf; None for all d dimensions.
      basis: "tiles": constant on tiles; "dct": the lowest frequencies of a discrete cosine transform.
    """

    shapes: tuple[tuple[int, ...], ...]
    resolution: int | None = None
    basis: str = "tiles"

    @classmethod
    def of(cls, theta: PyTree, resolution: int | None, basis: str) -> "Subspace":
        """That of an optimizee."""
        return cls(tuple(leaf.shape for leaf in jax.tree.leaves(theta)), resolution, basis)

    @property
    def size(self) -> int:
        """Its dimensions."""
        if self.resolution is None:
            return sum(map(math.prod, self.shapes))
        if self.basis == "dct":
            return sum(math.prod(self._frequencies(shape)) for shape in self._images())
        return int(self._tiles.max()) + 1

    def expand(self, zs: jax.Array) -> jax.Array:
        """`B z`, `[n, size] -> [n, d]`."""
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
        """What makes `B B^T g` the projection of `g [d]` onto the subspace, applied to the former."""
        if self.resolution is None:
            return total
        if self.basis == "tiles":
            return total / np.bincount(self._tiles)[self._tiles].astype(total.dtype)
        ratios = [math.prod(self._frequencies(shape)) / math.prod(shape) for shape in self._images()]
        sizes = [math.prod(shape) for shape in self._images()]
        return total * np.repeat(ratios, sizes).astype(total.dtype)

    def _images(self):
        """The leaves with coordinates, as images or lines."""
        shapes = (shape for shape in self.shapes if math.prod(shape))
        return [shape if len(shape) in (2, 3) else (math.prod(shape),) for shape in shapes]

    def _frequencies(self, shape):
        return tuple(min(self.resolution, length) if axis < 2 else length for axis, length in enumerate(shape))

    @functools.cached_property
    def _tiles(self):
        """`[d]`, the number of the tile that each coordinate is in."""
        parts, first = [], 0
        for shape in self._images():
            number = np.zeros(shape, np.int64)
            for axis, length in enumerate(shape):
                tile = -(-length // self.resolution) if axis < 2 else 1  # channels are not joined
                along = np.arange(length) // tile
                number = number * (along[-1] + 1) + along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
            parts.append(first + number.ravel())
            first += number.max() + 1
        return np.concatenate(parts)


def _waves(length, count):
    """`[length, count]`, orthogonal cosines of the lowest frequencies; the mean square of a row is about 1."""
    angles = np.pi / length * np.outer(np.arange(length) + 0.5, np.arange(count))
    return np.cos(angles) * np.where(np.arange(count) > 0, math.sqrt(2), 1) / math.sqrt(count)


def floats(theta: PyTree) -> PyTree:
    """`theta` as JAX arrays. Raises a ValueError unless all are floating-point."""
    theta = jax.tree.map(jnp.asarray, theta)
    for path, x in jax.tree_util.tree_leaves_with_path(theta):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            name = "theta" + jax.tree_util.keystr(path)
            raise ValueError(f"{name} must be a floating-point array, got {x.dtype}.")
    return theta


def flatten(theta: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """`theta` as one vector `[d]` in its widest dtype, at least float32, and the way back for batches `[n, d]`."""
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
