"""Cells of a study on disk."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cells import Cells

VALUE = {
    "row": {
        "asr": [0.1, 1e-300, math.nan, -math.inf],
        "name": "§ a/b",
        "none": None,
        "many": True,
        "steps": (1, (2, "x")),
    },
    "array": np.arange(6, dtype=np.float32).reshape(2, 3) / 3,
    "scalar": np.float64(0.1),
    "empty": ((), [], {}, np.zeros((0, 2), np.int8)),
}


def fail():
    raise AssertionError("measured again")


def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a == b or (a != a and b != b)


def test_a_value_is_measured_once_and_comes_back_as_it_was(tmp_path):
    output = tmp_path / "new" / "results.json"
    first = Cells(output, {"seed": 0}).get("a", dict, VALUE)
    assert same(first, VALUE)
    assert same(Cells(output, {"seed": 0}).get("a", fail), VALUE)
    assert [path.suffix for path in (tmp_path / "new" / "results.json.unfinished").iterdir()] == [".cell"]


def test_arrays_of_jax_become_those_of_numpy_at_once(tmp_path):
    found = Cells(tmp_path / "r.json", None).get("a", lambda x: [x], jnp.ones(2))
    assert isinstance(found[0], np.ndarray)
    found[0][0] = 3  # which may be written to


def test_other_names_and_settings_have_other_values(tmp_path):
    weights = np.ones(3, np.float32)
    Cells(tmp_path / "r.json", {"weights": weights}).get("a", int, 1)
    for settings, name in (({"weights": weights + 1}, "a"), ({"weights": weights}, "b"), ({}, "a")):
        assert Cells(tmp_path / "r.json", settings).get(name, int, 2) == 2
    assert Cells(tmp_path / "r.json", {"weights": weights}).get("a", fail) == 1


def test_a_damaged_cell_is_measured_again(tmp_path):
    cells = Cells(tmp_path / "r.json", None)
    cells.get("a", int, 1)
    (path,) = cells.folder.iterdir()
    path.write_bytes(path.read_bytes()[:0])
    assert cells.get("a", int, 2) == 2


def test_nothing_is_stored_of_a_failure(tmp_path):
    cells = Cells(tmp_path / "r.json", None)
    with pytest.raises(AssertionError):
        cells.get("a", fail)
    assert cells.get("a", int, 2) == 2


@pytest.mark.parametrize("value", [{1, 2}, {1: 2}, object(), np.asarray(["a"]), np.arange(2).astype(object)])
def test_what_cannot_be_stored_is_refused(tmp_path, value):
    with pytest.raises(TypeError, match="cells: expected"):
        Cells(tmp_path / "r.json", None).get("a", lambda: [value])


def test_provenance_is_that_of_the_first_start(tmp_path, monkeypatch):
    def start(commit):
        monkeypatch.setattr("lft_jax.cli.provenance.describe", lambda seeds: {"commit": commit, "seeds": seeds})
        return Cells(tmp_path / "r.json", None).provenance([0])

    assert start("a") == start("a") == {"commit": "a", "seeds": [0]}
    assert start("b")["resumed_at_commits"] == start("a")["resumed_at_commits"] == ["b"]
    assert start("c") == {"commit": "a", "seeds": [0], "resumed_at_commits": ["b", "c"]}
    assert json.dumps(start("c"))
    Cells(tmp_path / "r.json", None).finish()
    assert start("d") == {"commit": "d", "seeds": [0]}
    assert (tmp_path / "r.json.unfinished").is_dir()
