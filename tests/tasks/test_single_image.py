"""Attacks on single images against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax import oracles
from lft_jax.tasks.perturbation import AttackLoss
from lft_jax.tasks.single_image import single_image_family

KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
IMAGES = RNG.random((6, 2, 3, 1)).astype(np.float32)
WEIGHTS = RNG.normal(size=(6, 4)).astype(np.float32)
LOGITS = IMAGES.reshape(6, 6) @ WEIGHTS


def victim(images):
    return images.reshape(-1, 6) @ WEIGHTS


def family(**options):
    return single_image_family(IMAGES, LOGITS.argmax(1), victim, **options)


def test_only_images_that_the_victim_gets_right_are_attacked():
    labels = LOGITS.argmax(1)
    labels[[1, 4]] = (labels[[1, 4]] + 1) % 4
    found = single_image_family(IMAGES, labels, victim)
    np.testing.assert_array_equal(found.images, IMAGES[[0, 2, 3, 5]])
    np.testing.assert_array_equal(found.labels, labels[[0, 2, 3, 5]])
    rows = [found.sample(key) for key in jax.random.split(KEY, 40)]
    for episode in rows:
        assert episode.support is episode.query and episode.support.images.shape == (1, 2, 3, 1)
    assert len({float(episode.support.images.sum()) for episode in rows}) == 4


def test_the_loss_is_the_published_one():
    """On log-probabilities, with the distance after clipping, computed by NumPy."""
    batch = family().sample(KEY).support
    for scale in (0.1, 1.0):
        theta = scale * RNG.normal(size=(2, 3, 1)).astype(np.float32)
        attacked = np.clip(np.asarray(batch.images) + theta, 0, 1)
        logits = (attacked.reshape(1, 6) @ WEIGHTS).astype(np.float64)[0]
        scores = logits - np.log(np.exp(logits).sum())
        label = int(batch.labels[0])
        hinge = max(scores[label] - np.delete(scores, label).max(), 0)
        distance = np.abs(attacked - np.asarray(batch.images)).sum()
        found = family(penalty=0.3)
        np.testing.assert_allclose(found.loss(jnp.asarray(theta), batch), hinge + 0.3 * distance, rtol=1e-5)
        metrics = found.metrics(jnp.asarray(theta), batch)
        np.testing.assert_allclose(metrics["loss"], hinge + 0.3 * distance, rtol=1e-5)
        np.testing.assert_allclose(metrics["l1"], distance, rtol=1e-5)
        assert bool(metrics["success"]) == (scores.argmax() != label)
        assert found.project(theta) is theta


def test_all_of_the_loss_is_estimated_from_queries():
    """With coordinate directions the estimate is the finite difference of the whole loss, with its penalty."""
    mu = 1e-2
    estimator = oracles.ZerothOrder(6, mu, directions="coordinate", antithetic=False)
    found = family(estimator=estimator)
    batch = found.sample(KEY).support
    theta = 0.1 * jax.random.normal(KEY, (2, 3, 1))
    answer = found.oracle(batch)(theta, KEY)
    for index in np.ndindex(2, 3, 1):
        slope = (found.loss(theta.at[index].add(mu), batch) - found.loss(theta, batch)) / mu
        np.testing.assert_allclose(answer.grads[index], slope, atol=1e-3)
    assert answer.queries == 7
    assert family().oracle(batch)(theta, KEY).queries == 21
    exact = dataclasses.replace(found, estimator=None).oracle(batch)(theta, KEY)
    np.testing.assert_allclose(exact.grads, jax.grad(found.loss)(theta, batch), rtol=1e-6)


def test_the_start_is_noise():
    blank = np.zeros((1, 40, 40, 1), np.uint8)
    start = single_image_family(blank, np.zeros(1, int), lambda x: x[:, 0, :2, 0]).init(KEY)
    assert start.dtype == jnp.float32
    np.testing.assert_allclose(start.std(), 1e-4, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": 0.0}, "penalty must be a finite number above 0"),
        ({"noise": -1.0}, "noise must be a finite number above 0"),
        ({"loss": AttackLoss("square")}, "loss: unknown name 'square'"),
        ({"loss": AttackLoss(target=4)}, "target: 4 is not one of the victim's 4 classes"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        family(**options)


def test_a_victim_that_is_always_wrong_is_refused():
    with pytest.raises(ValueError, match="classifies none of the 6 images correctly"):
        single_image_family(IMAGES, (LOGITS.argmax(1) + 1) % 4, victim)
