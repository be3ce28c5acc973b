"""Batches made from the support images, which stand for images that are not there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from lft_jax import base

#: Pixels that a cell of a jigsaw needs along a side, to show more than noise.
LEAST = 7
_SIMILAR, _FEW = 0.1, 0.7  # the least mean correlation of images that are alike by place; what few images add to it
_COMPARED = 50  # images that it is computed from, at most


@dataclasses.dataclass(frozen=True)
class Proxies:
    """Images composed of parts of the support images, drawn again in each step.

    With few support images a universal perturbation overfits them. Jigsaws keep their colors, edges and textures, which
    is what such a perturbation works on, in ever new arrangements. A jigsaw of grid `g` has `g x g` cells; each shows a
    part of the same size of a random support image, from a random place. With `g = 1` it is a whole image, shifted;
    pixels beyond the border repeat it. A whole image keeps its label. No true label fits a jigsaw, so its label is the
    model's prediction for it, which takes one evaluation each.

    Where images are alike by place, as centred digits on a blank background are, parts from elsewhere resemble none of
    them. Then each cell shows the part at its own place. Images are alike by place if the mean correlation of two of
    them, pixel by pixel, is above `0.1 + 0.7 / S` for `S` images; to find out takes no evaluations. Natural images are
    not. Of fewer than five images, digits mostly pass as not alike either, and a single image always does.

    Attributes:
      size: images of a step, at least 1. They are divided equally among the grids.
      grids: cells of a side, one entry for each kind. Those whose cells would have fewer than 7 pixels along a side are
        left out, and whole images take their place if none is left.
      shift: largest shift of a whole image, as a fraction of the height and of the width, in [0, 1).
      flip: whether cells are mirrored, left to right, at random.
      noise: half-width of uniform noise, in units of the constraint's scale (epsilon for an linf ball), at least 0. In
        proportion to the radius, it drowns no image at 8/255, and at 0.25 it keeps a perturbation from fitting a few.

    Examples:
      >>> images = jnp.stack([jnp.zeros((8, 8, 3)), jnp.ones((8, 8, 3))])
      >>> batch, sources = Proxies(size=6, noise=0.0)(images, jax.random.key(0), scale=0.1)
      >>> batch.shape, sources.shape, sorted(set(batch.ravel().tolist()))
      ((6, 8, 8, 3), (6,), [0.0, 1.0])
      >>> Proxies(size=30).jigsaws((32, 32, 3))
      20

    References:
      Jigsaws: Zhang et al. 2021, Data-free universal adversarial perturbation and black-box attack, ICCV. Surrogate
      images with predicted labels: Mopuri et al. 2018, GD-UAP, arXiv 1801.08092.
    """

    size: int = 30
    grids: tuple[int, ...] = (1, 2, 4)
    shift: float = 0.1
    flip: bool = False
    noise: float = 0.8

    def check(self) -> "Proxies":
        """Returns itself.

        Raises:
          ValueError: for a field out of range.
        """
        base.check_count("proxies: size", self.size, 1)
        if not self.grids or len(set(self.grids)) < len(self.grids):
            raise ValueError(f"proxies: grids must be different numbers, at least one, got {self.grids!r}.")
        for grid in self.grids:
            base.check_count("proxies: grids", grid, 1)
        if not 0 <= self.shift < 1:
            raise ValueError(f"proxies: shift must be in [0, 1), got {self.shift!r}.")
        base.check_at_least("proxies: noise", self.noise, 0)
        return self

    def jigsaws(self, shape: tuple[int, ...]) -> int:
        """The number of proxies that are jigsaws of images `(H, W, C)`, and so need a label."""
        return sum(count for grid, count in self._counts(shape) if grid > 1)

    def _counts(self, shape):
        """`[(grid, number of proxies)]` for images of this shape, whole images first."""
        grids = sorted(grid for grid in self.grids if grid == 1 or min(shape[:2]) >= LEAST * grid) or [1]
        return [(g, len(part)) for g, part in zip(grids, np.array_split(np.arange(self.size), len(grids)), strict=True)]

    def __call__(
        self, images: Float[Array | np.ndarray, "S H W C"], key: PRNGKeyArray, *, scale: Float[Array, ""] | float
    ) -> tuple[Float[Array, "B H W C"], Int32[Array, " whole"]]:
        """A batch of proxies.

        Args:
          images: `[S, H, W, C]` in [0, 1], the support images.
          key: PRNG key of the batch.
          scale: scale of the constraint, the unit of `noise`.

        Returns:
          `[size, H, W, C]` in [0, 1], whole images first, and the numbers of the support images that these are of.
        """
        images = jnp.asarray(images)
        counts = self._counts(images.shape[1:])
        kept = _alike_by_place(images)
        key_noise, key_cells = jax.random.split(key)
        # One call for all, since each call of a generator takes long to compile.
        cells = [count * grid * grid for grid, count in counts]
        numbers = iter(_divided(jax.random.bits(key_cells, (len(images) + 4 * sum(cells),), jnp.uint32), cells))
        whole = counts[0][1] if counts[0][0] == 1 else 0
        # As many different images as there are.
        order = jnp.argsort(next(numbers)).astype(jnp.int32)
        sources = jnp.tile(order, -(-whole // len(images)))[:whole]
        parts = [self._made(images, *each, sources, kept) for each in zip(counts, numbers, strict=True)]
        batch = jnp.concatenate(parts)
        if self.noise:
            reach = jnp.asarray(self.noise, batch.dtype) * jnp.asarray(scale, batch.dtype)
            batch = jnp.clip(batch + jax.random.uniform(key_noise, batch.shape, batch.dtype, -1, 1) * reach, 0, 1)
        return batch, sources

    def _made(self, images, kind, numbers, sources, kept):
        """`[count, H, W, C]` with `grid x grid` cells, of parts that keep their places or not."""
        grid, count = kind
        source, flip, *sides = numbers.reshape(4, count, grid, grid)
        source = sources.reshape(source.shape) if grid == 1 else _below(source, len(images))
        flipped = _below(flip, 2) == 1 if self.flip else jnp.zeros(flip.shape, bool)
        height, width = images.shape[1:3]
        at = np.ix_(np.arange(count), _cells(height, grid), _cells(width, grid))
        y, x = (self._moves(side, grid, drawn)[at] for side, drawn in zip((height, width), sides, strict=True))
        if grid > 1:  # from the first pixel of the cell that shows it
            y -= jnp.asarray(_firsts(height, grid)[_cells(height, grid)])[None, :, None]
            x -= jnp.asarray(_firsts(width, grid)[_cells(width, grid)])[None, None, :]
            y, x = (jnp.where(kept, 0, moves) for moves in (y, x))
        y = jnp.clip(y + jnp.arange(height, dtype=jnp.int32)[None, :, None], 0, height - 1)
        x = jnp.clip(x + jnp.arange(width, dtype=jnp.int32)[None, None, :], 0, width - 1)
        x = jnp.where(flipped[at], width - 1 - x, x)
        return images[source[at], y, x]

    def _moves(self, side, grid, drawn):
        """Where the part of each cell begins, or how far a whole image is shifted."""
        if grid == 1:
            reach = round(self.shift * side)
            return _below(drawn, 2 * reach + 1) - reach
        return _below(drawn, side - -(-side // grid) + 1)


def _divided(numbers, cells):
    """The numbers for the order of the images, and four for each cell of each grid."""
    lengths = [len(numbers) - 4 * sum(cells), *(4 * count for count in cells)]
    return jnp.split(numbers, np.cumsum(lengths)[:-1])


def _below(bits, number):
    """Integers below a number, of uniform bits."""
    return (bits % jnp.asarray(number, jnp.uint32)).astype(jnp.int32)


def _alike_by_place(images: Float[Array, "S H W C"]) -> Bool[Array, ""]:
    """Whether images are alike by place, so that jigsaws keep their parts where they are.

    The correlation is that of the values of pixels, each channel less its mean over the image, summed over channels and
    averaged over pairs. Of more than 50 images, 50 or fewer are compared, at equal distances.

    Examples:
      >>> spots = jnp.zeros((5, 4, 4, 1)).at[:, 1, 2].set(1.0)
      >>> bool(_alike_by_place(spots)), bool(_alike_by_place(spots[:1]))
      (True, False)
    """
    images = images[:: -(-len(images) // _COMPARED)]
    images = images.astype(jnp.float32) if jnp.finfo(images.dtype).bits < 32 else images
    changes = (images - jnp.mean(images, (1, 2), keepdims=True)).reshape(len(images), -1)
    of_one, of_all = jnp.sum(changes**2), jnp.sum(jnp.sum(changes, 0) ** 2)
    least = _SIMILAR + _FEW / len(images)
    return of_all - of_one > least * (len(images) - 1) * of_one


def _cells(side, grid):
    """The cell of each pixel along a side."""
    return np.arange(side) * grid // side


def _firsts(side, grid):
    """The first pixel of each cell along a side."""
    return np.searchsorted(_cells(side, grid), np.arange(grid)).astype(np.int32)
