"""Chunks of directions of a zeroth-order oracle, and the memory that they save."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax import oracles

KEY = jax.random.key(3)


def temporary_bytes(oracle, theta):
    analysis = jax.jit(oracle).lower(theta, KEY).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_chunks_bound_the_memory():
    """Unchunked, 64 directions of 100,000 coordinates take 25.6 MB; chunks of 4 take a sixteenth of that."""
    theta = jnp.zeros(100_000)

    def temporaries(chunk_size):
        oracle = oracles.zeroth_order(lambda x: jnp.sum(jnp.sin(x)), num_directions=64, chunk_size=chunk_size)
        return temporary_bytes(oracle, theta)

    assert temporaries(4) < temporaries(None) / 4


@pytest.mark.parametrize("antithetic", [False, True])
def test_a_memory_budget_sizes_the_chunks(antithetic):
    theta, sizes = jnp.zeros(1000), []

    def record(points):
        sizes.append(len(points))
        return np.sin(points).sum(1)

    # Opaque: a direction takes memory for itself and one or two points, 4,000 bytes each.
    options = {"num_directions": 10, "antithetic": antithetic}
    budget = 3 * (3 if antithetic else 2) * 4000 / 2**20
    oracles.zeroth_order(record, memory_mib=budget, opaque=True, **options)(theta, KEY)
    assert sizes == ([6, 6, 6, 2] if antithetic else [1, 3, 3, 3, 1])

    def loss(theta):
        return jnp.sum(jnp.sin(theta))

    answers = [oracles.zeroth_order(loss, memory_mib=mib, **options)(theta, KEY) for mib in (None, 1e-6, 0.05, 100)]
    for answer in answers[1:]:
        np.testing.assert_allclose(answer.grads, answers[0].grads, rtol=1e-5, atol=1e-3)

    def temporaries(mib):
        oracle = oracles.zeroth_order(loss, **{**options, "num_directions": 200}, memory_mib=mib)
        return temporary_bytes(oracle, jnp.zeros(100_000))

    assert temporaries(8) < 16 * 2**20 < temporaries(None)
