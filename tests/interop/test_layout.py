"""Images and perturbations of other libraries, and ours."""

import numpy as np
import pytest

from lft_jax.interop._layout import Layout

IMAGES = np.random.default_rng(0).uniform(0, 1, (2, 3, 4, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout("first", -1, 1), Layout("last", 0, 255), Layout("last", 0, 16, (3, 4, 3))]
)
def test_images_come_back_and_perturbations_are_differences_of_images(layout):
    x = layout.check().theirs(IMAGES)
    np.testing.assert_allclose(layout.ours(x), IMAGES, atol=1e-6)
    np.testing.assert_allclose(layout.theirs(IMAGES / 2) + layout.difference(IMAGES / 2), x, rtol=1e-5, atol=1e-6)
    assert x.min() >= layout.low and x.max() <= layout.high


def test_channels_first_and_flat_images_are_where_they_belong():
    assert Layout("first").theirs(IMAGES)[1, 2, 0, 3] == IMAGES[1, 0, 3, 2]
    assert Layout(image_shape=(3, 4, 3)).theirs(IMAGES)[1, 5] == IMAGES[1, 0, 1, 2]


def test_gradients_follow_from_the_chain_rule():
    layout, weights = Layout("first", -1, 1), np.random.default_rng(1).normal(size=(2, 3, 3, 4)).astype(np.float32)
    found = layout.gradient(weights)  # of the sum of weights * x
    difference = np.zeros_like(IMAGES)
    difference[1, 0, 3, 2] = 1e-3
    step = (weights * (layout.theirs(IMAGES + difference) - layout.theirs(IMAGES))).sum()
    np.testing.assert_allclose(found[1, 0, 3, 2], step / 1e-3, rtol=1e-3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="channels: unknown name 'middle'"):
        Layout("middle").check()
    with pytest.raises(ValueError, match=r"bounds must be two ascending numbers, got 1\.0 and 0\.0"):
        Layout(low=1.0, high=0.0).check()
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got shape \(2, 9\); pass image_shape=\(H, W, C\)"):
        Layout("first").ours(np.zeros((2, 9)))
    with pytest.raises(ValueError, match=r"x must be \[N, 36\], flat images, got shape \(2, 9\)"):
        Layout(image_shape=(3, 4, 3)).ours(np.zeros((2, 9)))


def test_images_beyond_black_and_white_are_refused():
    images = np.full((2, 3, 4, 1), 200, np.float32)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\], got values from 200 to 200"):
        Layout().ours(images)
    np.testing.assert_allclose(Layout("last", 0.0, 255.0).ours(images), images / 255)
    with pytest.raises(ValueError, match="got values from nan"):
        Layout().ours(np.full((1, 2, 2, 1), np.nan))
