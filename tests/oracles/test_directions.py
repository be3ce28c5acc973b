"""Zeroth-order directions in a subspace, and independent directions for each example."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from hypothesis import given
from hypothesis import strategies as st

from lft_jax import oracles
from lft_jax.oracles.directions import Subspace

KEY = jax.random.key(3)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sphere"])
@pytest.mark.parametrize(("shape", "tiles"), [((5, 4, 2), 3 * 2 * 2), ((6, 3), 3 * 3), ((7,), 3), ((2, 2, 2, 1), 3)])
def test_coarse_directions_estimate_the_mean_over_each_tile(x64, kind, shape, tiles):
    """Directions are constant on tiles; on a linear loss the mean estimate averages the gradient over each tile."""
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
    if len(shape) == 3:  # ceil(5 / 3) = 2 rows of pixels, ceil(4 / 3) = 2 columns, separate channels
        assert set(members[0].tolist()) <= {n for n in range(g.size) if n % 2 == members[0][0] % 2}
    # At most the variance with Gaussian directions: that of the sums over tiles, divided by the size of the tile.
    sums = np.asarray([g.ravel()[m].sum() for m in members])
    deviation = np.sqrt(2 * (sums**2).sum() / queries) / min(map(len, members))
    assert np.abs(np.ravel(grads) - expected).max() < 5 * deviation
    traced = oracles.zeroth_order(lambda t: jnp.sum(t * g), **options)(jnp.zeros(shape), KEY).grads
    np.testing.assert_allclose(traced, grads, rtol=1e-9, atol=1e-12)


def test_a_resolution_of_at_least_the_sides_changes_nothing():
    options = {"num_directions": 3, "directions": "rademacher"}
    loss, theta = lambda t: jnp.sum(t**2), jnp.arange(12.0).reshape(4, 3)
    fine, none = (oracles.zeroth_order(loss, resolution=r, **options)(theta, KEY) for r in (4, None))
    np.testing.assert_allclose(fine.grads, none.grads, rtol=1e-5)


def low_frequencies(image, resolution):
    """Projection onto the lowest frequencies by SciPy."""
    axes = (0, 1) if image.ndim in (2, 3) else (0,)
    coefficients = scipy.fft.dctn(image, axes=axes, norm="ortho")
    kept = np.zeros_like(coefficients)
    corner = tuple(slice(resolution) for _ in axes)
    kept[corner] = coefficients[corner]
    return scipy.fft.idctn(kept, axes=axes, norm="ortho")


@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=2),
    resolution=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_the_dct_basis_projects_onto_low_frequencies_like_scipy(shapes, resolution, seed):
    """For any leaves, `project(B B^T g)` equals the projection of each leaf by SciPy."""
    random = np.random.default_rng(seed)
    leaves = [random.normal(size=shape) for shape in shapes]
    space = Subspace(tuple(map(tuple, shapes)), resolution, "dct")
    basis = np.asarray(space.expand(jnp.eye(space.size)), np.float64)  # rows
    assert np.mean(basis**2 * space.size) == pytest.approx(1, rel=1e-4)
    flat = np.concatenate([leaf.ravel() for leaf in leaves])
    found = space.project(jnp.asarray(basis.T @ (basis @ flat), jnp.float32))
    expected = [low_frequencies(leaf, resolution).ravel() for leaf in leaves]
    np.testing.assert_allclose(found, np.concatenate(expected), atol=2e-5)


def test_the_dct_estimate_is_close_to_the_projected_gradient(x64):
    g = np.random.default_rng(0).normal(size=(6, 5, 2))
    options = {"num_directions": 4000, "directions": "rademacher", "resolution": 3, "basis": "dct"}
    grads = oracles.zeroth_order(lambda t: jnp.sum(t * g), **options)(jnp.zeros(g.shape), KEY).grads
    expected = low_frequencies(g, 3)
    # Rademacher estimates of a vector have a variance of at most its squared norm in each coordinate of the basis.
    assert np.sqrt(np.sum((grads - expected) ** 2)) < 1.5 * np.linalg.norm(expected) * np.sqrt(18 / 4000)


def example_gradients(num_examples, shape, seed=0):
    return np.random.default_rng(seed).normal(size=(num_examples, *shape))


@pytest.mark.parametrize("antithetic", [True, False])
def test_per_example_directions_along_all_axes_give_the_per_example_gradient(x64, antithetic):
    """Finite differences along every axis are exact for linear losses: mean, spread and value as by differentiation."""
    gs = example_gradients(3, (2, 2))

    def losses(thetas):
        thetas = jnp.broadcast_to(thetas, gs.shape)
        return jnp.sum(thetas * gs, axis=(1, 2)) + 1

    theta = jnp.arange(4.0).reshape(2, 2)
    exact = oracles.per_example_gradient(losses, num_examples=3)(theta, KEY)
    options = {"num_directions": 4, "directions": "coordinate", "antithetic": antithetic}
    for opaque in (False, True):
        own = oracles.per_example_zeroth_order(losses, num_examples=3, opaque=opaque, **options)(theta, KEY)
        np.testing.assert_allclose(own.grads, exact.grads, rtol=1e-9)
        np.testing.assert_allclose(own.extras["spread"], exact.extras["spread"], rtol=1e-9)
        np.testing.assert_allclose(own.value, exact.value, rtol=1e-9)
        assert own.queries == (2 * 4 * 3 if antithetic else 5 * 3)


@pytest.mark.parametrize("agree", [True, False])
def test_per_example_directions_have_less_noise_if_examples_agree(x64, agree):
    """Compared with shared directions of the same number of queries, the variance is 1 / S of it, or the same."""
    examples, size, runs = 8, 24, 400
    if agree:
        gs = np.repeat(example_gradients(1, (size,)), examples, axis=0)
    else:  # orthogonal gradients of equal length
        gs = np.linalg.qr(example_gradients(size, (size,)))[0][:examples] * 3

    def losses(thetas):
        return jnp.sum(jnp.broadcast_to(thetas, gs.shape) * gs, axis=1)

    def variance(per_example):
        estimator = oracles.ZerothOrder(2, directions="rademacher", per_example=per_example)
        oracle = estimator(losses, num_examples=examples)
        assert oracle(jnp.zeros(size), KEY).queries == 2 * 2 * examples
        grads = jax.vmap(lambda key: oracle(jnp.zeros(size), key).grads)(jax.random.split(KEY, runs))
        assert np.abs(np.mean(grads, 0) - gs.mean(0)).max() < 5 * np.std(grads, 0).max() / np.sqrt(runs)
        return np.var(grads, axis=0).sum()

    ratio = variance(False) / variance(True)
    assert ratio == pytest.approx(examples if agree else 1, rel=0.15)


def test_per_example_directions_compile_once():
    calls = []

    @jax.jit
    def step(theta, key):
        calls.append(1)
        return oracles.per_example_zeroth_order(
            lambda t: jnp.sum(t**2, axis=1), num_examples=5, num_directions=3, resolution=2
        )(theta, key)

    for n in range(2):
        step(jnp.ones(4), jax.random.key(n))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 0}, "num_examples must be at least 1, got 0"),
        ({"num_directions": 0}, "num_directions must be at least 1, got 0"),
        ({"smoothing": 0.0}, "smoothing must be a finite number above 0"),
        ({"basis": "wavelets"}, "basis: unknown name 'wavelets'"),
        ({"resolution": 2, "directions": "coordinate"}, "resolution: directions='coordinate' are axes"),
    ],
)
def test_bad_settings_of_per_example_directions_are_named(options, message):
    options: dict[str, Any] = {"num_examples": 2, **options}
    with pytest.raises(ValueError, match=message):
        oracles.per_example_zeroth_order(lambda t: jnp.sum(t, axis=1), **options)


def test_example_losses_must_be_one_per_example():
    oracle = oracles.per_example_zeroth_order(lambda t: jnp.sum(t), num_examples=2)
    with pytest.raises(ValueError, match="example_losses must give one floating-point loss for each of 2 copies"):
        oracle(jnp.ones(3), KEY)
