"""Synthetic images: their spectra by NumPy, and what every size and number of channels has in common."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax.tasks import synthetic_images

KEY = jax.random.key(0)


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (9, 14, 4), (3, 2, 1), (1, 1, 3)])
def test_images_of_any_shape_differ_and_lie_in_the_range(shape):
    images = synthetic_images(KEY, 5, shape)
    assert images.shape == (5, *shape) and images.dtype == jnp.float32
    assert images.min() >= 0 and images.max() <= 1
    assert len(np.unique(np.asarray(images), axis=0)) == 5
    np.testing.assert_array_equal(images, synthetic_images(KEY, 5, shape))
    assert not np.array_equal(images, synthetic_images(jax.random.key(1), 5, shape))


def test_jit_and_vmap_change_nothing():
    images = synthetic_images(KEY, 3, (8, 8, 3))
    jitted = jax.jit(functools.partial(synthetic_images, number=3, shape=(8, 8, 3)))
    np.testing.assert_allclose(jitted(KEY), images, atol=1e-5)
    keys = jax.random.split(KEY, 2)
    both = jax.vmap(lambda key: synthetic_images(key, 3, (8, 8, 3)))(keys)
    np.testing.assert_allclose(both[1], synthetic_images(keys[1], 3, (8, 8, 3)), atol=1e-5)


def spectral_slopes(images):
    """The slope of the log of the amplitude over that of the frequency, of each image, by least squares."""
    side = images.shape[1]
    amplitude = np.abs(np.fft.fft2(np.asarray(images, np.float64), axes=(1, 2))).mean(-1)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    used = (frequency > 1.5 / side) & (frequency < 0.4)
    design = np.stack([np.log(frequency[used]), np.ones(used.sum())], 1)
    return np.linalg.lstsq(design, np.log(amplitude[:, used].T), rcond=None)[0][0]


def test_amplitudes_fall_with_the_frequency_as_in_photographs():
    """Those of white noise do not; of the images, some fall slowly and some quickly."""
    slopes = spectral_slopes(synthetic_images(KEY, 60, (64, 64, 3)))
    white = spectral_slopes(np.random.default_rng(0).uniform(size=(60, 64, 64, 3)))
    assert np.abs(white).max() < 0.1
    assert -2.2 < slopes.min() < -1.4 < -0.7 < slopes.max() < -0.2


def test_images_differ_in_color_brightness_and_contrast():
    images = np.asarray(synthetic_images(KEY, 100, (32, 32, 3)))
    means = images.mean((1, 2))
    assert means.std(0).min() > 0.1 and np.ptp(means, axis=1).mean() > 0.05
    contrasts = images.std((1, 2)).mean(-1)
    assert contrasts.max() > 2 * contrasts.min() > 0.05


@pytest.mark.parametrize(
    ("number", "shape", "message"),
    [
        (0, (8, 8, 3), "number must be at least 1, got 0"),
        (1, (8, 8), r"shape must be \(H, W, C\), whole numbers of at least 1, got \(8, 8\)"),
        (1, (8, 8, 0), r"shape must be \(H, W, C\), whole numbers of at least 1, got \(8, 8, 0\)"),
    ],
)
def test_bad_input_is_refused(number, shape, message):
    with pytest.raises(ValueError, match=message):
        synthetic_images(KEY, number, shape)
