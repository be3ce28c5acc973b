"""`attack_success_rate` and `fooling_rate`, on a linear model of 4x4 images."""

import math

import numpy as np
import pytest

from lft_jax import UniversalPerturbation, attack_success_rate, fooling_rate, universal_perturbation
from lft_jax.tasks.perturbation import Constraint

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(16, 3)).astype(np.float32)
IMAGES = RNG.uniform(0.2, 0.8, size=(6, 4, 4, 1)).astype(np.float32)
LABELS = (IMAGES.reshape(6, -1) @ WEIGHTS).argmax(1)


def linear(images):
    return images.reshape(len(images), -1) @ WEIGHTS


@pytest.mark.parametrize("batch_size", [4, 256])
@pytest.mark.parametrize("target", [None, 2])
def test_the_success_rate_counts_images_classified_correctly_when_clean(batch_size, target):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, size=(30, 4, 4, 1)).astype(np.uint8)
    labels, theta = np.arange(30) % 3, rng.uniform(-0.4, 0.4, size=(4, 4, 1))
    clean = linear(images / 255).argmax(1)
    fooled = linear(np.clip(images / 255 + theta, 0, 1)).argmax(1)
    counted = (clean == labels) & (labels != target)
    success = fooled != labels if target is None else fooled == target
    assert 0 < np.sum(success & counted) < counted.sum() < np.sum(clean == labels) + (target is None) < 30
    found = attack_success_rate(linear, images, labels, theta, target=target, batch_size=batch_size)
    assert type(found) is float
    np.testing.assert_allclose(found, np.sum(success & counted) / counted.sum())


def test_the_success_rate_is_nan_if_no_image_is_classified_correctly():
    wrong = (LABELS + 1) % 3
    with pytest.warns(UserWarning, match="classifies only 0 of 6 clean images .* Usual causes: mean, std"):
        assert math.isnan(attack_success_rate(linear, IMAGES, wrong, np.zeros((4, 4, 1))))


def test_what_is_no_perturbation_is_refused():
    result = UniversalPerturbation(np.full((4, 4, 1), 0.1), {}, Constraint("linf", 0.1))
    with pytest.raises(TypeError, match=r"pass that of the result, result\.perturbation"):
        attack_success_rate(linear, IMAGES, LABELS, result)
    with pytest.raises(TypeError, match="perturbation must be floating-point, in units of the image range, got uint8"):
        fooling_rate(linear, IMAGES, result.to_uint8())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((IMAGES, LABELS, np.zeros((4, 4))), {}, r"perturbation must be \(4, 4, 1\), got \(4, 4\)"),
        ((2 * IMAGES, LABELS, IMAGES[0]), {}, "images must lie"),
        ((IMAGES, LABELS[:2], IMAGES[0]), {}, "labels must be"),
        ((IMAGES, LABELS, IMAGES[0]), {"target": 5}, "target: 5 is not one of the victim's 3 classes"),
        ((IMAGES, LABELS + 1, IMAGES[0]), {}, r"labels must be within \[0, 3\), got values from . to 3"),
        ((IMAGES, LABELS, IMAGES[0]), {"batch_size": -5}, "batch_size must be at least 1, got -5"),
        ((IMAGES, LABELS, np.nan * IMAGES[0]), {}, "perturbation must be finite"),
    ],
)
def test_bad_input_of_the_success_rate_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        attack_success_rate(linear, *arguments, **options)


def test_the_fooling_rate_counts_changed_predictions():
    theta = RNG.uniform(-0.4, 0.4, size=(4, 4, 1)).astype(np.float32)
    changed = linear(np.clip(IMAGES + theta, 0, 1)).argmax(1) != LABELS
    assert changed.mean() > 0
    np.testing.assert_allclose(fooling_rate(linear, IMAGES, theta), changed.mean())
    np.testing.assert_allclose(fooling_rate(linear, (255 * IMAGES).astype(np.uint8), 0 * theta), 0)


def test_nan_is_never_fooled():
    """The perturbed logits of image 0 are NaN; the others are fooled."""

    def model(images):
        logits = np.stack([np.full(len(images), 0.5), images.mean((1, 2, 3))], 1)
        return np.where((images[:, 0, 0, 0] > 0.95)[:, None], np.nan, logits)

    images = np.full((4, 4, 4, 1), 0.25, np.float32)
    images[0, 0, 0, 0] = 0.5
    theta = np.full((4, 4, 1), 0.5, np.float32)
    for rate in (
        lambda: attack_success_rate(model, images, np.zeros(4, int), theta),
        lambda: fooling_rate(model, images, theta),
    ):
        with pytest.warns(UserWarning, match="NaN for 1 of 4 images, which count as not fooled"):
            assert rate() == 0.75


def test_a_jax_model_of_one_batch_size_is_attacked_by_gradients():
    def fixed(images):
        assert len(images) == 4
        return linear(images)

    result = universal_perturbation(fixed, IMAGES[:6], epsilon=0.1, steps=1, batch_size=4, progress=False)
    assert result.oracle == "gradient"


def test_a_remainder_is_padded_for_a_model_of_one_batch_size():
    sizes = []

    def fixed(images):
        sizes.append(len(images))
        return linear(images)

    expected = attack_success_rate(linear, IMAGES, LABELS, IMAGES[0] - 0.5)
    assert attack_success_rate(fixed, IMAGES, LABELS, IMAGES[0] - 0.5, batch_size=4) == expected
    assert set(sizes) == {4}
