"""Trees on disk."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax.meta.checkpoints import load_tree, replace_directory, save_tree

TREE = {
    "weights": [jnp.arange(6, dtype=jnp.float32).reshape(2, 3), jnp.ones((1, 2), jnp.bfloat16)],
    "step": jnp.int32(7),
    "nothing": (),
}


def test_a_saved_tree_is_loaded(tmp_path):
    save_tree(tmp_path / "a" / "tree", TREE)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
    loaded = load_tree(tmp_path / "a" / "tree", like)
    assert jax.tree.structure(loaded) == jax.tree.structure(TREE)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(TREE), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["tree"]


def test_relative_paths_and_replacement(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (1.0, 2.0):
        save_tree("tree", {"x": jnp.full(3, value)})
    np.testing.assert_array_equal(load_tree("tree", {"x": jnp.zeros(3)})["x"], 2)


def test_a_failed_save_leaves_the_old_tree(tmp_path):
    save_tree(tmp_path / "tree", {"x": jnp.ones(3)})
    with pytest.raises(ValueError, match="object"):
        save_tree(tmp_path / "tree", {"x": object()})
    np.testing.assert_array_equal(load_tree(tmp_path / "tree", {"x": jnp.zeros(3)})["x"], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_a_failed_move_leaves_both_trees(tmp_path, monkeypatch):
    save_tree(tmp_path / "tree", {"x": jnp.ones(3)})
    save_tree(tmp_path / "new", {"x": jnp.zeros(3)})
    move = os.replace

    def crash(source, target):
        if source == tmp_path / "new":
            raise OSError("no more space")
        move(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no more space"):
        replace_directory(tmp_path / "new", tmp_path / "tree")
    for name, value in (("tree", 1), ("new", 0)):
        np.testing.assert_array_equal(load_tree(tmp_path / name, {"x": jnp.zeros(3)})["x"], value)
    monkeypatch.undo()
    replace_directory(tmp_path / "new", tmp_path / "tree")
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize(
    "like",
    [
        {"x": jnp.zeros(4)},
        {"x": jnp.zeros((3, 1))},
        {"x": jnp.zeros(3), "y": jnp.zeros(2)},
        {"y": jnp.zeros(3)},
        {"x": {"z": jnp.zeros(3)}},
        {},
    ],
)
def test_other_structures_and_shapes_are_refused(tmp_path, like):
    save_tree(tmp_path / "tree", {"x": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"path: the checkpoint at .*tree is damaged or of another structure"):
        load_tree(tmp_path / "tree", like)


def test_absent_and_truncated_trees_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path: there is no checkpoint at .*absent"):
        load_tree(tmp_path / "absent", {"x": jnp.ones(3)})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="damaged"):
        load_tree(tmp_path / "empty", {"x": jnp.ones(3)})


def test_every_truncated_file_is_noticed(tmp_path):
    expected = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    save_tree(tmp_path / "tree", {"x": expected})
    noticed = 0
    for number, file in enumerate(sorted(p for p in (tmp_path / "tree").rglob("*") if p.is_file())):
        copy = shutil.copytree(tmp_path / "tree", tmp_path / str(number))
        (copy / file.relative_to(tmp_path / "tree")).write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        try:
            found = load_tree(copy, {"x": expected})["x"]
        except ValueError as error:
            assert "damaged" in str(error)
            noticed += 1
        else:  # orbax writes files that it does not need
            np.testing.assert_array_equal(found, expected)
    assert noticed
