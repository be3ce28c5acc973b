import jax
import numpy as np
import pytest
from scipy import stats

from lft_jax.attack import attack_success_rate
from lft_jax.auditing._findings import spectrum
from lft_jax.auditing._statistics import collapse, rate, success, wilson


@pytest.mark.parametrize(("hits", "images"), [(0, 7), (7, 7), (3, 11), (88, 104), (1, 1)])
def test_the_interval_is_that_of_scipy(hits, images):
    expected = stats.binomtest(hits, images).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson(hits, images), (expected.low, expected.high), atol=1e-9)


def test_without_images_nothing_is_known():
    assert wilson(0, 0) == (0, 1)
    found = rate(np.zeros(0, bool)).as_dict()
    assert found == {"hits": 0, "images": 0, "rate": None, "low": 0, "high": 1}


def test_the_interval_covers_the_true_rate_as_often_as_it_says():
    images, p = 100, 0.3
    chances = stats.binom.pmf(np.arange(images + 1), images, p)
    covered = [low <= p <= high for low, high in (wilson(hits, images) for hits in range(images + 1))]
    assert 0.93 < np.sum(chances * covered) < 0.97


def test_success_is_that_of_attack_success_rate():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(8, 4)).astype(np.float32)
    images = rng.uniform(0.2, 0.8, (60, 2, 2, 2)).astype(np.float32)
    theta = rng.uniform(-0.2, 0.2, (2, 2, 2)).astype(np.float32)

    def model(x):
        return np.reshape(x, (len(x), -1)) @ weights

    clean, after = model(images).argmax(-1), model(images + theta).argmax(-1)
    labels = np.where(rng.uniform(size=60) < 0.7, clean, rng.integers(0, 4, 60))
    for target in (None, 2):
        expected = attack_success_rate(model, images, labels, theta, target=target)
        assert success(clean, after, labels, target).rate == pytest.approx(expected)
    matrix = collapse(clean, after, labels, 4)
    for i in range(4):
        for j in range(4):
            rows = [k for k in range(60) if clean[k] == labels[k] == i and after[k] == j]
            assert matrix[i, j] == len(rows)


def test_the_spectrum_of_a_plane_wave_has_its_period():
    rows, columns = np.mgrid[:32, :32]
    wave = np.cos(2 * np.pi * (3 * rows + 4 * columns) / 32)[..., None] * np.ones(3)
    magnitudes, found = spectrum(wave)
    assert magnitudes.shape == (32, 32)
    assert found["period"] == pytest.approx(32 / 5) and found["share"] == pytest.approx(1)
    peaks = {tuple(place) for place in np.argwhere(magnitudes > 1e-3 * magnitudes.max())}
    assert peaks == {(16 + 3, 16 + 4), (16 - 3, 16 - 4)}
    checks, found = spectrum(np.where((rows + columns) % 2, 1.0, -1.0)[..., None])  # its own mirror image
    assert found["share"] == pytest.approx(1) and checks[0, 0] == checks.max()
    _, found = spectrum(np.full((4, 4, 1), 0.5))
    assert found["constant_share"] == pytest.approx(1) and found["share"] == pytest.approx(0)
    assert spectrum(np.zeros((4, 4, 1)))[1]["share"] == 0


def test_confidences_are_those_of_softmax():
    from lft_jax.auditing._model import confidences

    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32) * 50
    np.testing.assert_allclose(confidences(logits), np.asarray(jax.nn.softmax(logits)).max(-1), rtol=1e-5)


def test_bounds_are_exact_where_nothing_or_everything_succeeds():
    assert all(wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in range(1, 1001))
