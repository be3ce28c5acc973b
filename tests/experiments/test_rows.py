"""Results files to which rows are added."""

import json

import pytest

from experiments.rows import opened, row_of


def test_a_file_goes_on_with_the_same_flags_only(tmp_path):
    path, flags = tmp_path / "found.json", {"models": ("a", "b"), "steps": 3}
    assert opened(path, flags) == {"flags": {"models": ["a", "b"], "steps": 3}, "rows": []}
    stored = {"flags": {"models": ["a", "b"], "steps": 3}, "rows": [{"model": "a"}]}
    path.write_text(json.dumps(stored))
    assert opened(path, flags) == stored
    with pytest.raises(ValueError, match=r"output: .*found.json has results of .*'steps': 3.*, expected .*'steps': 4"):
        opened(path, {**flags, "steps": 4})


def test_a_cell_has_one_row():
    rows = [{"model": "a", "steps": 1, "draw_asr": [0.5]}]
    assert row_of(rows, {"model": "a", "steps": 1}) is rows[0]
    new = row_of(rows, {"model": "a", "steps": 2}, ("x", "y"))
    assert rows[1] is new and new == {"model": "a", "steps": 2, "x": [], "y": []}
    assert new["x"] is not new["y"]
