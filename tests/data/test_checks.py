"""Checks of images and labels, and the class table."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lft_jax.data import check_images_labels, class_table

IMAGES = np.full((3, 4, 4, 1), 0.5, np.float32)
LABELS = np.array([0, 2, 1])


def changed(index, value):
    images = IMAGES.copy()
    images[index] = value
    return images


@pytest.mark.parametrize(
    ("images", "labels", "num_classes", "message"),
    [
        (IMAGES[0], LABELS, None, r"images must be \[N, H, W, C\].*\(4, 4, 1\)"),
        (IMAGES[:0], LABELS[:0], None, "images must be .* no axis of length 0"),
        (IMAGES, LABELS[:2], None, r"labels must be .*\(3,\).*\(2,\)"),
        (IMAGES, LABELS[:, None], None, "labels must be"),
        (changed(0, 1.5), LABELS, None, r"images must lie in \[0, 1\].*1\.5"),
        (changed(0, -0.1), LABELS, None, r"images must lie in \[0, 1\].*-0\.1"),
        (changed((0, 0, 0, 0), np.nan), LABELS, None, r"images must lie in \[0, 1\].*nan"),
        (IMAGES.astype(np.int32), LABELS, None, "images must be uint8 or floating-point, got int32"),
        (IMAGES.astype(complex), LABELS, None, "images must be uint8 or floating-point, got complex128"),
        (IMAGES, LABELS.astype(np.float32), None, "labels must be integers, got float32"),
        (IMAGES, LABELS, 2, r"labels must be within \[0, 2\), got values from 0 to 2"),
        (IMAGES, LABELS - 1, None, "labels must be at least 0, got values from -1 to 1"),
    ],
)
def test_bad_images_and_labels_are_named(images, labels, num_classes, message):
    with pytest.raises(ValueError, match=message):
        check_images_labels(images, labels, num_classes)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.uint8])
def test_good_images_and_labels_pass(x64, dtype):
    images = np.ones((3, 4, 4, 1), dtype)
    check_images_labels(images, LABELS.astype(np.int32))
    check_images_labels(jnp.asarray(images), jnp.asarray(LABELS), 3)


@given(labels=st.lists(st.integers(0, 4), max_size=30), more=st.integers(0, 2))
def test_class_table_lists_the_positions_of_each_class(labels, more):
    table, counts = class_table(np.array(labels, np.int64), 5 + more)
    assert table.dtype == counts.dtype == np.int32
    assert table.shape == (5 + more, max(counts))
    for label, (row, count) in enumerate(zip(table, counts, strict=True)):
        np.testing.assert_array_equal(row[:count], [i for i, value in enumerate(labels) if value == label])
        assert not np.any(row[count:])


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_class_table_refuses_labels_out_of_range(labels):
    with pytest.raises(ValueError, match=r"labels must be within \[0, 3\)"):
        class_table(np.array(labels), 3)
