"""What an adapter says where its framework is missing."""

import sys

import pytest

import lft_jax


@pytest.mark.parametrize(
    ("adapter", "package", "extra"),
    [
        ("from_keras", "keras", "keras"),
        ("from_onnx", "onnxruntime", "onnx"),
        ("from_sklearn", "sklearn.base", "sklearn"),
        ("from_torch", "torch", "torch"),
    ],
)
def test_a_missing_framework_is_named_with_the_extra_that_has_it(adapter, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises as if it were not installed
    name = package.partition(".")[0]
    with pytest.raises(ModuleNotFoundError, match=rf"{name} is not installed: pip install 'lft_jax\[{extra}\]'\.$"):
        getattr(lft_jax.models, adapter)(object())
