"""Averages over translations against loops over pixels."""

import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

from lft_jax import _periods
from lft_jax.optimizers import periodic, shrink_periods
from tests.trust.cases import for_all

SIDE = st.sampled_from([1, 3, 4, 9])
SEED = st.integers(0, 2**32 - 1)


def looped(image, period):
    """The mean over the pixels of each group, `[p, p, C]`, 0 for groups without pixels."""
    sums, counts = np.zeros((period, period, image.shape[2])), np.zeros((period, period, 1))
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            sums[i % period, j % period] += image[i, j]
            counts[i % period, j % period] += 1
    return sums / np.maximum(counts, 1)


def put_back(tile, shape):
    image = np.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            image[i, j] = tile[i % len(tile), j % len(tile)]
    return image


@for_all(seed=SEED, height=SIDE, width=SIDE, channels=st.integers(1, 2), period=st.sampled_from([1, 2, 4, 5]))
def test_periodic_averages_are_those_of_a_loop(seed, height, width, channels, period):
    shape = height, width, channels
    image = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    tile = looped(image, period)
    np.testing.assert_allclose(_periods.tile_of(jnp.asarray(image), period), tile, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        _periods.repeated(jnp.asarray(tile, jnp.float32), shape), put_back(tile, shape), rtol=1e-6
    )
    found, _ = periodic(period).update(jnp.asarray(image), optax.EmptyState())
    np.testing.assert_allclose(found, put_back(tile, shape), rtol=1e-4, atol=1e-5)


@for_all(seed=SEED, height=SIDE, width=SIDE, channels=st.integers(1, 2), count=st.sampled_from([1, 3]))
def test_means_and_errors_of_periods_are_those_of_a_loop(seed, height, width, channels, count):
    shape = height, width, channels
    examples = np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)
    found = _periods.summarized(jnp.asarray(examples))
    assert set(found) == {0, *(p for p in (2, 4, 8, 16, 32) if p < min(height, width))}
    estimate, before, energies = np.zeros(shape), np.zeros(shape), [0.0, 0.0]
    for period in sorted(found, key=lambda p: p or 64):
        tiles = np.stack([looped(x, period) if period else x for x in examples])
        mean = tiles.mean(0)
        error = np.sqrt(sum((tile - mean) ** 2 for tile in tiles) / count / max(count - 1, 1))
        np.testing.assert_allclose(found[period].mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[period].error, error, rtol=1e-3, atol=1e-4)
        whole, errors = (put_back(x, shape) if period else x for x in (mean, error))
        energy, noise = np.sum(whole**2), np.sum(errors**2)
        own = max(energy - energies[0], 0)
        weight = max(own - max(noise - energies[1], 0), 0) / own if own > 1e-6 else 0
        estimate, before, energies = estimate + weight * (whole - before), whole, [energy, noise]
    shrunk, _ = shrink_periods().update(jnp.asarray(examples.mean(0)), optax.EmptyState(), periods=found)
    np.testing.assert_allclose(shrunk, estimate, rtol=1e-2, atol=5e-3)
