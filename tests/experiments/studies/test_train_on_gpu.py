"""The program that trains victims on a GPU, with one tiny victim on a CPU, and its parts."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import _gpu_training, train_on_gpu, victims
from lft_jax.data import ImageSource
from lft_jax.victims import AUGMENTATIONS, load_victim, models


@pytest.fixture
def tiny(monkeypatch):
    """A source of dark and bright images, and one adversarial ResNet-14 that is trained on it for two epochs."""

    def load(name, split, data_dir=None):
        del split, data_dir
        labels = np.arange(256, dtype=np.int32) % 2
        images = np.random.default_rng(0).integers(0, 100, (256, 8, 8, 1)).astype(np.uint8)
        images[labels == 1] += 150
        return ImageSource(name, images, labels, 2)

    recipe = _gpu_training.Recipe(batch_size=32, epsilon=4 / 255, warmup=1)
    monkeypatch.setattr(train_on_gpu, "load_source", load)
    monkeypatch.setattr(train_on_gpu, "ADVERSARIAL", recipe)
    monkeypatch.setattr(train_on_gpu, "ROBUST", {("tiny", "resnet14"): (4 / 255, 100)})
    monkeypatch.setattr(victims, "MORE", {"tiny": (victims.Recipe("train", "resnet14", 0, 2, adversarial=True),)})


@pytest.mark.standard_promotion
def test_a_victim_is_trained_once(tiny, tmp_path, capsys, monkeypatch):
    conv = models.conv
    flags = train_on_gpu.Config(folder=str(tmp_path))
    train_on_gpu.train_missing(flags)
    assert models.conv is conv
    assert "tiny_resnet14_adversarial_0: test accuracy" in capsys.readouterr().out
    victim = load_victim(tmp_path / "tiny_resnet14_adversarial_0")
    expected = {
        "source": "tiny",
        "architecture": "resnet14",
        "seed": 0,
        "epochs": 2,
        "augment": "crop",
        "batch_size": 32,
    }
    assert expected.items() <= victim.card.items()
    assert victim.card["adversarial_training"]["epsilon"] == 0.015686
    assert {"command", "commit", "device", "seconds", "validation_accuracy"} <= victim.card.keys()
    assert victim.card["test_accuracy"] > 0.9
    robust = victim.card["robust_accuracy"]
    assert 0.5 < robust["accuracy"] <= 1 and robust["images"] == "the first 100 of test"
    monkeypatch.setattr(train_on_gpu, "train", lambda *_: pytest.fail("trained again"))
    train_on_gpu.train_missing(flags)
    monkeypatch.setattr(train_on_gpu, "train", lambda *_: None)
    train_on_gpu.train_missing(
        train_on_gpu.Config(folder=str(tmp_path / "none"), only=("tiny_resnet14_adversarial_0",))
    )
    assert "left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"only: unknown name 'tiny_resnet14_0'"):
        train_on_gpu.train_missing(train_on_gpu.Config(only=("tiny_resnet14_0",)))


def test_the_deadline_shortens_the_training(tiny, monkeypatch):
    now, rates_of = [0.0], []

    def program(state, images, labels, rows, rates, key):
        del images, labels, rows, key
        now[0] += 1  # second an epoch
        rates_of.append(rates)
        return state, 0.0

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(_gpu_training, "epoch_program", lambda *_: program)
    monkeypatch.setattr(train_on_gpu, "clean_accuracy", lambda *_: 0.5)
    monkeypatch.setattr(train_on_gpu, "ROBUST", {})
    data = dict.fromkeys(("train", "validation", "test"), train_on_gpu.load_source("tiny", "train"))
    victim = victims.Recipe("train", "resnet14", 0, 20)

    def epochs(seconds):
        rates_of.clear()
        trained = train_on_gpu.train(victim, "tiny", data, None if seconds is None else now[0] + seconds)
        assert trained is None or trained.card["epochs"] == len(rates_of)
        return trained and trained.card["epochs"]

    assert (epochs(None), epochs(100), epochs(14)) == (20, 20, 10)  # four seconds are left for what follows
    recipe = train_on_gpu.recipe_of("tiny", victim)
    np.testing.assert_array_equal(rates_of[-1], _gpu_training.learning_rates(recipe, 9, 10, 1))
    assert epochs(8) is None and len(rates_of) == 2  # a fifth of the epochs would fit


@pytest.mark.parametrize("augment", [*AUGMENTATIONS, "crop_flip_color_cutout"])
def test_augmented_images_are_images(augment):
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3)).astype(np.uint8)
    found = _gpu_training.augmented(jnp.asarray(images), jax.random.key(0), augment)
    assert (found.shape, found.dtype) == (images.shape, jnp.float32)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    if augment == "none":
        np.testing.assert_allclose(found, images.astype(np.float32) / 255, rtol=1e-6)
    else:
        assert not np.allclose(found, images.astype(np.float32) / 255)


def test_crops_are_pieces_of_the_padded_image():
    image = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1)
    found = _gpu_training.augmented(jnp.asarray(np.repeat(image, 100, 0)), jax.random.key(1), "crop")
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)))
    pieces = {padded[i : i + 8, j : j + 8].tobytes() for i in range(3) for j in range(3)}
    assert {np.round(255 * np.asarray(x)).astype(np.uint8).tobytes() for x in found} == pieces


def test_attacked_images_are_in_the_ball_and_worse():
    images, labels = jnp.full((4, 2, 2, 1), 0.5), jnp.array([0, 1, 0, 1])

    def logits_fn(x):  # class 1 for bright images
        mean = jnp.mean(x, (1, 2, 3))
        return jnp.stack([0.5 - mean, mean - 0.5], -1)

    found = _gpu_training.attacked(logits_fn, images, labels, jax.random.key(0), 0.1, 5, 0.05)
    sign = jnp.array([1.0, -1.0, 1.0, -1.0])[:, None, None, None]
    np.testing.assert_allclose(found - images, jnp.broadcast_to(0.1 * sign, images.shape), atol=1e-6)


def test_learning_rates_warm_up_and_decay_to_zero():
    recipe = _gpu_training.Recipe(learning_rate=2.0, warmup=2)
    rates = np.concatenate([_gpu_training.learning_rates(recipe, epoch, 10, 5) for epoch in range(10)])
    assert np.all(np.diff(rates[:10]) > 0) and np.all(np.diff(rates[10:]) < 0)
    np.testing.assert_allclose([rates[9], rates[10], rates[-1]], [1.9, 2.0, 0.0], atol=5e-3)
