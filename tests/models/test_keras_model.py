"""`from_keras` against Keras itself, on several backends, and on public models; run by `make test-frameworks`.

Keras has one backend in a process, which `KERAS_BACKEND` chooses: the last test runs this file on the others.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lft_jax
from lft_jax.data import load_source
from lft_jax.models import from_keras

BACKEND = os.environ.setdefault("KERAS_BACKEND", "jax")
#: The other ones. TensorFlow is 1.6 GB, so `make test-frameworks` does not install it.
BACKENDS = ["torch", *(["tensorflow"] if importlib.util.find_spec("tensorflow") else [])]
pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.standard_promotion,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of fit on torch
]
SHARED = Path(os.environ.get("LFT_SHARED_DIR", ""))
on_public_models = pytest.mark.skipif("LFT_SHARED_DIR" not in os.environ, reason="LFT_SHARED_DIR is not set")


@pytest.fixture(autouse=True)
def _broadcasting():
    """Layers of Keras rely on it."""
    with jax.numpy_rank_promotion("allow"):
        yield


def images(count=6, channels=3):
    return np.random.default_rng(0).uniform(size=(count, 8, 8, channels)).astype(np.float32)


def small(activation=None, **options):
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    head = layers.Flatten(), layers.Dense(5, activation=activation)
    body = layers.Conv2D(4, 3, activation="relu"), layers.BatchNormalization(), layers.Dropout(0.5)
    model = keras.Sequential([keras.Input((8, 8, 3), **options), *body, *head])
    rng = np.random.default_rng(1)
    model.set_weights([np.abs(w + 0.1 * rng.normal(size=w.shape)).astype(np.float32) for w in model.get_weights()])
    return model


def own_logits(model, x):
    import keras

    return keras.ops.convert_to_numpy(model(x, training=False))


def own_gradient(model, x, cotangent):
    """The gradient of the product of the logits with a cotangent, on the backend of Keras."""
    if BACKEND == "torch":
        torch = importlib.import_module("torch")
        inputs = torch.from_numpy(x).requires_grad_(True)
        (found,) = torch.autograd.grad(model(inputs, training=False), inputs, torch.from_numpy(cotangent))
    elif BACKEND == "tensorflow":
        tensorflow = importlib.import_module("tensorflow")
        inputs = tensorflow.constant(x)
        with tensorflow.GradientTape() as tape:
            tape.watch(inputs)
            logits = model(inputs, training=False)
        found = tape.gradient(logits, inputs, cotangent)
    else:
        (found,) = jax.vjp(lambda z: model(z, training=False), jnp.asarray(x))[1](jnp.asarray(cotangent))
    return np.asarray(found)


@pytest.mark.parametrize("jitted", [False, True])
def test_logits_and_gradients_are_those_of_keras(jitted):
    keras_model, x = small(), images()
    cotangent = np.random.default_rng(2).normal(size=(6, 5)).astype(np.float32)
    mean, std = np.float32([10, 20, 30]), np.float32([255, 250, 245])
    prepared = (x * 255 - mean) / std
    expected, gradient = own_logits(keras_model, prepared), own_gradient(keras_model, prepared, cotangent)
    model = from_keras(keras_model, mean=mean, std=std, input_range=(0, 255))
    assert (model.num_classes, model.input_shape, model.differentiable) == (5, (8, 8, 3), True)

    def scored(z):
        logits = model(z)
        return jnp.sum(logits * cotangent), logits

    compute = jax.grad(scored, has_aux=True)
    found, logits = (jax.jit(compute) if jitted else compute)(jnp.asarray(x))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, gradient * (255 / std), rtol=1e-4, atol=1e-4)


def test_channels_may_come_first_and_one_column_is_two_classes():
    import keras

    model = keras.Sequential([keras.Input((3, 8, 8)), keras.layers.Flatten(), keras.layers.Dense(1)])
    found = from_keras(model, channels="first")
    assert (found.num_classes, found.input_shape) == (2, (8, 8, 3))
    expected = own_logits(model, images().transpose(0, 3, 1, 2))
    np.testing.assert_allclose(found(images()), np.concatenate([0 * expected, expected], 1), rtol=1e-4, atol=1e-5)


def test_images_without_an_axis_of_channels_get_one():
    import keras

    model = keras.Sequential([keras.Input((8, 8)), keras.layers.Flatten(), keras.layers.Dense(3)])
    found = from_keras(model)
    assert found.input_shape == (8, 8, 1)
    np.testing.assert_allclose(found(images(channels=1)), own_logits(model, images(channels=1)[..., 0]), rtol=1e-4)


def test_a_fixed_number_of_images_is_kept():
    import keras

    layers = keras.layers.Conv2D(4, 3), keras.layers.Reshape((144,)), keras.layers.Dense(5)
    model = keras.Sequential([keras.Input((8, 8, 3), batch_size=4), *layers])
    found = from_keras(model)
    expected = np.concatenate([own_logits(model, part) for part in (images(8)[:4], images(8)[4:])])
    for count in (1, 4, 7):
        np.testing.assert_allclose(found(images(8)[:count]), expected[:count], rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda z: jnp.sum(found(z) ** 2))(jnp.asarray(images(8)[:3]))
    padded = np.concatenate([images(8)[:3], images(8)[2:3]])
    cotangent = np.concatenate([2 * expected[:3], np.zeros((1, 5), np.float32)])
    np.testing.assert_allclose(gradient, own_gradient(model, padded, cotangent)[:3], rtol=1e-3, atol=1e-4)


def test_weights_that_are_changed_in_place_are_the_ones_used():
    keras_model, x = small(), images()
    model = from_keras(keras_model)
    calls = jax.jit(lambda model, images: model(images))
    if BACKEND == "jax":
        calls(model.refresh(), x)
    before = np.asarray(model(x))
    keras_model.compile("sgd", "mse")
    keras_model.fit(x, np.zeros((6, 5), np.float32), verbose=0)  # on JAX, it gives the old weights' memory away
    np.testing.assert_allclose(model(x), own_logits(keras_model, x), rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(model(x)) - before).max() > 1e-2
    if BACKEND == "jax":
        np.testing.assert_allclose(calls(model.refresh(), x), model(x), rtol=1e-4, atol=1e-4)
        assert calls._cache_size() == 1  # not compiled again for them


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probabilities_that_are_taken_for_logits_are_noticed(activation):
    import keras

    nested = keras.Sequential([keras.Input((8, 8, 3)), small(activation)])
    for model in (small(activation), nested):
        with pytest.warns(UserWarning, match=rf"last layer of the model is a {activation}: output='probabilities'"):
            from_keras(model)
        found = from_keras(model, output="probabilities")(images())
        np.testing.assert_allclose(jnp.exp(found), own_logits(model, images()), rtol=1e-4, atol=1e-6)
    with pytest.warns(UserWarning, match="last layer of the model is a softmax"):
        from_keras(keras.Sequential([small(), keras.layers.Softmax()]))


def test_an_output_is_found_by_its_key_and_half_precision_becomes_single():
    import keras

    given = keras.Input((8, 8, 3))
    mean = keras.layers.GlobalAveragePooling2D(dtype="float16")(given)
    model = keras.Model(given, {"scores": mean, "features": keras.layers.Flatten()(given)})
    found = from_keras(model, output="scores")(images())
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, images().mean((1, 2)), rtol=1e-2)
    with pytest.raises(ValueError, match=r"output: the model returns a dict of \['features', 'scores'\]"):
        from_keras(model)(images())


def test_a_file_is_loaded(tmp_path):
    model = small()
    model.save(tmp_path / "model.keras")
    for path in (tmp_path / "model.keras", str(tmp_path / "model.keras")):
        np.testing.assert_allclose(from_keras(path)(images()), own_logits(model, images()), rtol=1e-4, atol=1e-4)


def test_what_is_no_model_of_images_is_refused(tmp_path):
    import keras
    from keras import layers

    with pytest.raises(TypeError, match=r"model must be a keras.Model of Keras 3 or the path .*, got Dense of keras"):
        from_keras(layers.Dense(3))
    with pytest.raises(FileNotFoundError, match=r"model: there is no file 'absent.keras'"):
        from_keras("absent.keras")
    with pytest.raises(ValueError, match=r"model must be built, got 'unbuilt' without weights; call it once on images"):
        from_keras(keras.Sequential([layers.Dense(3)], name="unbuilt"))
    with pytest.raises(ValueError, match=r"model must take images with 4 axes, got an input of shape \(None, 64\)"):
        from_keras(keras.Sequential([keras.Input((64,)), layers.Dense(3)]))
    pair = [keras.Input((8, 8, 3)), keras.Input((2,))]
    with pytest.raises(ValueError, match=r"model must have one input, the images, got inputs of shape \[\(None, 8"):
        from_keras(keras.Model(pair, [layers.Flatten()(part) for part in pair]))
    with pytest.raises(ValueError, match=r"images must be \[N, 8, 8, 3\] for this model, got \(2, 9, 9, 3\)"):
        from_keras(small())(np.zeros((2, 9, 9, 3), np.float32))
    unsafe = keras.Sequential([keras.Input((8, 8, 3)), layers.Lambda(lambda x: x[:, 0, 0])])
    unsafe.save(tmp_path / "unsafe.keras")
    with pytest.raises(ValueError, match="Lambda"):
        from_keras(tmp_path / "unsafe.keras")


@pytest.mark.parametrize(
    ("name", "source", "input_range", "accuracy", "epsilon", "rates"),
    [
        ("cifar10_mlperf_resnet8.h5", "cifar10", (0, 255), 0.8719, 8 / 255, (0.3, 0.9)),
        ("mnist_moonflower.keras", "mnist", (0, 1), 0.9918, 0.3, (0.2, 0.9)),
    ],
)
@on_public_models
def test_a_public_model_has_its_accuracy_and_is_attacked(name, source, input_range, accuracy, epsilon, rates):
    model = from_keras(SHARED / "models" / name, input_range=input_range, output="probabilities", batch_size=500)
    test = load_source(source, "test")
    found = np.argmax(np.asarray(model(test.images[:2000])), 1)
    assert abs(np.mean(found == test.labels[:2000]) - accuracy) < 5e-3
    few = 2000 + np.unique(test.labels[2000:], return_index=True)[1]
    result = lft_jax.universal_perturbation(
        model, test.images[few], test.labels[few], epsilon=epsilon, steps=10, oracle="gradient"
    )
    rate = lft_jax.attack_success_rate(model, test.images[:1000], test.labels[:1000], result.perturbation)
    print(f"{name} on {BACKEND}: {np.mean(found == test.labels[:2000])}, ASR {rate}")
    assert rates[0] < rate < rates[1]


@on_public_models
def test_a_public_mobilenet_has_its_accuracy_and_is_attacked():
    from PIL import Image

    files = sorted((SHARED / "imagenet_sample").glob("*.jpg"))[::2]
    x = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    labels = np.asarray([int(file.stem) for file in files])
    model = from_keras(
        SHARED / "models" / "imagenet_mobilenet025.keras", input_range=(-1, 1), output="probabilities", batch_size=50
    )
    right = np.argmax(np.asarray(model(x)), 1) == labels
    few, others = np.flatnonzero(right)[:10], np.flatnonzero(right)[10:110]
    result = lft_jax.universal_perturbation(model, x[few], labels[few], epsilon=10 / 255, steps=5, oracle="gradient")
    rate = lft_jax.attack_success_rate(model, x[others], labels[others], result.perturbation, batch_size=50)
    print(f"mobilenet on {BACKEND}: {np.mean(right)}, ASR {rate}")
    assert abs(np.mean(right) - 0.563) < 5e-3  # of these 300 images; .572 of all 600
    assert 0.2 < rate < 0.9


@pytest.mark.skipif(BACKEND != "jax", reason="this is another backend")
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_of_this_on_another_backend(backend):
    command = [sys.executable, "-m", "pytest", "-m", "frameworks", "-k", "not mobilenet", __file__]
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.skipif(BACKEND != "jax", reason="run once")
def test_a_missing_backend_is_named():
    """Keras is set to TensorFlow by default; it is not imported again in this process."""
    absent = "import sys; sys.modules['tensorflow'] = None; "  # as if it were not installed
    program = absent + "from lft_jax.models import from_keras; from_keras('model.keras')"
    environment = os.environ | {"KERAS_BACKEND": "tensorflow"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "tensorflow is not installed: it is the backend of keras; set KERAS_BACKEND=jax before" in run.stderr
