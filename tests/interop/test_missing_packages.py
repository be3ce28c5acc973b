"""Without the libraries, their adapters say what to install."""

import sys

import pytest

from lft_jax import interop


def test_a_missing_package_is_named(monkeypatch):
    for name in ("art", "foolbox", "torchattacks"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (interop.from_art, interop.art_attack):
        with pytest.raises(ModuleNotFoundError, match=r"art is not installed: pip install 'lft_jax\[art\]'\.$"):
            call(object())
    with pytest.raises(ModuleNotFoundError, match=r"foolbox is not installed: pip install 'lft_jax\[foolbox\]'\.$"):
        interop.foolbox_attack()
    monkeypatch.setitem(sys.modules, "torch", sys)  # there
    with pytest.raises(ModuleNotFoundError, match="torchattacks is not installed: pip install --no-deps torchattacks"):
        interop.torchattacks_attack(object())
