"""A start in pattern space: the best of random tiles and plane waves on the support images."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from lft_jax import base
from lft_jax.tasks._searching import Search

_PHASE_STEP = 20 / (2 * jnp.pi)  # size of a change of a phase, in turns, per change of a frequency, in cycles/pixel


@dataclasses.dataclass(frozen=True)
class PatternSearch(Search):
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

    def _drawn(self, key, channels, dtype):
        """The random patterns `[tiles + waves]`; the number of a cell and normal numbers `[3 + C]` for each change."""
        key_patterns, key_changes = jax.random.split(key)
        random, side = self._random(key_patterns, channels, dtype), max(self.periods)
        # From a random cell, by a number that a tile has no other use for.
        first = (random.phase[0, 0] * side * side * channels).astype(jnp.int32)
        cells = first + jnp.arange(self.refinements, dtype=jnp.int32)
        units = jax.random.normal(key_changes, (self.refinements, 3 + channels), dtype)
        return random, (cells, units)

    def _changed(self, parameters, inputs):
        return _changed(parameters, self.step, *inputs)

    def _image(self, parameters, shape):
        return _image(parameters, shape)

    def _random(self, key, channels, dtype):
        number, side = self.tiles + self.waves, max(self.periods)
        periods = np.zeros(number, np.int32)
        periods[: self.tiles] = np.resize(np.asarray(self.periods, np.int32), self.tiles)
        # All at once, since each call of a generator takes long to compile.
        size = side * side * channels
        numbers = jax.random.uniform(key, (number, size + 2 + channels), dtype)
        cells, frequency, phase = jnp.split(numbers, (size, size + 2), 1)
        grey = np.arange(-self.tiles, self.waves) % 2 == 0
        return _Pattern(
            period=jnp.asarray(periods),
            cells=jnp.where(cells < 0.5, -1, 1).astype(dtype).reshape(number, side, side, channels),
            # A frequency and its negative give the same waves, so the first one need not be negative.
            frequency=frequency * jnp.asarray([0.5, 1], dtype)[None] - jnp.asarray([0, 0.5], dtype)[None],
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
def _changed(pattern, step, cell, units):
    """The pattern with a small change: the sign of the cell with this number, modulo theirs, or the wave."""
    period, (_, _, channels) = jnp.maximum(pattern.period, 1), pattern.cells.shape
    place = cell % (period * period * channels)
    row, column, channel = place // (period * channels), place // channels % period, place % channels
    size, turns = step * jnp.exp(1.5 * units[0]), units[3:]
    turns = jnp.where(jnp.all(pattern.phase == pattern.phase[0]), turns[0], turns)  # a wave alike in all stays so
    return pattern._replace(
        cells=pattern.cells.at[row, column, channel].multiply(-1),
        frequency=pattern.frequency + size * units[1:3],
        phase=pattern.phase + size * _PHASE_STEP * turns,
    )
