"""A start for attacks that may only ask: plane waves of full contrast, the best one found on the support images."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lft_jax import base

_TURNS_OF_PHASE = 20 / (2 * jnp.pi)  # a step in frequency moves the phase across an image of about 20 pixels as far


@dataclasses.dataclass(frozen=True)
class WaveSearch:
    """Tries stripes `scale * sign(cos(2 pi (f . x + phase)))`, the same in all channels, and keeps the best.

    Convolutional networks are fooled by single frequencies far more easily than by noise of the same size, and a wave
    has three numbers where a perturbation has thousands: the first hundred queries, too few for a useful estimate of
    a gradient, find a good one. First waves of any frequency are drawn, then the best one is changed a little, at
    several scales, and the change is kept if the loss falls: a (1+1) evolution strategy.

    Attributes:
      candidates: waves drawn, at least 1.
      refinements: changes tried of the best one, at least 0.
      step: median size of a change, in cycles a pixel, above 0.

    References:
      Tsuzuku & Sato 2019, On the structural sensitivity of deep convolutional networks to the directions of Fourier
      basis functions (single frequencies fool networks).
      Co et al. 2019, Procedural noise adversarial examples for black-box attacks on deep networks (search over the few
      parameters of a pattern).
    """

    candidates: int = 50
    refinements: int = 150
    step: float = 0.01

    @classmethod
    def within(cls, evaluations: int) -> "WaveSearch":
        """A search of so many evaluations, at least 2: a quarter of them for waves drawn, the others for changes."""
        base.check_at_least("waves", evaluations, 2)
        candidates = max(1, evaluations // 4)
        return cls(candidates, evaluations - candidates - 1)

    def check(self) -> "WaveSearch":
        """Returns itself; raises a ValueError if a field is out of range."""
        base.check_at_least("waves: candidates", self.candidates, 1)
        base.check_at_least("waves: refinements", self.refinements, 0)
        base.check_positive("waves: step", self.step)
        return self

    @property
    def evaluations(self) -> int:
        """Losses that a search takes, that of the start included."""
        return 1 + self.candidates + self.refinements

    def __call__(
        self,
        loss_fn: Callable[[jax.Array], jax.Array],
        theta: jax.Array,
        scale: jax.Array,
        key: jax.Array,
        *,
        opaque: bool = False,
    ) -> jax.Array:
        """`[H, W, C]`: a wave, or `theta` itself if no wave has a lower loss.

        Args:
          loss_fn: `[H, W, C] -> []`, only evaluated.
          theta: `[H, W, C]`, where the search begins.
          scale: `[]`, the size of a wave's coordinates.
          key: of the waves.
          opaque: whether JAX cannot trace `loss_fn`; then this runs eagerly.
        """
        mapped, scan = (_eager_map, _eager_scan) if opaque else (jax.lax.map, jax.lax.scan)
        key_candidates, key_changes = jax.random.split(key)
        dtype = theta.dtype
        low, high = jnp.asarray([0, -0.5, 0], dtype), jnp.asarray([0.5, 0.5, 1], dtype)  # a wave and its mirror are one

        def loss(numbers):
            return loss_fn(scale * _wave(numbers, theta.shape))

        drawn = jax.random.uniform(key_candidates, (self.candidates, 3), dtype, low[None], high[None])
        losses = mapped(loss, drawn)
        first = jnp.argmin(losses)

        def change(carry, key):
            numbers, lowest = carry
            key_size, key_change = jax.random.split(key)
            size = self.step * jnp.exp(1.5 * jax.random.normal(key_size, (), dtype))
            units = jnp.asarray([1, 1, _TURNS_OF_PHASE], dtype)
            changed = numbers + size * units * jax.random.normal(key_change, (3,), dtype)
            found = loss(changed)
            better = found < lowest
            return (jnp.where(better, changed, numbers), jnp.where(better, found, lowest)), None

        keys = jax.random.split(key_changes, self.refinements)
        (numbers, lowest), _ = scan(change, (drawn[first], losses[first]), keys)
        own = loss_fn(jax.lax.stop_gradient(theta))  # a start that is kept keeps its derivative
        return jnp.where(lowest < own, scale * _wave(numbers, theta.shape), theta)


def _eager_map(function, inputs):
    return jnp.stack([function(x) for x in inputs])


def _eager_scan(step, carry, inputs):
    for x in inputs:
        carry, _ = step(carry, x)
    return carry, None


@functools.partial(jax.jit, static_argnums=1)
def _wave(numbers, shape):
    """`[H, W, C]` of -1 and 1; `numbers [3]`: cycles a pixel down and across, and the phase in turns."""
    rows, columns = (jnp.arange(length, dtype=numbers.dtype) for length in shape[:2])
    turns = numbers[0] * rows[:, None] + numbers[1] * columns[None] + numbers[2]
    sign = jnp.where(jnp.cos(2 * jnp.pi * turns) >= 0, 1, -1).astype(numbers.dtype)
    return jnp.broadcast_to(sign[..., None], shape)
