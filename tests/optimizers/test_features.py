import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from lft_jax.optimizers.features import FEATURES, Signal, safe_sqrt, unit_rms

EVERY_FEATURE = pytest.mark.parametrize("name", FEATURES)
GRADIENTS = hnp.arrays(np.float32, 6, elements=st.floats(-1e6, 1e6, width=32))


def signal(grad, **given):
    grad = jnp.asarray(grad)
    absent = dict(param=None, spread=None, context=None, scale=jnp.ones_like(grad, shape=()))
    return Signal(grad, **{**absent, "progress": jnp.zeros_like(grad, shape=()), **given})


@functools.partial(jax.jit, static_argnums=0)
def apply(name, grad, **given):
    """The features at the first step."""
    return FEATURES[name].apply(signal(grad, **given), FEATURES[name].init(grad))[0]


@functools.partial(jax.jit, static_argnums=0)
def history(name, grads):
    """The features `[T, size, ...]` for a sequence of gradients `[T, ...]`."""

    def step(state, grad):
        return FEATURES[name].apply(signal(grad), state)[::-1]

    return jax.lax.scan(step, FEATURES[name].init(grads[0]), grads)[1]


# ---- Values ----


@given(GRADIENTS)
def test_raw(grad):
    np.testing.assert_array_equal(apply("raw", grad), grad[None])


@given(GRADIENTS | hnp.arrays(np.float32, 6, elements=st.floats(-(2.0**-13), 2.0**-13, width=32)))
def test_log_sign_equals_the_formula_of_the_paper(grad):
    with np.errstate(divide="ignore"):
        large, magnitude = np.abs(grad) >= np.exp(-10.0), np.log(np.abs(grad.astype(np.float64))) / 10
    expected = [np.where(large, magnitude, -1), np.where(large, np.sign(grad), np.exp(10.0) * grad)]
    np.testing.assert_allclose(apply("log_sign", grad), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.standard_promotion
@pytest.mark.usefixtures("x64")
def test_adam_is_optax_adam():
    # RNNProp's second feature, g / sqrt(v_hat), is Adam with b1 = 0. Both add eps = 1e-8 outside the root, which
    # matters for the last, tiny gradients.
    grads = np.random.default_rng(0).normal(size=(5, 3)) * np.array([1.0, 1e-6, 1e-9])
    expected = []
    for decay in (0.9, 0.0):
        tx = optax.scale_by_adam(decay, 0.999, eps=1e-8)
        expected.append(jax.lax.scan(lambda s, g, tx=tx: tx.update(g, s)[::-1], tx.init(jnp.zeros(3)), grads)[1])
    np.testing.assert_allclose(history("adam", grads), np.stack(expected, 1), rtol=1e-9)


@pytest.mark.usefixtures("x64")
@given(hnp.arrays(np.float64, (4, 3), elements=st.floats(-10, 10).map(lambda x: round(x, 6))))
def test_momentum(grads):
    past = np.arange(4)[:, None] - np.arange(4)
    features = history("momentum", grads)
    for i, decay in enumerate((0.0, 0.5, 0.9)):
        moments = np.where(past >= 0, decay ** np.maximum(past, 0), 0) @ grads
        rms = np.sqrt(np.mean(moments**2, axis=1, keepdims=True))
        expected = np.tanh(np.divide(moments, rms, out=np.zeros_like(moments), where=rms > 0))
        np.testing.assert_allclose(features[:, i], expected, rtol=1e-7, atol=1e-9)


def test_spread():
    examples = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    examples[:, 0], examples[:, 1] = 3.0, 0.0  # all equal; all zero
    examples[:, 2] -= examples[:, 2].mean()  # pure noise
    mean, deviation = examples.mean(0), examples.std(0)
    (feature,) = apply("spread", mean, spread=jnp.asarray(deviation))
    expected = [np.mean(x) / (abs(np.mean(x)) + np.std(x)) for x in examples.T[2:]]
    np.testing.assert_allclose(feature, [1, 0, *expected], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(feature[2], 0, atol=1e-6)
    for unit in (1e-30, 1e30):
        rescaled = apply("spread", mean * np.float32(unit), spread=jnp.asarray(deviation * np.float32(unit)))
        np.testing.assert_allclose(rescaled[0], feature, rtol=1e-5, atol=1e-6)


def test_constraint():
    param = jnp.asarray([0.0, 0.1, -0.4, 9.0, -9.0])
    feature = apply("constraint", jnp.zeros(5), param=param, scale=jnp.float32(0.2))
    np.testing.assert_allclose(feature, [[0, 0.5, -2, 3, -3]], rtol=1e-6)


def test_progress():
    np.testing.assert_array_equal(apply("progress", jnp.zeros((2, 3)), progress=jnp.float32(0.25)), [[[0.25] * 3] * 2])


def test_context():
    context = jnp.arange(12.0).reshape(2, 2, 3)
    np.testing.assert_array_equal(apply("context", jnp.zeros((2, 3)), context=context), context)


@pytest.mark.parametrize("name", ["spread", "constraint", "context"])
def test_features_of_an_absent_extra_are_zero(name):
    np.testing.assert_array_equal(apply(name, jnp.ones((2, 3))), np.zeros((FEATURES[name].size, 2, 3)))


# ---- Shapes, dtypes and finiteness ----


@EVERY_FEATURE
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (2, 0, 3), (2, 3, 1, 2)], ids=str)
def test_shapes_and_dtypes(name, shape, dtype):
    like = jax.ShapeDtypeStruct(shape, dtype)
    state = jax.eval_shape(FEATURES[name].init, like)
    features, new_state = jax.eval_shape(lambda g, s: FEATURES[name].apply(signal(g), s), like, state)
    assert (features.shape, features.dtype) == ((FEATURES[name].size, *shape), dtype)
    assert new_state == state


@EVERY_FEATURE
@pytest.mark.parametrize("shape", [(4,), (), (0, 2)], ids=str)
def test_finite_with_finite_derivatives(name, shape):
    pattern = np.resize(np.float32([1.0, -2.0, 0.5, 0.0]), shape)

    def features(grad, param, spread):
        now = signal(grad, param=param, spread=spread)
        first, state = FEATURES[name].apply(now, FEATURES[name].init(grad))
        return jnp.stack([first, FEATURES[name].apply(now, state)[0]])

    both = jax.jit(lambda *inputs: (features(*inputs), jax.jacrev(features, (0, 1, 2))(*inputs)))
    for magnitude in (0.0, 1e-30, 1e-15, 1.0, 1e15, 1e30):
        grad = pattern * np.float32(magnitude)
        for leaf in jax.tree.leaves(both(grad, grad, np.abs(grad) / 2)):
            assert np.all(np.isfinite(leaf)), magnitude


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["momentum", "spread"])
def test_derivatives_are_right_at_tiny_gradients(name):
    # A feature that does not depend on the gradient's unit has a derivative proportional to 1 / unit.
    def jacobian(unit, dtype):
        grad = np.asarray([1.0, -2.0, 0.5], dtype) * dtype(unit)
        return np.float64(jax.jacrev(lambda g: apply(name, g, spread=jnp.abs(jnp.flip(grad))))(grad)) * unit

    np.testing.assert_allclose(jacobian(1e-30, np.float32), jacobian(1.0, np.float64), rtol=1e-4, atol=1e-5)


@given(hnp.arrays(np.float32, 5, elements=st.floats(-100, 100, width=32)), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_unit_rms(x, unit):
    x = np.where(np.abs(x) < 1e-3, 0, x)
    size = np.sqrt(np.mean(np.float64(x) ** 2))
    np.testing.assert_allclose(unit_rms(jnp.asarray(x * np.float32(unit))), x / (size or 1), rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_derivatives_of_unit_rms_and_safe_sqrt():
    check_grads(jax.jit(unit_rms), (jnp.asarray([0.3, -2.0, 2.0, 0.0]),), order=1, modes=["rev"])
    check_grads(jax.jit(safe_sqrt), (jnp.asarray([0.3, 2.0]),), order=1, modes=["rev"])
    assert (safe_sqrt(0.0), jax.grad(safe_sqrt)(0.0)) == (0, 0)
