"""First-order and zeroth-order oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lft_jax import oracles

KINDS = ["gaussian", "sphere", "rademacher", "coordinate"]
MIXED = list(zip(KINDS, [False, True, True, False], strict=True))
KEY = jax.random.key(3)


def tree(dtypes=(np.float64, np.float64, np.float64)):
    """Several leaves with 8 coordinates in total, including a scalar and an empty leaf."""
    a, b, c = dtypes
    return {
        "image": jnp.asarray([[0.5, -1.0, 2.0], [0.1, 0.3, -0.7]], a),
        "scalar": jnp.asarray(0.4, b),
        "empty": jnp.zeros((0, 3), c),
        "bias": jnp.asarray([1.5], c),
    }


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def flat_batch(tree):
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(tree)], axis=1)


def smooth_loss(theta):
    """Not quadratic, not separable; works on NumPy and JAX arrays."""
    xp = jnp if isinstance(theta["scalar"], jax.Array) else np
    return xp.sum(xp.sin(theta["image"])) * theta["scalar"] + xp.sum(theta["bias"] ** 2) + xp.sum(theta["empty"])


class Recorder:
    """An opaque batched loss that records the points it was called with, one array `[n, d]` per call."""

    def __init__(self, loss):
        self.loss, self.calls = loss, []

    def __call__(self, points):
        assert all(type(x) is np.ndarray and x.flags.writeable for x in jax.tree.leaves(points))
        self.calls.append(flat_batch(points))
        return np.stack([self.loss(jax.tree.map(lambda x, i=i: x[i], points)) for i in range(len(points["scalar"]))])


def tried_directions(theta, *, smoothing=1.0, antithetic=False, **options):
    """Directions `[q, d]` of the oracle, recovered from the points at which an opaque loss was called."""
    record = Recorder(smooth_loss)
    oracles.zeroth_order(record, smoothing=smoothing, antithetic=antithetic, opaque=True, **options)(theta, KEY)
    points = np.concatenate(record.calls if antithetic else record.calls[1:])
    return (points - flat(theta)) / smoothing


# First order.


def test_gradient_is_value_and_grad(x64):
    answer = oracles.gradient(smooth_loss, evaluations=7)(tree(), KEY)
    value, grads = jax.value_and_grad(smooth_loss)(tree())
    assert answer.value == value
    np.testing.assert_array_equal(flat(answer.grads), flat(grads))
    assert answer.queries == 7 and answer.queries.dtype == jnp.int32
    assert answer.extras == {}


@settings(max_examples=4, deadline=None)
@given(examples=st.sampled_from([1, 4]), seed=st.integers(0, 1000))
def test_per_example_gradient_matches_vmapped_grad(examples, seed):
    with jax.enable_x64(True):
        xs = jax.random.normal(jax.random.key(seed), (examples, 2, 3), jnp.float64)

        def loss(theta, x):
            return jnp.tanh(jnp.sum(jnp.cos(x + theta["image"])) * theta["scalar"]) + jnp.sum(theta["bias"])

        oracle = oracles.per_example_gradient(lambda thetas: jax.vmap(loss)(thetas, xs), num_examples=examples)
        answer = jax.jit(oracle)(tree(), KEY)
        grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(tree(), xs)
        assert answer.value == pytest.approx(np.mean(jax.vmap(loss, in_axes=(None, 0))(tree(), xs)))
        np.testing.assert_allclose(flat(answer.grads), flat_batch(grads).mean(0), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(flat(answer.extras["spread"]), flat_batch(grads).std(0), rtol=1e-9, atol=1e-15)
        assert jax.tree.structure(answer.extras["spread"]) == jax.tree.structure(tree())
        assert answer.queries == examples


def test_spread_of_identical_examples_is_zero_with_a_finite_derivative():
    def spread(theta):
        oracle = oracles.per_example_gradient(lambda t: jnp.sum(t**2, axis=1), num_examples=4)
        return jnp.sum(oracle(theta, KEY).extras["spread"])

    value, grads = jax.value_and_grad(spread)(jnp.arange(3.0))
    assert value == 0
    np.testing.assert_array_equal(grads, 0)


# Zeroth order: the estimate.


@pytest.mark.parametrize(
    ("kind", "antithetic", "directions", "chunk"),
    [
        ("gaussian", False, 5, 3),
        ("gaussian", True, 4, 9),
        ("sphere", False, 5, 2),
        ("sphere", True, 5, None),
        ("rademacher", False, 1, 1),
        ("rademacher", True, 6, 2),
        ("coordinate", False, 8, 3),
        ("coordinate", True, 3, 1),
    ],
)
def test_matches_a_plain_loop_over_the_same_directions(kind, antithetic, directions, chunk):
    """The reference uses only the points that were evaluated, and nothing else of the implementation."""
    mu, d, record = 0.01, 8, Recorder(smooth_loss)
    options = {"num_directions": directions, "directions": kind, "antithetic": antithetic, "smoothing": mu}
    opaque = oracles.zeroth_order(record, chunk_size=chunk, opaque=True, **options)
    traced = jax.jit(oracles.zeroth_order(smooth_loss, chunk_size=chunk, **options))

    def f(x):
        return np.sum(np.sin(x[1:7])) * x[7] + x[0] ** 2  # leaves in alphabetical order

    @settings(max_examples=5, deadline=None)
    @given(shift=st.floats(-2, 2), seed=st.integers(0, 1000))
    def check(shift, seed):
        theta, key = jax.tree.map(lambda x: x + shift, tree()), jax.random.key(seed)
        record.calls.clear()
        answers = [opaque(theta, key), traced(theta, key)]

        x = flat(theta)
        calls = record.calls if antithetic else record.calls[1:]
        assert max(map(len, calls)) <= min(chunk or directions, directions) * (2 if antithetic else 1)
        us = np.concatenate([points[: len(points) // 2] if antithetic else points for points in calls])
        us = (us - x) / mu
        assert len(us) == directions
        grads = np.zeros(d)
        for u in us:
            slope = (f(x + mu * u) - f(x - mu * u)) / (2 * mu) if antithetic else (f(x + mu * u) - f(x)) / mu
            grads += slope * u * (d if kind in ("sphere", "coordinate") else 1) / directions
        value = np.mean([f(x + s * mu * u) for u in us for s in (1, -1)]) if antithetic else f(x)
        for answer in answers:
            np.testing.assert_allclose(flat(answer.grads), grads, rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(answer.value, value, rtol=1e-10, atol=1e-12)
            assert answer.queries == sum(map(len, record.calls))

    with jax.enable_x64(True):
        check()


@pytest.mark.parametrize(("kind", "antithetic"), MIXED)
def test_unbiased_on_a_quadratic(x64, kind, antithetic):
    """The mean of N q single-direction estimates is the gradient g within five standard errors.

    Variance of coordinate j of one estimate, from the moments of u (curvature adds O(mu), here below 1%):
    gaussian E[(g.u)^2 u_j^2] - g_j^2 = |g|^2 + g_j^2; rademacher |g|^2 - g_j^2; sphere, with E[u_i^2 u_j^2] =
    1 / (d (d + 2)) and three times that for i = j, d / (d + 2) (|g|^2 + 2 g_j^2) - g_j^2; coordinate, which picks
    j with probability 1/d, (d - 1) g_j^2 (and less without replacement).
    """
    d, q, answers, mu = 5, 4, 5000, 1e-4
    hessian = jnp.asarray(np.random.default_rng(0).normal(size=(d, d)))
    theta = jnp.linspace(-1.0, 1.0, d)

    def loss(x):
        return x @ hessian @ x / 2 + jnp.sum(x)

    oracle = oracles.zeroth_order(loss, num_directions=q, smoothing=mu, directions=kind, antithetic=antithetic)
    grads = jax.jit(jax.vmap(lambda key: oracle(theta, key).grads))(jax.random.split(KEY, answers))
    g = np.asarray(jax.grad(loss)(theta))
    squared = g @ g
    variance = {
        "gaussian": squared + g**2,
        "rademacher": squared - g**2,
        "sphere": d / (d + 2) * (squared + 2 * g**2) - g**2,
        "coordinate": (d - 1) * g**2,
    }[kind]
    bias = mu / 2 * np.abs(np.diag(hessian)) if (kind, antithetic) == ("coordinate", False) else 0
    error = np.abs(np.mean(grads, axis=0) - g)
    assert np.all(error < 5 * np.sqrt(variance / (answers * q)) + 2 * bias)
    if kind != "coordinate":  # also the variance matches the formula
        np.testing.assert_allclose(np.var(grads, axis=0) * q, variance, rtol=0.15)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("mu", [1e-3, 1.0, 50.0])
def test_all_coordinates_are_exact_on_a_linear_function(x64, mu, antithetic):
    g = np.arange(1.0, 9.0)

    def loss(theta):
        return jnp.dot(jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(theta)]), g)

    options = {"directions": "coordinate", "smoothing": mu, "antithetic": antithetic}
    for key in (KEY, jax.random.key(4)):
        answer = oracles.zeroth_order(loss, num_directions=8, **options)(tree(), key)
        np.testing.assert_allclose(flat(answer.grads), g, rtol=1e-9)
    # Fewer directions: each chosen coordinate is d/q times its slope, the others 0.
    some = flat(oracles.zeroth_order(loss, num_directions=3, **options)(tree(), KEY).grads)
    assert np.count_nonzero(some) == 3
    np.testing.assert_allclose(some[some != 0], 8 / 3 * g[some != 0], rtol=1e-9)


def test_sphere_scaling_on_a_linear_function(x64):
    """One direction u on the sphere gives d (g.u) u, of length d |g.u|; its product with g is d (g.u)^2."""
    d, g = 8, np.arange(1.0, 9.0)

    def loss(theta):
        return jnp.dot(jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(theta)]), g)

    oracle = oracles.zeroth_order(loss, num_directions=1, directions="sphere", smoothing=0.3)
    for seed in range(5):
        estimate = flat(oracle(tree(), jax.random.key(seed)).grads)
        np.testing.assert_allclose(estimate @ estimate, d * (estimate @ g), rtol=1e-9)


def test_directions_have_their_distribution(x64):
    draw = functools.partial(tried_directions, tree())
    sphere = draw(directions="sphere", num_directions=500)
    np.testing.assert_allclose(np.linalg.norm(sphere, axis=1), 1, rtol=1e-9)
    # E u u^T = I / d; the variance of u_i u_j is at most 3 / (d (d + 2)).
    np.testing.assert_allclose(sphere.T @ sphere / 500, np.eye(8) / 8, atol=5 * np.sqrt(3 / 80 / 500))
    rademacher = draw(directions="rademacher", num_directions=500)
    np.testing.assert_allclose(np.abs(rademacher), 1, rtol=1e-9)
    np.testing.assert_allclose(rademacher.T @ rademacher / 500, np.eye(8), atol=5 / np.sqrt(500))
    gaussian = draw(directions="gaussian", num_directions=500)
    np.testing.assert_allclose(gaussian.T @ gaussian / 500, np.eye(8), atol=5 * np.sqrt(2 / 500))
    assert np.abs(np.mean(gaussian**4) - 3) < 5 * np.sqrt(96 / 4000)
    axes = draw(directions="coordinate", num_directions=6)
    assert np.all(np.sort(axes, axis=1)[:, :-1] == 0) and np.allclose(axes.max(1), 1)
    assert len(set(axes.argmax(1))) == 6


def test_antithetic_value_is_that_of_the_smoothed_loss(x64):
    """E f(x + mu u) = f(x) + mu^2 / 2 tr(H) for u ~ N(0, I) and a quadratic f.

    For f = |x|^2 / 2 a pair's mean is f + mu^2 |u|^2 / 2, whose variance is mu^4 d / 2.
    """
    theta, mu, q, d = jnp.asarray([1.0, 2.0, -1.0]), 0.5, 4000, 3
    oracle = oracles.zeroth_order(lambda x: x @ x / 2, num_directions=q, smoothing=mu, antithetic=True)
    value = oracle(theta, KEY).value
    assert abs(value - (3 + mu**2 / 2 * d)) < 5 * mu**2 * np.sqrt(d / 2 / q)


@pytest.mark.parametrize("antithetic", [False, True])
def test_queries_count_every_example(antithetic):
    oracle = oracles.zeroth_order(jnp.sum, num_directions=5, antithetic=antithetic, evaluations=30)
    queries = oracle(jnp.ones(7), KEY).queries
    assert queries == (300 if antithetic else 180)
    assert queries.dtype == jnp.int32


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_depend_on_the_key_alone(kind):
    oracle = jax.jit(oracles.zeroth_order(smooth_loss, num_directions=3, directions=kind))
    theta = tree((np.float32,) * 3)
    first, again, other = (flat(oracle(theta, jax.random.key(s)).grads) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_legacy_keys_are_accepted():
    oracle = oracles.zeroth_order(smooth_loss, num_directions=5, chunk_size=2)
    legacy = oracle(tree((np.float32,) * 3), jax.random.PRNGKey(3))
    assert legacy.value == oracle(tree((np.float32,) * 3), KEY).value


@pytest.mark.parametrize(("kind", "antithetic"), MIXED)
def test_jit_vmap_and_scan_agree_with_eager(x64, kind, antithetic):
    oracle = oracles.zeroth_order(
        smooth_loss, num_directions=5, directions=kind, antithetic=antithetic, chunk_size=2, smoothing=0.1
    )
    theta, keys = tree(), jax.random.split(KEY, 2)
    eager = np.stack([flat(oracle(theta, key).grads) for key in keys])
    vmapped = flat_batch(jax.jit(jax.vmap(oracle, in_axes=(None, 0)))(theta, keys).grads)
    scanned = flat_batch(jax.lax.scan(lambda t, key: (t, oracle(t, key).grads), theta, keys)[1])
    for other in (vmapped, scanned):
        np.testing.assert_allclose(other, eager, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "antithetic"), MIXED)
def test_mixed_and_16_bit_leaves(x64, kind, antithetic):
    dtypes = (jnp.bfloat16, jnp.float16, jnp.float32)
    theta = tree(dtypes)

    def loss(theta):
        return smooth_loss(jax.tree.map(lambda x: x.astype(jnp.float32), theta))

    # Rounding of bfloat16 numbers below 2 (spacing 1/128) changes a step of 1/16 by at most 12%, on average by nothing.
    options = {"directions": kind, "antithetic": antithetic, "smoothing": 1 / 16 if kind != "sphere" else 0.2}
    oracle = oracles.zeroth_order(loss, num_directions=8 if kind == "coordinate" else 4000, **options)
    answer = jax.jit(oracle)(theta, KEY)
    assert jax.tree.map(lambda x: x.dtype, answer.grads) == jax.tree.map(lambda x: x.dtype, theta)
    assert answer.value.dtype == jnp.float32
    g = flat(jax.grad(smooth_loss)(tree()))
    np.testing.assert_allclose(flat(answer.grads), g, atol=0.15 * float(np.linalg.norm(g)))


def test_16_bit_losses_do_not_overflow():
    """The slope 1000 / 1e-3 * u overflows float16, the gradient in float32 does not."""
    oracle = oracles.zeroth_order(lambda x: (x[0] * 1e6).astype(jnp.float16), num_directions=50)
    answer = oracle(jnp.zeros(1), KEY)
    assert answer.value.dtype == jnp.float16
    np.testing.assert_allclose(answer.grads, [1e6], rtol=1)


# Opaque losses.


def test_opaque_float64_losses_are_differenced_in_float64():
    """1e6 + x: in float32 (spacing 1/16) a step of 0.01 would be lost."""
    oracle = oracles.zeroth_order(
        lambda x: 1e6 + x.astype(np.float64).sum(1),
        num_directions=3,
        smoothing=0.01,
        directions="coordinate",
        opaque=True,
    )
    np.testing.assert_allclose(oracle(jnp.zeros(3), KEY).grads, 1, rtol=1e-3)


def test_opaque_losses_are_refused_under_jit():
    oracle = oracles.zeroth_order(lambda x: x.sum(1), opaque=True)
    with pytest.raises(ValueError, match="loss_fn is opaque"):
        jax.jit(oracle)(jnp.ones(3), KEY)
    with pytest.raises(ValueError, match="loss_fn is opaque"):
        jax.vmap(oracle, in_axes=(None, 0))(jnp.ones(3), jax.random.split(KEY, 2))


# The public contract, and bad input.


def test_value_and_grad_is_the_oracle():
    options = {"num_directions": 3, "smoothing": 0.1, "directions": "sphere", "antithetic": True, "chunk_size": 2}
    theta = tree((np.float32,) * 3)
    value, grads = oracles.zeroth_order_value_and_grad(smooth_loss, **options)(theta, KEY)
    answer = oracles.zeroth_order(smooth_loss, **options)(theta, KEY)
    assert value == answer.value
    np.testing.assert_array_equal(flat(grads), flat(answer.grads))


@pytest.mark.parametrize("build", [oracles.zeroth_order, oracles.zeroth_order_value_and_grad])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_directions": 0}, "num_directions .* got 0"),
        ({"num_directions": 2.5}, "num_directions .* got 2.5"),
        ({"smoothing": 0.0}, "smoothing .* got 0.0"),
        ({"smoothing": -1.0}, "smoothing .* got -1.0"),
        ({"smoothing": float("nan")}, "smoothing .* got nan"),
        ({"directions": "gausian"}, "'gausian'. Did you mean 'gaussian'"),
        ({"chunk_size": 0}, "chunk_size .* got 0"),
        ({"resolution": 0}, "resolution .* got 0"),
        ({"resolution": 2, "directions": "coordinate"}, "resolution: directions='coordinate' are axes"),
        ({"memory_mib": 0.0}, "memory_mib .* got 0.0"),
    ],
)
def test_bad_arguments(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(smooth_loss, **options)


def test_bad_counts():
    with pytest.raises(ValueError, match=r"evaluations .* got 0"):
        oracles.gradient(smooth_loss, evaluations=0)
    with pytest.raises(ValueError, match=r"evaluations .* got 0"):
        oracles.zeroth_order(smooth_loss, evaluations=0)
    with pytest.raises(ValueError, match=r"num_examples .* got 0"):
        oracles.per_example_gradient(smooth_loss, num_examples=0)
    with pytest.raises(ValueError, match=r"num_directions must be at most 3, .* got 4"):
        oracles.zeroth_order(jnp.sum, num_directions=4, directions="coordinate")(jnp.ones(3), KEY)


def test_bad_theta_and_losses():
    with pytest.raises(ValueError, match=r"theta\['a'\] must be a floating-point array, got int32"):
        oracles.gradient(lambda t: jnp.sum(t["a"]))({"a": jnp.arange(3)}, KEY)
    with pytest.raises(ValueError, match="theta must have at least one coordinate"):
        oracles.zeroth_order(jnp.sum)(jnp.zeros(0), KEY)
    with pytest.raises(ValueError, match=r"loss_fn must give .* shape \(1,\), got float32\[1, 3\]"):
        oracles.zeroth_order(lambda x: x)(jnp.ones(3), KEY)
    with pytest.raises(ValueError, match=r"example_losses must give .* shape \(4,\), got float32\[3\]"):
        oracles.per_example_gradient(lambda t: jnp.sum(t, axis=0), num_examples=4)(jnp.ones(3), KEY)
