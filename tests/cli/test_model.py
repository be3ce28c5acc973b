import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from lft_jax import models
from lft_jax.cli._model import load_model
from lft_jax.models import Classifier

SOURCE = """
import lft_jax.models

def load():
    return lambda images: images.mean((1, 2))

def load_with(extra=1, *args, **kwargs):
    return lambda images: images.mean((1, 2)) * extra

class Nested:
    @staticmethod
    def load():
        return lambda images: -images.mean((1, 2))

def classifier():
    return lft_jax.models.from_function(lambda images: images.mean((1, 2)))

def keyed():
    return lambda images: {"scores": images.mean((2, 3))}

def pair():
    return lambda images: (0, images.mean((1, 2)))

def model(images):
    return images.mean((1, 2))

def none():
    pass

def broken():
    raise FileNotFoundError("no weights.npz")

def text():
    return "resnet"

ready = lft_jax.models.from_function(model)
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes `mine.py` in the current directory."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "lacking.py").write_text("import not_there_at_all\n")
    (tmp_path / "failing.py").write_text("\n1 / 0\n")
    (tmp_path / "empty.py").write_text("")
    yield
    for name in ("mine", "lacking", "failing", "empty"):
        sys.modules.pop(name, None)


IMAGES = np.linspace(0, 1, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)


@pytest.mark.parametrize("name", ["load", "load_with", "classifier"])
def test_a_function_of_the_current_directory_returns_the_model(module, name):
    model = load_model(f"mine:{name}", {})
    np.testing.assert_allclose(model(IMAGES), IMAGES.mean((1, 2)), rtol=1e-6)


def test_an_attribute_of_an_attribute(module):
    np.testing.assert_allclose(load_model("mine:Nested.load", {})(IMAGES), -IMAGES.mean((1, 2)), rtol=1e-6)


def test_options_wrap_a_function(module):
    model = load_model("mine:keyed", {"mean": (0.5,), "std": (0.25,), "channels": "first", "output": "scores"})
    assert isinstance(model, Classifier)
    np.testing.assert_allclose(model(IMAGES), (IMAGES.mean((1, 2)) - 0.5) / 0.25, rtol=1e-5)
    np.testing.assert_allclose(load_model("mine:pair", {"output": 1})(IMAGES), IMAGES.mean((1, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "kind", "said"),
    [
        (
            "mine",
            {},
            ValueError,
            r"--model: expected package.module:function or a file \(.keras, .h5, .onnx\), got 'mine'",
        ),
        ("mine:", {}, ValueError, r"expected package.module:function"),
        ("mine.py:load", {}, ValueError, r"no module 'mine.py' in the current directory"),
        ("dir/mine:load", {}, ValueError, r"expected package.module:function"),
        ("nowhere:load", {}, ValueError, r"no module 'nowhere' in the current directory or installed; run in"),
        ("lacking:load", {}, ValueError, r"'lacking' imports 'not_there_at_all', which is not installed"),
        ("failing:load", {}, ValueError, r"importing 'failing' raised ZeroDivisionError: .* \(failing.py, line 2\)"),
        ("mine:lod", {}, ValueError, r"'mine' has no 'lod'; it has load, load_with"),
        ("empty:load", {}, ValueError, r"'empty' has no 'load'; it has no function"),
        ("mine:number", {}, TypeError, r"'number' is of type int, not callable; name a function without arguments"),
        ("mine:model", {}, ValueError, r"'model' needs the arguments images; name a .*: def load\(\): return model"),
        ("mine:ready", {}, TypeError, r"'ready' is of type Classifier, a model itself; name a function"),
        ("mine:none", {}, TypeError, r"returned None, expected a model"),
        ("mine:broken", {}, ValueError, r"raised FileNotFoundError: no weights.npz \(mine.py, line \d+\)"),
        ("mine:text", {}, TypeError, r"model must be a function of images \[N, H, W, C\] or a Classifier"),
        ("mine:classifier", {"mean": 0.5, "output": 1}, ValueError, r"Classifier, .*leave out --mean, --model_output"),
    ],
)
def test_what_is_no_function_that_returns_a_model_is_refused(module, name, options, kind, said):
    with pytest.raises(kind, match=said):
        load_model(name, options)


def test_a_module_of_a_framework_is_wrapped_by_its_adapter(monkeypatch):
    class Module:
        """Stands for torch.nn.Module."""

    class Model(Module):
        """Stands for a Keras model whose backend is torch: it is a torch.nn.Module as well."""

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(nn=types.SimpleNamespace(Module=Module)))
    monkeypatch.setitem(sys.modules, "keras", types.SimpleNamespace(Model=Model))
    monkeypatch.setitem(sys.modules, "holder", types.SimpleNamespace(torch=Module, keras=Model, ready=Module()))
    called = []
    for name in ("from_torch", "from_keras"):
        monkeypatch.setattr(models, name, lambda model, name=name, **options: called.append((name, options)))
    load_model("holder:torch", {"mean": 0.5})
    load_model("holder:keras", {"output": "probabilities"})
    assert called == [("from_torch", {"mean": 0.5}), ("from_keras", {"output": "probabilities"})]
    with pytest.raises(TypeError, match="'ready' is of type Module, a model itself"):
        load_model("holder:ready", {})


@pytest.mark.parametrize(
    ("file", "adapter"), [("a.keras", "from_keras"), ("b.H5", "from_keras"), ("c.onnx", "from_onnx")]
)
def test_a_file_is_read_by_its_adapter(tmp_path, monkeypatch, file, adapter):
    called = []
    monkeypatch.setattr(models, adapter, lambda path, **options: called.append((path, options)))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    path = str(tmp_path / file)
    with pytest.raises(FileNotFoundError, match=r"--model: there is no file '.*'\."):
        load_model(path, {})
    (tmp_path / file).touch()
    load_model(path, {"input_range": (0.0, 255.0), "output": "probabilities"})
    assert called == [(path, {"input_range": (0.0, 255.0), "output": "probabilities"})]
    assert os.environ["KERAS_BACKEND"] == "jax"
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    load_model(path, {})
    assert os.environ["KERAS_BACKEND"] == "torch"


def test_a_missing_backend_of_keras_is_named(module, monkeypatch):
    Path("failing.py").write_text("raise ModuleNotFoundError('no', name='tensorflow')\n")
    monkeypatch.setitem(sys.modules, "keras", types.ModuleType("keras"))
    with pytest.raises(
        ValueError, match=r"imports 'tensorflow', which is not installed \(keras does, unless KERAS_BACKEND"
    ):
        load_model("failing:load", {})


@pytest.mark.frameworks
def test_a_torch_module_gets_its_mean_and_channels(monkeypatch):
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    monkeypatch.setitem(sys.modules, "holder", types.SimpleNamespace(load=lambda: net))
    model = load_model("holder:load", {"mean": (0.5,), "std": (0.25,)})
    np.testing.assert_allclose(model(IMAGES), (IMAGES.mean((1, 2)) - 0.5) / 0.25, rtol=1e-5)
