"""A start for query-only attacks: the best plane wave on the support images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lft_jax import base
from lft_jax.tasks._searching import Search

_PHASE_STEP = 20 / (2 * jnp.pi)  # size of a change of the phase, in turns, per change of a frequency, in cycles/pixel


@dataclasses.dataclass(frozen=True)
class WaveSearch(Search):
    """Searches for the plane wave with the lowest loss, as the start of an attack.

    A wave is a pattern of stripes, the same in all channels, with a frequency `f` and a phase::

        scale * sign(cos(2 pi (f . x + phase)))

    Convolutional networks are far more sensitive to single frequencies than to noise of the same size. And a wave has
    three parameters, a perturbation thousands: a hundred queries find a good wave, but are too few for a useful
    estimate of a gradient. The search first draws random waves. Then it refines the best one by a (1+1) evolution
    strategy: it tries small random changes, of various sizes, and keeps those that lower the loss.

    Attributes:
      candidates: number of random waves, at least 1.
      refinements: number of changes of the best one that are tried, at least 0.
      step: median scale of the changes of a frequency, in cycles per pixel, above 0.

    Examples:
      >>> search = WaveSearch(candidates=4, refinements=2)
      >>> search.evaluations
      7
      >>> args = jnp.zeros((4, 4, 3)), jnp.float32(0.25), jax.random.key(0)
      >>> jax.eval_shape(lambda *args: search(jnp.sum, *args), *args).shape
      (4, 4, 3)

    References:
      Sensitivity to single frequencies: Tsuzuku & Sato 2019, arXiv 1809.04098. Search over the few parameters of a
      pattern: Co et al. 2019, arXiv 1810.00470.
    """

    candidates: int = 50
    refinements: int = 150
    step: float = 0.01

    @classmethod
    def within(cls, evaluations: int) -> "WaveSearch":
        """A search with a given number of evaluations of the loss.

        Args:
          evaluations: at least 2. A quarter is for random waves, one for the start, the others for refinements.

        Raises:
          ValueError: for fewer than 2 evaluations.

        Examples:
          >>> WaveSearch.within(100)
          WaveSearch(candidates=25, refinements=74, step=0.01)
        """
        base.check_at_least("waves", evaluations, 2)
        candidates = max(1, evaluations // 4)
        return cls(candidates, evaluations - candidates - 1)

    def check(self) -> "WaveSearch":
        """Returns itself.

        Raises:
          ValueError: for a field out of range.
        """
        base.check_at_least("waves: candidates", self.candidates, 1)
        base.check_at_least("waves: refinements", self.refinements, 0)
        base.check_positive("waves: step", self.step)
        return self

    @property
    def evaluations(self) -> int:
        """Evaluations of the loss that a search makes, including that of the start."""
        return 1 + self.candidates + self.refinements

    def _drawn(self, key, channels, dtype):
        """The frequency and the phase of random waves, `[candidates, 3]`; normal numbers for each change."""
        key_candidates, key_changes = jax.random.split(key)
        # A frequency and its negative give the same waves, so the first one need not be negative.
        low, high = jnp.asarray([0, -0.5, 0], dtype), jnp.asarray([0.5, 0.5, 1], dtype)
        drawn = jax.random.uniform(key_candidates, (self.candidates, 3), dtype, low[None], high[None])
        return drawn, jax.random.normal(key_changes, (self.refinements, 4), dtype)

    def _changed(self, parameters, inputs):
        size = self.step * jnp.exp(1.5 * inputs[0])
        return parameters + size * jnp.asarray([1, 1, _PHASE_STEP], parameters.dtype) * inputs[1:]

    def _image(self, parameters, shape):
        return _wave(parameters, shape)


@functools.partial(jax.jit, static_argnums=1)
def _wave(parameters, shape):
    """`[H, W, C]` of -1 and 1; `parameters [3]`: cycles per pixel down and across, and the phase in turns."""
    rows, columns = (jnp.arange(length, dtype=parameters.dtype) for length in shape[:2])
    turns = parameters[0] * rows[:, None] + parameters[1] * columns[None] + parameters[2]
    sign = jnp.where(jnp.cos(2 * jnp.pi * turns) >= 0, 1, -1).astype(parameters.dtype)
    return jnp.broadcast_to(sign[..., None], shape)
