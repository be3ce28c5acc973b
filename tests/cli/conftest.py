"""A folder in which a console script runs."""

import sys

import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    """The current directory, with what the `write` of the test's module puts there: `linear.py` and `images.npz`."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    request.module.write(tmp_path)
    yield tmp_path
    sys.modules.pop("linear", None)
