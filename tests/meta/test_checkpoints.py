"""Trees on disk."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax.meta.checkpoints import CHECKSUMS, load_tree, replace_directory, save_tree

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


def test_absent_and_empty_trees_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path: there is no checkpoint at .*absent"):
        load_tree(tmp_path / "absent", {"x": jnp.ones(3)})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="damaged"):
        load_tree(tmp_path / "empty", {"x": jnp.ones(3)})


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    """One bit in the middle is another one."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flip])
def test_every_damaged_file_is_named(tmp_path, damage):
    expected = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    save_tree(tmp_path / "tree", {"x": expected})
    files = [path.relative_to(tmp_path / "tree") for path in (tmp_path / "tree").rglob("*") if path.is_file()]
    assert len(files) > 3
    for number, file in enumerate(files):
        copy = shutil.copytree(tmp_path / "tree", tmp_path / str(number))
        (copy / file).write_bytes(damage((copy / file).read_bytes()))
        named = "" if file.name == CHECKSUMS else f".*{file.name} is not as it was written"
        with pytest.raises(ValueError, match=f"the checkpoint at .* is damaged: {named}"):
            load_tree(copy, {"x": expected})
        (copy / file).unlink()
        if file.name != CHECKSUMS:
            with pytest.raises(ValueError, match=f"damaged: .*{file.name} is missing"):
                load_tree(copy, {"x": expected})


def test_a_checkpoint_without_checksums_is_loaded(tmp_path):
    save_tree(tmp_path / "tree", {"x": jnp.ones(3)})
    (tmp_path / "tree" / CHECKSUMS).unlink()
    np.testing.assert_array_equal(load_tree(tmp_path / "tree", {"x": jnp.zeros(3)})["x"], 1)
