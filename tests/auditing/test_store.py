import dataclasses
import json

import jax
import numpy as np
import pytest

from lft_jax.auditing import _store
from lft_jax.auditing._plan import Cell
from lft_jax.auditing._store import Run, Store, digest, write_json
from lft_jax.pretrained import load_pretrained

CELL = Cell("momentum", 0.1, 5, 20, 0)
CLEAN = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)


def make(cell=CELL):
    history = {"loss": [1.0, 0.5], "asr": [0.0, 0.2], "queries": [10, 20]}
    theta = np.linspace(-0.1, 0.1, 12, dtype=np.float32).reshape(2, 2, 3)
    ends = np.arange(6) % 4, np.linspace(0.5, 1, 6)
    return Run(cell, theta, *ends, history, 40, 1.5, 2.5, True, "1 x cpu", ("said",))


@pytest.fixture
def store(tmp_path):
    found = Store(tmp_path / "runs", digest(np.arange(3)), CLEAN)
    found.save(make())
    return found


def again(store, data=None, clean=CLEAN):
    return Store(store.folder, digest(np.arange(3)) if data is None else data, clean)


def test_a_run_is_read_as_it_was_written(store):
    found, expected = again(store).load(CELL), make()
    np.testing.assert_array_equal(found.perturbation, expected.perturbation)
    np.testing.assert_array_equal(found.predicted, expected.predicted)
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-4)
    kept = found.cell, found.history, found.evaluations, found.seconds, found.cpu_seconds, found.compiled
    assert kept == (CELL, expected.history, 40, 1.5, 2.5, True)
    assert (found.device, found.warnings) == ("1 x cpu", ("said",))
    assert again(store).load(Cell("momentum", 0.1, 5, 20, 1)) is None


def test_other_data_and_other_models_have_other_runs(store):
    assert again(store, data=digest(np.arange(4))).load(CELL) is None
    assert again(store, clean=CLEAN + np.float32(1e-6)).load(CELL) is not None  # rounding
    other = CLEAN.copy()
    other[3, 1] += 0.1
    assert again(store, clean=other).load(CELL) is None
    assert again(store, clean=CLEAN[:, ::-1]).load(CELL) is None


@pytest.mark.parametrize("damage", ["json", "npy", "other", "missing", "field"])
def test_damaged_runs_are_made_again(store, damage):
    path = store.path(CELL)
    if damage == "json":
        path.with_suffix(".json").write_text(path.with_suffix(".json").read_text()[:50])
    elif damage == "npy":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "other":  # the array of another run
        np.save(path, make().perturbation + np.float32(0.01))
    elif damage == "field":  # of an earlier version
        content = json.loads(path.with_suffix(".json").read_text())
        write_json(path.with_suffix(".json"), {name: content[name] for name in content if name != "cpu_seconds"})
    else:
        path.unlink()
    assert again(store).load(CELL) is None


def test_a_run_that_was_not_written_to_its_end_is_not_there(store, monkeypatch):
    cell = Cell("momentum", 0.1, 5, 20, 7)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lft_jax.auditing._store.write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        store.save(make(cell))
    assert store.path(cell).is_file() and again(store).load(cell) is None


def test_files_are_json(store, tmp_path):
    content = json.loads(store.path(CELL).with_suffix(".json").read_text())
    assert content["evaluations"] == 40 and content["cell"]["method"] == "momentum"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_digests_tell_arrays_apart():
    a = np.arange(4, dtype=np.float32)
    found = {digest(a), digest(a.astype(np.float64)), digest(a.reshape(2, 2)), digest(a[::-1]), digest(a, 1), digest(1)}
    assert len(found) == 6 and digest(a) == digest(a.copy())


def _another_step(params, rule):
    return params, dataclasses.replace(rule, step=rule.step / 2)


def _other_weights(params, rule):
    return jax.tree.map(lambda x: x + 1, params), rule


@pytest.mark.parametrize("change", [_another_step, _other_weights])
def test_another_shipped_rule_has_other_runs(tmp_path, monkeypatch, change):
    cells = [Cell("uap-linf", 0.1, 5, 20, 0), CELL]
    store = Store(tmp_path, "data", CLEAN)
    before = [store.key(cell) for cell in cells]
    assert before == [Store(tmp_path, "data", CLEAN).key(cell) for cell in cells]
    monkeypatch.setattr(_store, "load_pretrained", lambda name: change(*load_pretrained(name)))
    monkeypatch.setattr(_store, "_rule", _store._rule.__wrapped__)  # without its cache
    after = [store.key(cell) for cell in cells]
    assert after[0] != before[0] and after[1] == before[1]
    monkeypatch.setattr(_store, "__version__", "0.0.0")
    assert Store(tmp_path, "data", CLEAN).key(CELL) != before[1]
