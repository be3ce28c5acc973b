"""Quadratic tasks against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax.tasks.quadratic import quadratic_family

CURVATURE = np.asarray([0.5, 1.0, 2.0])


@pytest.fixture
def family(x64):
    return quadratic_family(CURVATURE, center=2.0, noise=0.5, support=4, query=3)


def test_loss_gradient_and_spread(family):
    support, query = family.sample(jax.random.key(0))
    assert (support.shape, query.shape) == ((4, 3), (3, 3))
    theta = jnp.asarray([0.1, -0.4, 2.0])
    gradients = CURVATURE * (np.asarray(theta) - np.asarray(support))
    estimate = family.oracle(support)(theta, jax.random.key(1))
    np.testing.assert_allclose(estimate.value, np.mean(gradients**2 / CURVATURE, axis=0).sum() / 2)
    np.testing.assert_allclose(family.loss(theta, support), estimate.value)
    np.testing.assert_allclose(family.metrics(theta, support)["loss"], estimate.value)
    np.testing.assert_allclose(estimate.grads, gradients.mean(0))
    np.testing.assert_allclose(estimate.extras["spread"], gradients.std(0))
    assert estimate.queries == 4


def test_centers_and_examples_have_their_variances(family):
    episodes = jax.vmap(family.sample)(jax.random.split(jax.random.key(2), 4000))
    examples = np.concatenate(episodes, axis=1)
    # The sample variance of 4000 draws of variance v has standard deviation v sqrt(2 / 4000); four of them are allowed.
    np.testing.assert_allclose(examples.mean(1).var(0), 2.0**2 + 0.5**2 / 7, rtol=4 * np.sqrt(2 / 4000))
    np.testing.assert_allclose(examples.var(1, ddof=1).mean(0), 0.5**2, rtol=4 * np.sqrt(2 / 4000 / 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": [1.0, 0.0]}, "curvature must be a vector of numbers above 0"),
        ({"curvature": [[1.0]]}, "curvature must be a vector of numbers above 0"),
        ({"curvature": [1]}, "curvature must be a vector of numbers above 0"),
        ({"noise": -1.0}, "noise must be at least 0, got -1.0"),
        ({"query": 0}, "query must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    curvature = np.asarray(options.pop("curvature", [1.0]))
    curvature = curvature.astype(np.float32) if curvature.dtype == np.float64 else curvature.astype(np.int32)
    with pytest.raises(ValueError, match=message):
        quadratic_family(curvature, **options)
