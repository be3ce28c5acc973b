"""Training and accuracy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax.data import ImageSource, load_source
from lft_jax.victims import VictimConfig, apply_function, clean_accuracy, train_victim
from lft_jax.victims.training import _augmented, _programs

CONFIG = VictimConfig("halves", "small_cnn", epochs=2, batch_size=16, learning_rate=1e-2)


def halves(count, seed):
    """Two classes that differ in which half of the image is bright; a few steps suffice to learn them."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count).astype(np.int32)
    images = generator.integers(0, 100, (count, 8, 8, 1)).astype(np.uint8)
    images[labels == 0, :4] += 100
    images[labels == 1, 4:] += 100
    return ImageSource("halves", images, labels, 2)


@pytest.fixture(scope="module")
def trained():
    return train_victim(CONFIG, halves(200, 0), halves(50, 1))


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_an_easy_source_is_learned(trained):
    variables, history = trained
    assert [record.epoch for record in history] == [1, 2]
    assert history[-1].loss < history[0].loss
    assert history[-1].accuracy == 1
    images = halves(20, 2).images / np.float32(255)
    answers = jnp.argmax(apply_function("small_cnn", 2)(variables, jnp.asarray(images)), -1)
    np.testing.assert_array_equal(answers, halves(20, 2).labels)


def test_victims_depend_on_the_configuration_and_the_seed_alone(trained):
    seen = []
    again, history = train_victim(CONFIG, halves(200, 0), halves(50, 1), on_epoch=seen.append)
    assert equal(again, trained[0])
    assert tuple(seen) == history == trained[1]
    other, _ = train_victim(dataclasses.replace(CONFIG, seed=1), halves(200, 0), halves(50, 1))
    assert not equal(other, trained[0])


def test_victims_that_differ_in_their_seed_share_a_compilation(trained):
    before = _programs.cache_info()
    _, epoch = _programs("small_cnn", 2, 2 * (200 // 16), 1e-2, "none")
    assert _programs.cache_info().misses == before.misses
    assert epoch._cache_size() == 1  # pyrefly: ignore[missing-attribute]


def test_batch_statistics_are_updated_with_augmentation():
    config = VictimConfig("halves", "vgg", epochs=1, batch_size=16, learning_rate=1e-2, augment="crop_flip")
    variables, history = train_victim(config, halves(48, 0), halves(20, 1))
    assert np.isfinite(history[0].loss)
    means = jax.tree.leaves(variables["batch_stats"])
    assert all(np.any(mean != 0) for mean in means)


def test_augmentation_moves_images_by_at_most_an_eighth():
    images = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (90, 8, 16, 1)), jnp.float32)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for flip in (False, True):
        moved = np.asarray(_augmented(images, jax.random.key(0), flip))
        kinds = set()
        for image, around in zip(moved, padded, strict=True):
            windows = {
                (i, j, mirrored): around[i : i + 8, j : j + 16][:, :: -1 if mirrored else 1]
                for i in range(3)
                for j in range(3)
                for mirrored in (False, True)
            }
            (kind,) = [kind for kind, window in windows.items() if np.array_equal(window, image)]
            kinds.add(kind)
        assert len({kind[:2] for kind in kinds}) == 9
        assert {kind[2] for kind in kinds} == ({False, True} if flip else {False})


@pytest.mark.parametrize("count", [1, 10, 11])
def test_clean_accuracy_does_not_depend_on_the_batch_size(count):
    images = np.random.default_rng(0).uniform(size=(11, 2, 2, 1)).astype(np.float32)
    labels = (images.mean((1, 2, 3)) > 0.5).astype(np.int64)
    labels[:3] = 1 - labels[:3]

    def logits_fn(x):
        mean = jnp.mean(x, (1, 2, 3))
        return jnp.stack([0.5 - mean, mean - 0.5], -1)

    assert clean_accuracy(logits_fn, images, labels, batch_size=count) == pytest.approx(8 / 11)
    assert clean_accuracy(logits_fn, np.full_like(images, 1, np.uint8) * 255, np.ones(11, int)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number above 0"),
        ({"augment": "crops"}, "augment: unknown name 'crops'. Did you mean 'crop'"),
        ({"architecture": "vg"}, "architecture: unknown name 'vg'"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train_victim(dataclasses.replace(CONFIG, **change), halves(20, 0), halves(20, 1))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["small_cnn", "lenet"])
def test_digits_accuracy(architecture):
    train, validation, test = (load_source("digits", split) for split in ("train", "validation", "test"))
    config = VictimConfig("digits", architecture, epochs=30, batch_size=64, learning_rate=3e-3)
    variables, _ = train_victim(config, train, validation)
    logits_fn = jax.tree_util.Partial(apply_function(architecture, 10), variables)
    assert clean_accuracy(logits_fn, test.images, test.labels) >= 0.97
