"""The blocks of docs/interop.md on other libraries run, on a small module and what pages call by name."""

import re
from pathlib import Path

import numpy as np
import pytest

import lft_jax
from tests.interop.toys import module

PAGE = (Path(__file__).parents[2] / "docs" / "interop.md").read_text(encoding="utf-8")
# scipy's namespaces, as the packages import them
DEPRECATED = "ignore:Please import .* from the `scipy.ndimage` namespace:DeprecationWarning"
pytestmark = [pytest.mark.frameworks, pytest.mark.standard_promotion, pytest.mark.filterwarnings(DEPRECATED)]


def run(heading, names):
    """Runs the block below a heading; returns its names."""
    (block,) = re.findall(rf"^## {heading}\n.*?```text\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)[:1]
    names = {"lft_jax": lft_jax, "np": np, **names}
    exec(compile(block, heading, "exec"), names)
    return names


def tensors():
    torch = pytest.importorskip("torch")
    images = torch.from_numpy(np.random.default_rng(0).uniform(0.1, 0.9, (8, 3, 6, 5)).astype(np.float32))
    return images, module()(images).argmax(1)


def test_art():
    pytest.importorskip("art")
    x, y = (tensor.numpy() for tensor in tensors())
    import torch
    from art.estimators.classification import PyTorchClassifier

    loss = torch.nn.CrossEntropyLoss()
    classifier = PyTorchClassifier(module(), loss, (3, 6, 5), 4, clip_values=(0, 1), device_type="cpu")
    names = run("ART", {"classifier": classifier, "x_few": x[:4], "y_few": y[:4], "x_test": x, "y_test": y})
    assert names["attack"].noise.shape == (1, 3, 6, 5) and 0 <= names["accuracy"] <= 1


def test_foolbox():
    foolbox = pytest.importorskip("foolbox")
    images, labels = tensors()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    given = {"foolbox": foolbox, "module": module(), "images": images, "labels": labels, "mean": mean, "std": std}
    names = run("Foolbox", given)
    assert len(names["raw"]) == 2 and names["success"].shape == (2, 8)


def test_torchattacks():
    pytest.importorskip("torchattacks")
    images, labels = tensors()
    names = run("Torchattacks", {"module": module(), "images": images, "labels": labels})
    assert names["adv_images"].shape == images.shape
    assert 0 < float(abs(names["adv_images"] - images).max()) <= 8 / 255 + 1e-6
