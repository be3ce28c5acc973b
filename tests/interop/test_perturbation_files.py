"""Perturbations in files of NumPy, torch and PNG."""

import pickle
import sys

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp
from PIL import Image

from lft_jax.attack import UniversalPerturbation
from lft_jax.interop import load_perturbation, save_perturbation
from lft_jax.tasks import Constraint

THETA = np.linspace(-0.25, 0.25, 36, dtype=np.float32).reshape(3, 4, 3)


def perturbations(channels, dtype=np.float32):
    shapes = st.tuples(st.integers(1, 5), st.integers(1, 5), channels)
    values = st.floats(-1, 1, width=np.finfo(dtype).bits)
    return hnp.arrays(dtype, shapes, elements=values)


@given(perturbations(st.integers(1, 5), np.float64))
def test_npy_keeps_every_bit(tmp_path_factory, theta):
    path = tmp_path_factory.mktemp("files") / "uap.npy"
    save_perturbation(path, theta)
    found = load_perturbation(path)
    assert found.dtype == theta.dtype
    np.testing.assert_array_equal(found, theta)


@given(perturbations(st.sampled_from([1, 3])))
def test_png_is_off_by_at_most_half_a_level_and_is_written_again_as_it_is(tmp_path_factory, theta):
    path = tmp_path_factory.mktemp("files") / "uap.png"
    save_perturbation(path, theta)
    found, radius = load_perturbation(path), np.abs(theta).max()
    assert found.shape == theta.shape and np.abs(found).max() == radius  # the radius itself is exact
    assert np.abs(found - theta).max() <= radius / 254 * (1 + 1e-4)
    np.testing.assert_array_equal(found[theta == 0], 0)
    content = path.read_bytes()
    save_perturbation(path, found)
    np.testing.assert_array_equal(load_perturbation(path), found)
    assert path.read_bytes() == content


def test_a_png_shows_the_perturbation_around_grey(tmp_path):
    save_perturbation(tmp_path / "uap.png", np.asarray([[[0.5], [-0.5], [0.0], [0.25]]], np.float32))
    with Image.open(tmp_path / "uap.png") as picture:
        assert picture.mode == "L" and picture.text == {"lft_jax:radius": "0.5"}
        assert np.asarray(picture).tolist() == [[255, 1, 128, 192]]  # 128 + 63.5, rounded to even


def test_a_result_and_other_arrays_are_saved(tmp_path):
    save_perturbation(tmp_path / "uap.npy", UniversalPerturbation(THETA, {}, Constraint("linf", 0.25)))
    np.testing.assert_array_equal(load_perturbation(tmp_path / "uap.npy"), THETA)
    save_perturbation(tmp_path / "uap.npy", jnp.full((2, 2, 1), 0.5, jnp.bfloat16))
    assert load_perturbation(tmp_path / "uap.npy").dtype == np.float32


def test_a_result_saved_by_itself_is_read(tmp_path):
    UniversalPerturbation(THETA, {}, Constraint("linf", 0.25)).save(tmp_path / "uap.npy")
    np.testing.assert_array_equal(load_perturbation(tmp_path / "uap.npy"), THETA)


@pytest.mark.parametrize(
    ("name", "theta", "message"),
    [
        ("uap.npz", THETA, r"path must end with \.npy, \.pt or \.png, got .*uap\.npz"),
        ("uap", THETA, "path must end with"),
        ("uap.npy", THETA[0], r"perturbation must be \[H, W, C\] .*got shape \(4, 3\)"),
        ("uap.npy", THETA[None], r"got shape \(1, 3, 4, 3\)"),
        ("uap.npy", THETA[:0], "no axis of length 0"),
        ("uap.npy", THETA * np.nan, "perturbation must be finite"),
        ("uap.npy", np.ones((2, 2, 1), np.uint8), "must be floating-point, .* got uint8"),
        ("uap.png", np.ones((2, 2, 4), np.float32), "must have 1 or 3 channels for a .png file, got 4"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_leaves_no_file(tmp_path, name, theta, message):
    with pytest.raises(ValueError, match=message):
        save_perturbation(tmp_path / name, theta)
    assert not list(tmp_path.iterdir())


class Unpickled:
    """Fails the test when it is read: pickles are written here only to see that they are refused."""

    def __reduce__(self):
        return pytest.fail, ("a pickled object was read",)


def test_files_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_perturbation(tmp_path / "none.npy")
    (tmp_path / "pickled.npy").write_bytes(pickle.dumps(Unpickled()))
    np.save(tmp_path / "objects.npy", np.asarray([Unpickled()], object), allow_pickle=True)
    for name in ("pickled.npy", "objects.npy"):
        with pytest.raises(ValueError, match=r"is no \.npy file of numbers"):
            load_perturbation(tmp_path / name)
    np.savez(tmp_path / "archive.npz", THETA)
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    with pytest.raises(ValueError, match="is an archive of arrays"):
        load_perturbation(tmp_path / "archive.npy")
    np.save(tmp_path / "flat.npy", THETA.ravel())
    with pytest.raises(ValueError, match=r"flat\.npy must be \[H, W, C\]"):
        load_perturbation(tmp_path / "flat.npy")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"is no \.png file"):
        load_perturbation(tmp_path / "text.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="has no radius in a text chunk 'lft_jax:radius'"):
        load_perturbation(tmp_path / "plain.png")
    Image.new("P", (2, 2)).save(tmp_path / "palette.png")
    with pytest.raises(ValueError, match="got mode 'P'"):
        load_perturbation(tmp_path / "palette.png")


@pytest.mark.parametrize(("suffix", "package", "extra"), [(".pt", "torch", "torch"), (".png", "PIL", "images")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, suffix, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package} is not installed: pip install 'lft_jax\[{extra}\]'"):
        save_perturbation(tmp_path / f"uap{suffix}", THETA)
    assert not list(tmp_path.iterdir())


@pytest.mark.frameworks
@given(perturbations(st.integers(1, 5)))
def test_pt_is_a_tensor_with_channels_first(tmp_path_factory, theta):
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("files") / "uap.pt"
    save_perturbation(path, theta)
    stored = torch.load(path, weights_only=True)
    assert stored.dtype == torch.float32
    np.testing.assert_array_equal(stored.numpy(), theta.transpose(2, 0, 1))
    np.testing.assert_array_equal(load_perturbation(path), theta)


@pytest.mark.frameworks
def test_pt_files_of_other_kinds_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "uap.pt"
    torch.save(Unpickled(), path)
    with pytest.raises(ValueError, match=r"is no \.pt file of a tensor alone"):
        load_perturbation(path)
    for wrong, kind in (
        (torch.zeros(2, 2), r"torch\.float32 \(2, 2\)"),
        (torch.zeros(1, 2, 2, dtype=torch.int32), r"torch\.int32"),
        ({"uap": torch.zeros(1, 2, 2)}, "dict"),
    ):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=rf"must hold a floating-point tensor \[C, H, W\], got {kind}"):
            load_perturbation(path)
    torch.save(torch.full((1, 2, 2), torch.nan), path)
    with pytest.raises(ValueError, match=r"uap\.pt must be finite"):
        load_perturbation(path)
    torch.save(torch.ones(3, 2, 2, dtype=torch.bfloat16, requires_grad=True), path)
    assert load_perturbation(path).dtype == np.float32
