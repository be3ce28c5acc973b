"""Zeroth-order directions that are constant on tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax import oracles

KEY = jax.random.key(3)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sphere"])
@pytest.mark.parametrize(("shape", "tiles"), [((5, 4, 2), 3 * 2 * 2), ((6, 3), 3 * 3), ((7,), 3), ((2, 2, 2, 1), 3)])
def test_coarse_directions_estimate_the_mean_over_each_tile(x64, kind, shape, tiles):
    """Directions are constant on tiles; on a linear loss the mean estimate is the gradient's mean over each."""
    g, record, queries = np.random.default_rng(0).normal(size=shape), [], 4000

    def loss(thetas):
        record.append(np.asarray(thetas))
        return (np.asarray(thetas).reshape(len(thetas), -1) @ g.ravel()).astype(np.float64)

    options = {"num_directions": queries, "smoothing": 0.5, "directions": kind, "antithetic": True, "resolution": 3}
    grads = oracles.zeroth_order(loss, opaque=True, **options)(jnp.zeros(shape), KEY).grads
    (points,) = record
    us = points[:queries].reshape(queries, -1)
    columns = {tuple(column) for column in us[:30].T}
    assert len(columns) == tiles
    members = [np.flatnonzero(np.all(column == us[:30].T, axis=1)) for column in columns]
    expected = np.empty(g.size)
    for member in members:
        expected[member] = g.ravel()[member].mean()
    if len(shape) == 3:  # ceil(5 / 3) = 2 rows of pixels, ceil(4 / 3) = 2 columns, and each channel on its own
        assert set(members[0].tolist()) <= {n for n in range(g.size) if n % 2 == members[0][0] % 2}
    # At most the variance of a gaussian's: that of the sums over tiles, in units of the tile's size.
    sums = np.asarray([g.ravel()[m].sum() for m in members])
    deviation = np.sqrt(2 * (sums**2).sum() / queries) / min(map(len, members))
    assert np.abs(np.ravel(grads) - expected).max() < 5 * deviation
    traced = oracles.zeroth_order(lambda t: jnp.sum(t * g), **options)(jnp.zeros(shape), KEY).grads
    np.testing.assert_allclose(traced, grads, rtol=1e-9, atol=1e-12)


def test_a_resolution_of_at_least_the_sides_is_none():
    options = {"num_directions": 3, "directions": "rademacher"}
    loss, theta = lambda t: jnp.sum(t**2), jnp.arange(12.0).reshape(4, 3)
    fine, none = (oracles.zeroth_order(loss, resolution=r, **options)(theta, KEY) for r in (4, None))
    np.testing.assert_allclose(fine.grads, none.grads, rtol=1e-5)
