"""A start in pattern space: the best of random tiles and plane waves on the support images."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from lft_jax import base
from lft_jax.tasks._eager import eager_map, eager_scan

_PHASE_STEP = 20 / (2 * jnp.pi)  # size of a change of a phase, in turns, per change of a frequency, in cycles/pixel


@dataclasses.dataclass(frozen=True)
class PatternSearch:
    """Searches among tiles and plane waves for the pattern with the lowest loss, as the start of an attack.

    A tile is `[p, p, C]` signs, repeated over the image. A wave is stripes with a frequency `f`, and a phase for each
    channel, which in every second wave is the same for all::

        tile(i, j, c) = scale * cells[i mod p, j mod p, c]
        wave(i, j, c) = scale * sign(cos(2 pi (f . (i, j) + phase[c])))

    A universal perturbation of a convolutional network is nearly a periodic texture, and a pattern has a few
    parameters where a perturbation has thousands: the best of some dozens of random patterns often is a stronger attack
    than what steps along gradients of a few images find. Patterns mean the same at every size of an image.

    The search draws random patterns. Then it tries small changes of the best one, and keeps those that lower the loss:
    of a tile, the sign of one cell, in turn from a random one; of a wave, a random change of the frequency and the
    phases, of various sizes.

    Attributes:
      tiles: number of random tiles, at least 0.
      waves: number of random waves, at least 0; one pattern in all at least. Frequencies are uniform over [0, 0.5] x
        [-0.5, 0.5] cycles per pixel, phases over a turn.
      refinements: number of changes of the best pattern that are tried, at least 0.
      periods: the sides `p` of the tiles in turn, in pixels, at least 1 each.
      step: median scale of the changes of a frequency, in cycles per pixel, above 0.

    Examples:
      >>> search = PatternSearch(tiles=4, waves=3, refinements=2)
      >>> search.evaluations
      10
      >>> theta = search(jnp.sum, jnp.zeros((5, 5, 3)), jnp.float32(0.25), jax.random.key(0))
      >>> theta.shape, np.unique(np.abs(theta)).tolist()
      ((5, 5, 3), [0.25])

    References:
      Universal perturbations: Moosavi-Dezfooli et al. 2017, arXiv 1610.08401. Sensitivity to single frequencies:
      Tsuzuku & Sato 2019, arXiv 1809.04098. Search over the few parameters of a pattern: Co et al. 2019, arXiv
      1810.00470.
    """

    tiles: int = 12
    waves: int = 12
    refinements: int = 75
    periods: tuple[int, ...] = (2,)
    step: float = 0.01

    @classmethod
    def within(cls, evaluations: int) -> "PatternSearch":
        """A search with a given number of evaluations of the loss.

        Args:
          evaluations: at least 2. One is for the start, an eighth for tiles, as many for waves, the others for
            refinements.

        Raises:
          ValueError: for fewer than 2 evaluations.

        Examples:
          >>> PatternSearch.within(100)
          PatternSearch(tiles=12, waves=12, refinements=75, periods=(2,), step=0.01)
        """
        base.check_at_least("patterns: evaluations", evaluations, 2)
        waves = (evaluations - 1) // 8
        tiles = max(1, waves)
        return cls(tiles, waves, evaluations - 1 - tiles - waves)

    def check(self) -> "PatternSearch":
        """Returns itself.

        Raises:
          ValueError: for a field out of range.
        """
        for name in ("tiles", "waves", "refinements"):
            base.check_at_least(f"patterns: {name}", getattr(self, name), 0)
        base.check_at_least("patterns: tiles + waves", self.tiles + self.waves, 1)
        base.check_positive("patterns: step", self.step)
        if not (isinstance(self.periods, tuple) and self.periods):
            raise ValueError(f"patterns: periods must be a tuple of at least one number, got {self.periods!r}.")
        for period in self.periods:
            base.check_at_least("patterns: periods", period, 1)
        return self

    @property
    def evaluations(self) -> int:
        """Evaluations of the loss that a search makes, including that of the start."""
        return 1 + self.tiles + self.waves + self.refinements

    def __call__(
        self,
        loss_fn: Callable[[jax.Array], jax.Array],
        theta: Float[Array, "H W C"],
        scale: Float[Array, ""],
        key: PRNGKeyArray,
        *,
        opaque: bool = False,
    ) -> Float[Array, "H W C"]:
        """The best pattern, or `theta` if no pattern has a lower loss.

        Args:
          loss_fn: `[H, W, C] -> []`; it is evaluated, for one pattern at a time, and never differentiated.
          theta: `[H, W, C]`, the start that patterns are compared with.
          scale: `[]`, absolute value of a pattern's coordinates.
          key: PRNG key of the search.
          opaque: whether JAX cannot trace `loss_fn`; the search then runs eagerly.

        Returns:
          `[H, W, C]`.
        """
        mapped, scan = (eager_map, eager_scan) if opaque else (jax.lax.map, jax.lax.scan)
        key_patterns, key_first, key_changes = jax.random.split(key, 3)

        def loss(pattern):
            return loss_fn(scale * _image(pattern, theta.shape))

        drawn = self._drawn(key_patterns, theta.shape[2], theta.dtype)
        losses = mapped(loss, drawn)
        first = jnp.argmin(losses)

        def change(carry, inputs):
            pattern, lowest = carry
            changed = _changed(pattern, self.step, *inputs)
            found = loss(changed)
            better = found < lowest
            return (_where(better, changed, pattern), jnp.where(better, found, lowest)), None

        start = jax.random.randint(key_first, (), 0, drawn.cells[0].size, jnp.int32)
        cells = start + jnp.arange(self.refinements, dtype=jnp.int32)
        keys = jax.random.split(key_changes, self.refinements)
        best = jax.tree.map(lambda leaf: leaf[first], drawn)
        (pattern, lowest), _ = scan(change, (best, losses[first]), (cells, keys))
        of_start = loss_fn(jax.lax.stop_gradient(theta))  # the comparison has no derivative, a kept start has its own
        return jnp.where(lowest < of_start, scale * _image(pattern, theta.shape), theta)

    def _drawn(self, key, channels, dtype):
        """The random patterns `[tiles + waves]`."""
        number, side = self.tiles + self.waves, max(self.periods)
        key_cells, key_frequency, key_phase = jax.random.split(key, 3)
        periods = np.zeros(number, np.int32)
        periods[: self.tiles] = np.resize(np.asarray(self.periods, np.int32), self.tiles)
        grey = np.arange(-self.tiles, self.waves) % 2 == 0
        phase = jax.random.uniform(key_phase, (number, channels), dtype)
        # A frequency and its negative give the same waves, so the first one need not be negative.
        low, high = jnp.asarray([0, -0.5], dtype), jnp.asarray([0.5, 0.5], dtype)
        return _Pattern(
            period=jnp.asarray(periods),
            cells=jax.random.rademacher(key_cells, (number, side, side, channels), dtype),
            frequency=jax.random.uniform(key_frequency, (number, 2), dtype, low[None], high[None]),
            phase=jnp.where(jnp.asarray(grey)[:, None], phase[:, :1], phase),
        )


class _Pattern(NamedTuple):
    """A tile or a wave.

    Attributes:
      period: `[]` int32, the side p of a tile; 0 for a wave.
      cells: `[P, P, C]` of -1 and 1; a tile is `cells[:p, :p]`.
      frequency: `[2]`, cycles per pixel down and across.
      phase: `[C]`, in turns.
    """

    period: Integer[Array, "*n"]
    cells: Float[Array, "*n P P C"]
    frequency: Float[Array, "*n 2"]
    phase: Float[Array, "*n C"]


@functools.partial(jax.jit, static_argnums=1)
def _image(pattern, shape):
    """The pattern as `[H, W, C]` of -1 and 1."""
    rows, columns = (jnp.arange(length, dtype=jnp.int32) for length in shape[:2])
    period = jnp.maximum(pattern.period, 1)
    tile = pattern.cells[rows % period][:, columns % period]
    down, across = (x.astype(tile.dtype) * f for x, f in zip((rows, columns), pattern.frequency, strict=True))
    turns = (down[:, None] + across[None])[..., None] + pattern.phase[None, None]
    wave = jnp.where(jnp.cos(2 * jnp.pi * turns) >= 0, 1, -1).astype(tile.dtype)
    return jnp.where(pattern.period > 0, tile, wave)


@jax.jit
def _changed(pattern, step, cell, key):
    """The pattern with a small change: the sign of the cell with this index, taken modulo their number, or the wave."""
    key_size, key_frequency, key_phase = jax.random.split(key, 3)
    period, (_, _, channels) = jnp.maximum(pattern.period, 1), pattern.cells.shape
    place = cell % (period * period * channels)
    row, column, channel = place // (period * channels), place // channels % period, place % channels
    dtype = pattern.phase.dtype
    size = step * jnp.exp(1.5 * jax.random.normal(key_size, (), dtype))
    turns = jax.random.normal(key_phase, (channels,), dtype)
    turns = jnp.where(jnp.all(pattern.phase == pattern.phase[0]), turns[0], turns)  # a wave alike in all stays so
    return pattern._replace(
        cells=pattern.cells.at[row, column, channel].multiply(-1),
        frequency=pattern.frequency + size * jax.random.normal(key_frequency, (2,), dtype),
        phase=pattern.phase + size * _PHASE_STEP * turns,
    )


def _where(condition, new, old):
    return jax.tree.map(functools.partial(jnp.where, condition), new, old)
