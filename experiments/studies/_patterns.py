"""A distribution over patterns, and its fit: the expected success of the best of some draws, in closed form."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from lft_jax.base import check_at_least
from lft_jax.tasks import PatternSearch

#: Relations of the phases of a wave's channels: all alike; one channel, at random, half a turn off; independent.
RELATIONS = ("alike", "opponent", "independent")
#: Periods of the tiles of a pool, in pixels; 0 stands for waves.
PERIODS = (0, 2, 3, 4, 8)
#: Bins of the absolute value of a frequency, down and across.
BINS = 8
_TOP = 0.5  # cycles per pixel


@dataclasses.dataclass(frozen=True)
class PatternDistribution:
    """A distribution of waves, and the shares of waves and of tiles of each period.

    Frequencies are in cycles per pixel, so it holds at every size of an image.

    Attributes:
      periods: the share of waves, then those of tiles of the periods `PERIODS[1:]`; sum 1.
      relations: the share of each of `RELATIONS`; sum 1.
      frequencies: `[B][B]`, probabilities of the bins of `|f|` down and across, of equal width from 0 to 0.5 cycles per
        pixel; sum 1. Within a bin frequencies are uniform, and the sign of the second one is random.
    """

    periods: tuple[float, ...]
    relations: tuple[float, ...]
    frequencies: tuple[tuple[float, ...], ...]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "PatternDistribution":
        """The distribution with these fields, whose values may be lists."""
        frequencies = tuple(map(tuple, fields["frequencies"]))
        return cls(tuple(fields["periods"]), tuple(fields["relations"]), frequencies)

    def waves(self, key: PRNGKeyArray, number: int, channels: int) -> "Waves":
        """Random waves.

        Args:
          key: PRNG key.
          number: of waves.
          channels: of the images.
        """
        keys = jax.random.split(key, 6)
        table = jnp.asarray(self.frequencies, jnp.float32)
        side, categorical = len(table), functools.partial(jax.random.categorical, shape=(number,))
        bins = categorical(keys[0], jnp.log(table.ravel())).astype(jnp.int32)
        relations = categorical(keys[1], jnp.log(jnp.asarray(self.relations, jnp.float32))).astype(jnp.int32)
        place = jnp.stack([bins // side, bins % side], -1).astype(jnp.float32)
        frequency = (place + jax.random.uniform(keys[2], (number, 2))) * (_TOP / side)
        frequency = frequency.at[:, 1].multiply(jax.random.rademacher(keys[3], (number,), jnp.float32))
        phase = jax.random.uniform(keys[4], (number, channels))
        odd = jax.nn.one_hot(jax.random.randint(keys[5], (number,), 0, channels), channels, dtype=jnp.float32)
        opponent = phase[:, :1] + (odd / 2 if channels > 1 else 0 * odd)
        kinds = jnp.stack([jnp.broadcast_to(phase[:, :1], phase.shape), opponent, phase])
        return Waves(frequency, kinds[relations, jnp.arange(number, dtype=jnp.int32)], bins, relations)


class Waves(NamedTuple):
    """Waves and what they were drawn as.

    Attributes:
      frequency: `[N, 2]`, cycles per pixel down and across.
      phase: `[N, C]`, in turns.
      bins: `[N]`, bin of the frequency, row by row.
      relations: `[N]`, index in `RELATIONS`.
    """

    frequency: Float[Array, "N 2"]
    phase: Float[Array, "N C"]
    bins: Int32[Array, " N"]
    relations: Int32[Array, " N"]


#: What pools are drawn from: two waves in three.
BROAD = PatternDistribution(
    (2 / 3, *(len(PERIODS) - 1) * (1 / 3 / (len(PERIODS) - 1),)),
    3 * (1 / 3,),
    BINS * (BINS * (1 / BINS**2,),),
)
#: What `PatternSearch` draws: as many tiles of period 2 as waves, half of these alike in all channels.
UNIFORM = PatternDistribution((0.5, 0.5, 0.0, 0.0, 0.0), (0.5, 0.0, 0.5), BROAD.frequencies)
#: Close to `UNIFORM`, and nothing is impossible: where a fit begins, and what it is drawn to.
PRIOR = PatternDistribution((0.47, 0.47, 0.02, 0.02, 0.02), (0.48, 0.04, 0.48), BROAD.frequencies)


@dataclasses.dataclass(frozen=True)
class LearnedSearch(PatternSearch):
    """A `PatternSearch` whose waves are drawn from a distribution.

    Attributes:
      distribution: of the waves; its shares of tiles are those of `tiles`, `waves` and `periods`.
    """

    distribution: PatternDistribution = UNIFORM

    @classmethod
    def of(cls, distribution: PatternDistribution, tiles_and_waves: int, refinements: int) -> "LearnedSearch":
        """A search that shares its random patterns between tiles and waves as a distribution has them."""
        counts = apportioned(np.asarray(distribution.periods), tiles_and_waves)
        periods = tuple(p for p, count in zip(PERIODS[1:], counts[1:], strict=True) for _ in range(count))
        return cls(len(periods), int(counts[0]), refinements, periods or (2,), distribution=distribution)

    def _random(self, key, channels, dtype):
        drawn = super()._random(key, channels, dtype)
        waves = self.distribution.waves(jax.random.fold_in(key, 0), self.waves, channels)
        return drawn._replace(
            frequency=drawn.frequency.at[self.tiles :].set(waves.frequency.astype(dtype)),
            phase=drawn.phase.at[self.tiles :].set(waves.phase.astype(dtype)),
        )


def apportioned(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers with a sum in proportion to shares, by largest remainders.

    Examples:
      >>> apportioned(np.asarray([0.5, 0.3, 0.2]), 4).tolist()
      [2, 1, 1]
    """
    exact = np.asarray(shares, np.float64) * total
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


class Pool(NamedTuple):
    """What patterns did to a victim, in tasks `[T]` of `[N]` patterns each.

    Attributes:
      kinds: `[T, N]`, index in `PERIODS`.
      relations: `[T, N]`, index in `RELATIONS`; -1 for a tile, and where images have one channel.
      bins: `[T, N]`, bin of a wave's frequency; -1 for a tile.
      losses: `[T, N]`, the attack loss on a few images: what a search sees.
      success: `[T, N]`, fraction of other images that are fooled.
    """

    kinds: np.ndarray
    relations: np.ndarray
    bins: np.ndarray
    losses: np.ndarray
    success: np.ndarray


def expected_best(
    weights: Float[Array, " N"], losses: Float[Array, " N"], success: Float[Array, " N"], draws: int
) -> Float[Array, ""]:
    """Expected success of the pattern with the lowest loss among some draws from a pool, with replacement.

    With `F_i` the probability that a draw has a loss of at least that of pattern `i`, pattern `i` is the best one with
    probability `F_i^draws - F_j^draws`, where `j` is the next pattern of a larger loss.

    Examples:
      >>> half = jnp.asarray([0.5, 0.5])
      >>> float(expected_best(half, jnp.asarray([2.0, 1.0]), jnp.asarray([0.0, 1.0]), 2))
      0.75
    """
    order = jnp.argsort(-losses)
    upto = jnp.minimum(jnp.cumsum(weights[order]), 1.0) ** draws
    return jnp.sum(jnp.diff(upto, prepend=jnp.zeros(1, upto.dtype)) * success[order])


class Logits(NamedTuple):
    """Logits of the three parts of a distribution: `[P]`, `[R]`, `[B, B]`."""

    periods: Float[Array, " P"]
    relations: Float[Array, " R"]
    frequencies: Float[Array, "B B"]


def distribution_of(logits: Logits) -> PatternDistribution:
    """The distribution with these logits, to four digits of each probability."""
    periods, relations, frequencies = (np.asarray(jnp.exp(x), np.float64).round(5) for x in _log_parts(logits))
    periods, relations, frequencies = (x / x.sum() for x in (periods, relations, frequencies))
    return PatternDistribution(
        tuple(periods.tolist()), tuple(relations.tolist()), tuple(tuple(row) for row in frequencies.tolist())
    )


def _log_parts(logits):
    """Logarithms of the probabilities; neighbouring frequencies are close by a blur of their logits."""
    return (
        jax.nn.log_softmax(logits.periods),
        jax.nn.log_softmax(logits.relations),
        jax.nn.log_softmax(_blurred(_blurred(logits.frequencies).T).T, axis=None),
    )


def _blurred(x):
    """A blur along the first axis, mirrored at both ends as the spectrum of samples is."""
    padded = jnp.concatenate([x[:1], x, x[-1:]])
    return (padded[:-2] + 2 * x + padded[2:]) / 4


def log_weights(parts: tuple[Array, Array, Array], pool: Pool) -> Float[Array, "T N"]:
    """Logarithms of the weights, with sum 1 in each task, by which a pool drawn from `BROAD` is one of a distribution.

    Args:
      parts: logarithms of its shares of periods and relations, and of its probabilities of frequencies.
      pool: the pool.
    """
    periods, relations, frequencies = parts
    ratios = (periods - jnp.log(jnp.asarray(BROAD.periods)), relations + jnp.log(3.0), frequencies.ravel())

    def of(part, categories):
        return jnp.where(categories < 0, 0, part[jnp.maximum(categories, 0)])

    waves = of(ratios[2], pool.bins) + jnp.where(pool.bins < 0, 0, jnp.log(float(frequencies.size)))
    return jax.nn.log_softmax(of(ratios[0], pool.kinds) + of(ratios[1], pool.relations) + waves, axis=-1)


def fit(pools: list[Pool], draws: int, penalty: float, steps: int = 200) -> PatternDistribution:
    """The distribution whose best of some draws succeeds most, on average over victims and radii.

    Success is in units of its standard deviation over the patterns of a task. The penalty is the Kullback-Leibler
    divergence from `PRIOR`.

    Args:
      pools: of each victim, all of one shape.
      draws: number of draws of a search, at least 1.
      penalty: weight of the divergence, at least 0.
      steps: of Adam.
    """
    check_at_least("draws", draws, 1)
    check_at_least("penalty", penalty, 0)
    stacked = Pool(*(jnp.asarray(np.concatenate(leaves)) for leaves in zip(*pools, strict=True)))
    return distribution_of(_fitted(stacked, draws, jnp.float32(penalty), steps))


@functools.partial(jax.jit, static_argnums=(1, 3))
def _fitted(pool, draws, penalty, steps):
    spread = jnp.std(pool.success, axis=-1, keepdims=True)
    success = (pool.success - jnp.mean(pool.success, axis=-1, keepdims=True)) / jnp.maximum(spread, 1e-3)
    best = jax.vmap(functools.partial(expected_best, draws=draws))
    base = [jnp.log(jnp.asarray(part)) for part in dataclasses.astuple(PRIOR)]

    def objective(logits):
        parts = _log_parts(logits)
        found = best(jnp.exp(log_weights(parts, pool)), pool.losses, success)
        divergence = sum(jnp.sum(jnp.exp(p) * (p - b)) for p, b in zip(parts, base, strict=True))
        return penalty * divergence - jnp.mean(found)

    optimizer = optax.adam(0.1)

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(objective)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    logits = Logits(*base)
    (logits, _), _ = jax.lax.scan(step, (logits, optimizer.init(logits)), None, length=steps)
    return logits


def success_of(distribution: PatternDistribution, pool: Pool, draws: int) -> float:
    """Expected success of the best of some draws, on average over the tasks of a victim."""
    parts = tuple(jnp.log(jnp.asarray(part)) for part in dataclasses.astuple(distribution))
    weights = jnp.exp(log_weights(parts, Pool(*(jnp.asarray(leaf) for leaf in pool))))
    best = jax.vmap(functools.partial(expected_best, draws=draws))
    return float(jnp.mean(best(weights, jnp.asarray(pool.losses), jnp.asarray(pool.success))))
