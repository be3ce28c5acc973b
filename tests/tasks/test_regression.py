"""Sine tasks against NumPy, and fine-tuned by SGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lft_jax.evaluation.metrics import evaluate
from lft_jax.meta import learners
from lft_jax.tasks.regression import sine_family


def test_points_lie_on_one_curve_of_the_ranges():
    family = sine_family(shots=30, query_shots=20, amplitude=(0.5, 2.0), phase=(0.2, 0.4), x=(-1.0, 3.0))
    for seed in range(5):
        (x, y), (x_query, y_query) = family.sample(jax.random.key(seed))
        assert (x.shape, x_query.shape) == ((30,), (20,))
        assert np.all(np.abs(x - 1) <= 2)
        # y = a cos(phase) sin(x) - a sin(phase) cos(x), by least squares on the support.
        basis = np.stack([np.sin(x), -np.cos(x)], axis=1)
        (along, across), *_ = np.linalg.lstsq(basis, np.asarray(y), rcond=None)
        assert 0.5 <= np.hypot(along, across) <= 2
        assert 0.2 <= np.arctan2(across, along) <= 0.4
        np.testing.assert_allclose(along * np.sin(x_query) - across * np.cos(x_query), y_query, atol=1e-4)


def test_curves_have_frequencies_of_the_range():
    family = sine_family(shots=200, query_shots=1, frequency=(0.8, 1.2))
    found = []
    for seed in range(20):
        x, y = family.sample(jax.random.key(seed)).support
        tried = np.linspace(0.7, 1.3, 601)
        residuals = []
        for frequency in tried:
            basis = np.stack([np.sin(frequency * x), np.cos(frequency * x)], axis=1)
            residuals.append(np.linalg.lstsq(basis, np.asarray(y), rcond=None)[1][0])
        found.append(tried[np.argmin(residuals)])
    assert 0.799 <= min(found) < 0.9 and 1.1 < max(found) <= 1.201


def test_the_loss_is_that_of_the_network():
    family = sine_family(widths=(3, 2))
    theta = family.init(jax.random.key(0))
    assert [layer["weight"].shape for layer in theta] == [(1, 3), (3, 2), (2, 1)]
    theta = jax.tree.map(lambda x: x + 0.1, theta)
    x, y = np.asarray([0.5, -2.0, 1.0]), np.asarray([1.0, 0.0, -1.0])
    hidden = x[:, None]
    for number, layer in enumerate(theta):
        hidden = hidden @ np.asarray(layer["weight"]) + np.asarray(layer["bias"])
        hidden = np.maximum(hidden, 0) if number < 2 else hidden
    expected = np.mean((hidden[:, 0] - y) ** 2)
    data = (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    np.testing.assert_allclose(family.loss(theta, data), expected, rtol=1e-5)
    np.testing.assert_allclose(family.metrics(theta, data)["error"], expected, rtol=1e-5)


def test_weights_are_lecun_normal():
    weight = sine_family(widths=(200, 200)).init(jax.random.key(0))[1]["weight"]
    np.testing.assert_allclose(weight.var(), 1 / 200, rtol=4 * np.sqrt(2 / 200**2))


def test_descent_fits_the_support_points():
    family = sine_family(shots=10, query_shots=50)
    keys = jax.random.split(jax.random.key(1), 8)
    found = evaluate(
        learners.fixed("sgd", optax.sgd), {"learning_rate": 0.003}, family, keys, num_steps=300, at=(1, 300)
    )
    assert found["error"][:, 1].mean() < 0.8 * found["error"][:, 0].mean()
    np.testing.assert_array_equal(found["queries"][:, 1], 3000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": (1.0, 1.0)}, r"x must be two ascending numbers, got \(1.0, 1.0\)"),
        ({"frequency": (1.2, 0.8)}, r"frequency must be two ascending numbers, got \(1.2, 0.8\)"),
        ({"widths": (4, 0)}, "widths must be at least 1, got 0"),
        ({"shots": 0}, "shots must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sine_family(**options)
