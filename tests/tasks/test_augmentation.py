"""Each change of the augmentation on its own, and the oracle on augmented images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lft_jax import Augmentation, oracles
from lft_jax.tasks.perturbation import AttackLoss, Constraint, perturb
from lft_jax.tasks.recipe import AttackRecipe, constrained_oracle

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(6, 10, 7, 2)).astype(np.float32)
WEIGHTS = RNG.normal(size=(140, 3)).astype(np.float32)


def only(**parts):
    return Augmentation(**{"shift": 0.0, "mix": 0.0, "noise": 0.0, **parts})


def shifts_of(image, reach):
    """All shifts of an image with a repeated border, by index arithmetic."""
    height, width = image.shape[:2]
    for down in range(-reach[0], reach[0] + 1):
        for right in range(-reach[1], reach[1] + 1):
            rows = np.clip(np.arange(height) + down, 0, height - 1)
            columns = np.clip(np.arange(width) + right, 0, width - 1)
            yield (down, right), image[rows[:, None], columns[None]]


def test_zero_strengths_change_nothing():
    np.testing.assert_array_equal(only()(IMAGES, jax.random.key(0)), IMAGES)


def test_each_image_is_shifted_on_its_own_and_every_shift_occurs():
    found = set()
    for seed in range(40):
        shifted = np.asarray(only(shift=0.2)(IMAGES, jax.random.key(seed)))
        of_images = []
        for image, result in zip(IMAGES, shifted, strict=True):
            (offset,) = [o for o, candidate in shifts_of(image, (2, 1)) if np.array_equal(candidate, result)]
            of_images.append(offset)
        found |= set(of_images)
        assert seed > 2 or len(set(of_images)) > 1
    assert found == {(down, right) for down in range(-2, 3) for right in range(-1, 2)}


def test_mixing_adds_a_permutation_of_the_batch():
    mixed = np.asarray(only(mix=0.25)(IMAGES, jax.random.key(0)))
    partners = [
        [j for j, other in enumerate(IMAGES) if np.allclose(result, 0.75 * image + 0.25 * other, atol=1e-6)]
        for image, result in zip(IMAGES, mixed, strict=True)
    ]
    assert sorted(np.ravel(partners)) == list(range(6))  # a permutation


def test_noise_is_uniform():
    grey = jnp.full((50, 10, 7, 2), 0.5)
    noise = np.asarray(only(noise=0.2)(grey, jax.random.key(0))) - 0.5
    assert np.abs(noise).max() <= 0.2 + 1e-6
    np.testing.assert_allclose(noise.var(), 0.4**2 / 12, rtol=0.05)
    np.testing.assert_allclose(noise.mean(), 0, atol=5e-3)


@given(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0, 1), st.integers(0, 2**31 - 1))
def test_changed_images_stay_in_range(shift, mix, noise, seed):
    changed = Augmentation(shift, mix, noise)(IMAGES[:, :3, :4], jax.random.key(seed))
    assert changed.shape == (6, 3, 4, 2)
    assert changed.dtype == jnp.float32
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtypes_are_kept(dtype, x64):
    assert Augmentation()(jnp.asarray(IMAGES, dtype), jax.random.key(0)).dtype == dtype


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"shift": 1.0}, r"augmentation: shift must be in \[0, 1\), got 1.0"),
        ({"mix": -0.1}, r"augmentation: mix must be in \[0, 1\), got -0.1"),
        ({"noise": float("nan")}, r"augmentation: noise must be in \[0, 1\], got nan"),
    ],
)
def test_fields_out_of_range_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        AttackRecipe(augmentation=Augmentation(**parts)).check()


def linear(images):
    return images.reshape(len(images), -1) @ WEIGHTS


def test_the_oracle_uses_changed_images_and_the_statistics_of_the_original_ones():
    loss, labels = AttackLoss("cross_entropy"), jnp.arange(6) % 3
    seen = []

    def attack(images):
        seen.append(images)
        return oracles.per_example_gradient(
            lambda thetas: loss(linear(perturb(images, thetas)), labels), num_examples=6
        )

    def draw(key, scale):
        assert scale == np.float32(0.1)
        return Augmentation()(IMAGES, key), 2

    theta, key = jnp.zeros(IMAGES.shape[1:]), jax.random.key(3)
    oracle = constrained_oracle(attack, Constraint("linf", 0.1), jnp.asarray(IMAGES), draw)
    estimate = oracle(theta, key)
    (images,) = seen
    assert not np.allclose(images, IMAGES)
    expected = jax.grad(lambda t: jnp.mean(loss(linear(perturb(images, t)), labels)))(theta)
    np.testing.assert_allclose(estimate.grads, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(estimate.extras["context"], [IMAGES.mean(0), IMAGES.std(0)], rtol=1e-5)
    assert int(estimate.queries) == 6 + 2
    oracle(theta, jax.random.key(4))
    assert not np.allclose(seen[1], images)
