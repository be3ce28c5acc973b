"""Data-free attacks, and the images that the history is measured on."""

import dataclasses
import pathlib

import jax
import numpy as np
import optax
import pytest

import lft_jax
from lft_jax import AttackRecipe, UniversalPerturbation, ZerothOrder, attack_success_rate, universal_perturbation
from lft_jax.attack import HISTORY_IMAGES
from lft_jax.data import load_source
from lft_jax.models import as_classifier
from lft_jax.victims import load_victim

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(16, 3)).astype(np.float32)
IMAGES = RNG.uniform(0.3, 0.7, size=(120, 4, 4, 1)).astype(np.float32)
LABELS = (IMAGES.reshape(120, -1) @ WEIGHTS).argmax(1)
OPTIMIZER = optax.chain(optax.scale_by_sign(), optax.scale(-0.02))
ORACLE = ZerothOrder(num_directions=1, smoothing=0.01, per_example=True)
VICTIM = pathlib.Path(__file__).parents[2] / "victims" / "digits_small_cnn_1000"


class Recording:
    """A NumPy model that keeps the images it is asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, images):
        self.calls.append(np.array(images))
        return images.reshape(len(images), -1) @ WEIGHTS


def run(model, images=IMAGES, labels=LABELS, **options):
    options = {"epsilon": 0.1, "steps": 3, "optimizer": OPTIMIZER, "progress": False, **options}
    options.setdefault("recipe", AttackRecipe(augmentation=None, batch=10))
    return universal_perturbation(model, images, labels, **options)


def rows_of(images, theta):
    """The numbers of the images that a perturbation was added to."""
    distance = np.abs((images - theta)[:, None] - IMAGES[None]).max((2, 3, 4))
    assert distance.min(1).max() < 1e-6
    return distance.argmin(1).tolist()


def shown(model, thetas):
    """The rows of the history, by step: those of the last call of each."""
    calls = [call for call in model.calls[1:] if len(call) == HISTORY_IMAGES]
    return [rows_of(call, theta) for call, theta in zip(calls, thetas, strict=True)]


def test_the_history_of_many_images_is_measured_on_the_same_few():
    model, thetas = Recording(), [run(Recording(), oracle=ORACLE, steps=k).perturbation for k in (1, 2, 3)]
    result = run(model, oracle=ORACLE)
    first, *others = shown(model, thetas)
    assert len(set(first)) == HISTORY_IMAGES == 50 and all(rows == first for rows in others)
    expected = [
        attack_success_rate(lambda x: x.reshape(len(x), -1) @ WEIGHTS, IMAGES[first], LABELS[first], t) for t in thetas
    ]
    np.testing.assert_allclose(result.history["asr"], expected, rtol=1e-6)
    np.testing.assert_array_equal(result.history["queries"], 120 + (2 * 10 + 50) * np.arange(1, 4))
    assert result.queries == sum(map(len, model.calls))
    other = Recording()
    last = run(other, oracle=ORACLE, key=jax.random.key(1)).perturbation
    assert set(rows_of(other.calls[-1], last)) != set(first)


def test_both_oracles_show_the_same_images():
    """With a step of size 0 the history is that of the clean images."""
    still = {"optimizer": optax.sgd(0.0), "labels": np.where(RNG.uniform(size=120) < 0.7, LABELS, 2 - LABELS)}
    gradient = run(lambda x: x.reshape(len(x), -1) @ WEIGHTS, **still).history
    query = run(Recording(), oracle=ORACLE, **still).history
    assert 0 < gradient["clean_accuracy"][0] < 1
    for name in ("clean_accuracy", "loss", "margin"):
        np.testing.assert_allclose(gradient[name], query[name], rtol=1e-5)


def test_a_data_free_attack_makes_its_images_from_the_key():
    models = [Recording(), Recording(), Recording()]
    keys = [jax.random.key(0), jax.random.key(0), jax.random.key(1)]
    results = [
        run(model, None, None, shape=(4, 4, 1), oracle=ORACLE, key=key) for model, key in zip(models, keys, strict=True)
    ]
    first, again, other = (model.calls[0] for model in models)
    assert first.shape[1:] == (4, 4, 1) and first.min() >= 0 and first.max() <= 1
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(results[0].perturbation, results[1].perturbation)
    assert results[0].queries == sum(map(len, models[0].calls))


@pytest.mark.parametrize("optimizer", ["uap-linf", OPTIMIZER])
def test_a_data_free_attack_is_stronger_on_real_images_than_noise(optimizer):
    victim, data = load_victim(VICTIM).logits_fn, load_source("digits", "test")
    shape = data.images.shape[1:]
    options = {"epsilon": 0.25, "steps": 10, "optimizer": optimizer, "progress": False}
    found = universal_perturbation(victim, None, shape=shape, **options).perturbation
    signs = np.random.default_rng(0).choice([-0.25, 0.25], (5, *shape)).astype(np.float32)
    noise = np.mean([attack_success_rate(victim, data.images, data.labels, theta) for theta in signs])
    assert attack_success_rate(victim, data.images, data.labels, found) > noise + 0.1


def test_the_result_says_that_its_images_were_synthetic(tmp_path):
    model = dataclasses.replace(as_classifier(lambda x: x.reshape(len(x), -1) @ WEIGHTS), input_shape=(4, 4, 1))
    result = run(model, None, None)
    assert result.synthetic and not result.labelled and "on synthetic images: fooling rate" in str(result)
    np.testing.assert_allclose(result.history["asr"], result.history["fooling_rate"], rtol=1e-6)
    result.save(tmp_path / "uap.npz")
    loaded = UniversalPerturbation.load(tmp_path / "uap.npz")
    assert loaded.synthetic and str(loaded) == str(result)
    given = run(model)
    assert not given.synthetic and "on the given images: clean accuracy" in str(given)


def test_a_data_free_attack_goes_on_where_it_stopped():
    model = dataclasses.replace(as_classifier(lambda x: x.reshape(len(x), -1) @ WEIGHTS), input_shape=(4, 4, 1))
    whole, part = run(model, None, None), run(model, None, None, callback=lambda entry: entry["step"] == 2)
    rest = run(model, None, None, start=part)
    np.testing.assert_array_equal(rest.perturbation, whole.perturbation)
    np.testing.assert_allclose(rest.history["loss"], whole.history["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": LABELS}, "labels must be None where images is None"),
        ({}, r"shape must be \(H, W, C\), .* the input_shape of the model is None; got None"),
        ({"shape": (4, 4)}, r"shape must be \(H, W, C\), whole numbers of at least 1, got \(4, 4\)"),
        ({"shape": (4, 0, 1)}, r"shape must be \(H, W, C\), whole numbers of at least 1, got \(4, 0, 1\)"),
        ({"shape": (4, 4.0, 1)}, r"shape must be \(H, W, C\), whole numbers of at least 1"),
        ({"images": IMAGES, "shape": (4, 4, 1)}, r"shape must be None where there are images"),
    ],
)
def test_bad_input_without_images_is_refused(options, message):
    options = {"images": None, "labels": None, "epsilon": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        universal_perturbation(lambda x: x.reshape(len(x), -1) @ WEIGHTS, **options)


def test_the_shape_of_the_model_may_be_known_in_part():
    model = as_classifier(lambda x: x.mean((1, 2)))
    known = dataclasses.replace(model, input_shape=(None, None, 3))
    with pytest.raises(ValueError, match=r"the input_shape of the model is \(None, None, 3\)"):
        universal_perturbation(known, None, epsilon=0.1)
    with pytest.raises(ValueError, match=r"images must be \[N, H, W, 3\] for this model"):
        universal_perturbation(known, None, shape=(4, 4, 1), epsilon=0.1)
    found = lft_jax.universal_perturbation(known, None, shape=(4, 5, 3), epsilon=0.1, steps=1, progress=False)
    assert found.perturbation.shape == (4, 5, 3)
