"""Averages over translations against loops, and the optimizers made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lft_jax import _periods
from lft_jax.optimizers import periodic, periodic_descent, projected_gradient, shrink_periods

SHAPES = st.tuples(st.integers(1, 21), st.integers(1, 21), st.integers(1, 3))


def looped(image, period):
    """The mean over the pixels at each place of the tile, put back at each of them."""
    found = np.zeros_like(image)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            found[i, j] = image[i % period :: period, j % period :: period].mean((0, 1))
    return found


def project(image, period):
    updates, _ = periodic(period).update(jnp.asarray(image), optax.EmptyState())
    return np.asarray(updates)


@given(shape=SHAPES, period=st.integers(1, 9), seed=st.integers(0, 100))
def test_periodic_updates_are_means_over_translations(shape, period, seed):
    one, other = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    found = project(one, period)
    np.testing.assert_allclose(found, looped(one, period), rtol=1e-4, atol=1e-5)
    # An orthogonal projection: idempotent and its own transpose.
    np.testing.assert_allclose(project(found, period), found, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.vdot(found, other), np.vdot(one, project(other, period)), rtol=1e-3, atol=1e-3)


def test_the_transpose_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        image, cotangent = (jnp.asarray(x) for x in rng.normal(size=(2, 5, 7, 2)))

        def scalar(x):
            updates, _ = periodic(4).update(x, optax.EmptyState())
            return jnp.vdot(updates, cotangent)

        gradient, step = jax.grad(scalar)(image), 1e-6
        for index in [(0, 0, 0), (4, 6, 1), (3, 2, 0)]:
            moved = image.at[index].add(step), image.at[index].add(-step)
            np.testing.assert_allclose(gradient[index], (scalar(moved[0]) - scalar(moved[1])) / (2 * step), rtol=1e-6)


def shrunk(examples):
    """The mean of the examples, its bands weighed."""
    summary = _periods.summarized(examples)
    return shrink_periods().update(jnp.mean(examples, 0), optax.EmptyState(), periods=summary)[0]


@given(shape=st.tuples(st.integers(3, 40), st.integers(3, 40), st.integers(1, 3)), seed=st.integers(0, 100))
def test_bands_are_weighed_by_their_signal(shape, seed):
    """Against a loop over the periods; only the nested ones below the shorter side are used."""
    rng = np.random.default_rng(seed)
    examples = rng.normal(size=(5, *shape)) + looped(rng.normal(size=shape), 2) + 0.5 * rng.normal(size=shape)
    examples = examples.astype(np.float32)
    before, expected = np.zeros_like(examples), np.zeros(shape)
    for period in [*(p for p in (2, 4, 8, 16, 32) if p < min(shape[:2])), max(shape)]:
        projected = np.stack([looped(example, period) for example in examples])
        band = projected - before
        energy, noise = np.sum(band.mean(0) ** 2), np.sum(band.var(0, ddof=1)) / 5
        expected += max(energy - noise, 0) / energy * band.mean(0) if energy > 0 else 0
        before = projected
    found = jax.jit(shrunk)(examples)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3)


def test_what_is_added_to_the_mean_passes():
    examples = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 6, 1)), jnp.float32)
    periods, mean = _periods.summarized(examples), jnp.mean(examples, 0)
    alone, _ = shrink_periods().update(mean, optax.EmptyState(), periods=periods)
    more, _ = shrink_periods().update(mean + 2, optax.EmptyState(), periods=periods)
    np.testing.assert_allclose(more, alone + 2, rtol=1e-5)
    kept, _ = shrink_periods().update(mean, optax.EmptyState())  # without the extra argument
    np.testing.assert_array_equal(kept, mean)


def test_one_example_has_no_error_and_zeros_stay_zeros():
    one = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 9, 1)), jnp.float32)
    np.testing.assert_allclose(jax.jit(shrunk)(one), one[0], rtol=1e-4, atol=1e-5)
    optimizer, zeros = periodic_descent(), jnp.zeros((9, 9, 1))
    updates, _ = optimizer.update(zeros, optimizer.init(zeros), periods=_periods.summarized(0 * one))
    np.testing.assert_array_equal(updates, 0)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(_periods.shrunk(_periods.summarized(x), (9, 9, 1)) ** 2)))(
        jnp.zeros((3, 9, 9, 1))
    )
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_descent_is_momentum_of_normalized_gradients(norm):
    optimizer, theta = periodic_descent(0.5, 0.9, 1.0, norm), jnp.zeros((3, 5, 1))
    state, momentum = optimizer.init(theta), 0
    for seed in range(3):
        gradient = np.random.default_rng(seed).normal(size=(3, 5, 1)).astype(np.float32)
        updates, state = optimizer.update(jnp.asarray(gradient), state, theta, scale=0.25, progress=0.0)
        momentum = 0.9 * momentum + gradient / np.abs(gradient).mean()
        direction = np.sign(momentum) if norm == "linf" else momentum / np.sqrt(np.mean(momentum**2))
        np.testing.assert_allclose(updates, -0.125 * direction, rtol=1e-5)


def test_a_periodic_optimizer_stays_periodic():
    optimizer, theta = optax.chain(periodic(3), projected_gradient(0.5, 0.9)), jnp.zeros((7, 8, 2))
    state = optimizer.init(theta)
    for seed in range(3):
        gradient = jnp.asarray(np.random.default_rng(seed).normal(size=theta.shape), jnp.float32)
        updates, state = optimizer.update(gradient, state, theta, scale=1.0)
        theta = theta + updates
    np.testing.assert_allclose(theta, looped(np.asarray(theta), 3), atol=1e-6)
    assert len(np.unique(np.asarray(theta))) > 1


def test_what_is_no_perturbation_is_refused():
    with pytest.raises(ValueError, match="period must be at least 1, got 0"):
        periodic(0)
    with pytest.raises(ValueError, match=r"updates must be perturbations \[H, W, C\], got shape \(2, 3\)"):
        periodic(2).update(jnp.ones((2, 3)), optax.EmptyState())
