"""Drawing rows from a class table, and resizing images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lft_jax.data import TaskSize, class_table, draw_rows, resized


@given(st.integers(0, 1000), st.lists(st.integers(0, 6), min_size=7, max_size=7), st.integers(1, 2))
def test_rows_are_distinct_and_of_classes_with_enough_images(seed, counts, shots):
    labels = np.repeat(np.arange(8), [*counts, 6])
    table, sizes = class_table(labels, 8)
    size = TaskSize(min(3, int(np.sum(sizes >= 3))), shots, 3 - shots)
    parts = draw_rows(jax.random.key(seed), jnp.asarray(table), jnp.asarray(sizes), size)
    assert [part.shape for part in parts] == [(size.ways, size.shots), (size.ways, size.query_shots)]
    rows = np.concatenate(parts, axis=1)
    assert len(set(rows.ravel())) == rows.size
    found = labels[rows]
    assert np.all(found == found[:, :1])
    assert np.all(sizes[found[:, 0]] >= 3)


def test_downscaling_is_an_antialiased_bilinear_filter():
    images = np.random.default_rng(0).integers(0, 256, (1003, 6, 6, 2), np.uint8)
    small = resized(images, 3)
    assert small.shape == (1003, 3, 3, 2) and small.dtype == np.uint8
    # The triangle filter of antialiased bilinear resizing: at a factor of 2 its coefficients are 1/8, 3/8, 3/8, 1/8.
    along = np.asarray([[3, 3, 1, 0, 0, 0], [0, 1, 3, 3, 1, 0], [0, 0, 0, 1, 3, 3]], float)
    along /= along.sum(1, keepdims=True)
    expected = np.einsum("ph,qw,nhwc->npqc", along, along, images.astype(float))
    np.testing.assert_allclose(small, expected, atol=0.51)
    half = resized(images[:2].astype(np.float32) / 255, 3)
    np.testing.assert_allclose(half, expected[:2] / 255, atol=1e-5)
    assert half.dtype == np.float32 and half.max() <= 1


def test_images_of_the_requested_size_are_returned():
    images = np.zeros((2, 5, 5, 1), np.uint8)
    assert resized(images, 5) is images
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        resized(images, 0)


@pytest.mark.parametrize("size", [(0, 1, 1), (2, 0, 1), (2, 1, 0)])
def test_sizes_below_one_are_refused(size):
    with pytest.raises(ValueError, match=r"(ways|shots|query_shots) must be at least 1, got 0"):
        TaskSize(*size)
