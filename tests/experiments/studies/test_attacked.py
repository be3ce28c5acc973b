"""What the studies of public models attack: stored victims and their images."""

import numpy as np
import pytest

from experiments.studies import attacked
from lft_jax.data import load_source
from lft_jax.victims import load_victim


def test_a_stored_victim_has_halves_of_its_source():
    found = attacked.victim("digits_small_cnn_1000")
    source = load_source("digits", "test")
    joined = np.concatenate([found.images.query, found.images.support])
    np.testing.assert_array_equal(joined, source.images)
    assert found.about["role"] == "test" and found.about["epsilon"] == 0.25
    assert (found.about["queries"], found.about["support"]) == (len(found.images.query), len(found.images.support))
    logits = load_victim(attacked.FOLDER / "digits_small_cnn_1000").logits_fn(found.images.query / np.float32(255))
    np.testing.assert_array_equal(found.clean, np.argmax(logits, -1))


def test_settings_of_a_stored_victim_are_chosen_on_validation_images():
    found = attacked.victim("digits_small_cnn_1000", split="choosing")
    joined = np.concatenate([found.images.query, found.images.support])
    np.testing.assert_array_equal(joined, load_source("digits", "validation").images)
    assert (found.about["split"], found.about["role"]) == ("validation", "test")


def test_fewer_queries_leave_the_support_images():
    whole, few = (attacked.victim("digits_lenet_1001", queries=count) for count in (0, 20))
    np.testing.assert_array_equal(few.images.query, whole.images.query[:20])
    np.testing.assert_array_equal(few.images.support, whole.images.support)


def test_unknown_victims_and_splits_are_refused():
    with pytest.raises(ValueError, match=r"model: unknown name 'resnet23'\. Did you mean 'resnet32'"):
        attacked.victim("resnet23")
    with pytest.raises(ValueError, match="split: unknown name 'test'"):
        attacked.victim("digits_lenet_1001", split="test")
    with pytest.raises(ValueError, match="queries must be at least 0"):
        attacked.victim("digits_lenet_1001", queries=-1)
