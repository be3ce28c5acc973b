"""The images of `--images`, and the choice of those that are attacked from."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from lft_jax._reading import npz_names, read_npz
from lft_jax.base import check_at_least
from lft_jax.cli._folder import open_folder
from lft_jax.data import check_images_labels
from lft_jax.data.checks import MOST_CLASSES

#: What is read of an .npz file.
ARRAYS = ("images", "labels", "test_images", "test_labels", "class_names")
#: Number of images to attack from where there are no labels.
UNLABELLED = 10


@dataclasses.dataclass(frozen=True)
class Images:
    """Images, read when they are needed.

    Attributes:
      count: number of images.
      labels: `[N]` integers, or None.
      read: row numbers -> images `[rows, H, W, C]`, uint8 or floating-point in [0, 1].
      class_names: names of classes, of those that have one.
      files: names of the images' files, or None.
    """

    count: int
    labels: np.ndarray | None
    read: Callable[[np.ndarray], np.ndarray]
    class_names: Mapping[int, str] = dataclasses.field(default_factory=dict)
    files: tuple[str, ...] | None = None

    @classmethod
    def of_arrays(cls, images: np.ndarray, labels: np.ndarray | None) -> "Images":
        """Images that are in memory."""
        return cls(len(images), labels, lambda rows: images[rows])

    def part(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Images and labels of some rows."""
        return self.read(rows), None if self.labels is None else self.labels[rows]


def load_images(
    path: str, size: int | None = None, channels: int | None = None, flag: str = "--images"
) -> tuple[Images, Images | None]:
    """Images of an .npz file or of a folder, and the test images, if they are given apart.

    Args:
      path: an .npz file with `images`, and perhaps `labels`, `test_images`, `test_labels` and `class_names` (strings);
        or a folder of pictures.
      size: as of `open_folder`.
      channels: as of `open_folder`.
      flag: that named it, for messages.

    Raises:
      ValueError: for neither, a file without valid arrays, or an invalid folder.
    """
    if Path(path).is_dir():
        if size is not None:
            check_at_least("--image_size", size, 1)
        folder = open_folder(Path(path), size, channels, flag)
        names = tuple(str(file.relative_to(path)) for file in folder.files)
        return Images(len(folder.files), folder.labels, folder.read, folder.names, names), None
    if not (path.endswith(".npz") and Path(path).is_file()):
        raise ValueError(f"{flag}: expected a folder of pictures or an .npz file, got {path!r}, which is neither.")
    if size is not None or channels is not None:
        raise ValueError("--image_size and --image_channels are for a folder of pictures; bring the arrays to shape.")
    try:
        arrays, there = read_npz(path, ARRAYS), npz_names(path)
    except ValueError as error:
        raise ValueError(f"{flag}: {path} cannot be read as an .npz file ({error}).") from error
    if "images" not in arrays:
        raise ValueError(f"{flag}: {path} must have an array 'images', got {', '.join(there)[:200] or 'none'}.")
    images = _checked(flag, path, arrays, "images", "labels")
    if "test_images" not in arrays:
        return images, None
    return images, _checked(flag, path, arrays, "test_images", "test_labels", images.read(np.arange(1)).shape[1:])


def _checked(flag, path, arrays, name, labels_name, shape=None):
    images, labels = arrays[name], arrays.get(labels_name)
    images = images[..., None] if images.ndim == 3 else images
    images = images.astype(np.float32) if images.dtype.kind == "f" else images
    try:
        check_images_labels(images, np.zeros(images.shape[:1], np.int32) if labels is None else labels, MOST_CLASSES)
    except ValueError as error:
        raise ValueError(f"{flag}: {path}, arrays {name!r} and {labels_name!r}: {error}") from error
    if shape is not None and images.shape[1:] != shape:
        raise ValueError(f"{flag}: {path}: test_images must be [N, {shape}] as images, got {images.shape[1:]}.")
    labels = None if labels is None else labels.astype(np.int32)
    return dataclasses.replace(Images.of_arrays(images, labels), class_names=_names(flag, path, arrays))


def _names(flag, path, arrays):
    names = arrays.get("class_names", np.zeros(0, str))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(f"{flag}: {path}: class_names must be [classes] strings, got {names.dtype} {names.shape}.")
    return dict(enumerate(names.tolist()))


def choose(images: Images, shots: int | None, num_images: int | None, seed: int) -> np.ndarray:
    """Row numbers of the images to attack from.

    Args:
      images: to choose from.
      shots: random images of each class that occurs; 1 if None.
      num_images: random images instead; if None and there are no labels, 10, or as many as there are.
      seed: of the choice.

    Raises:
      ValueError: for both or for more than there are, and for shots without labels.
    """
    random = np.random.default_rng(seed)
    if shots is not None and num_images is not None:
        raise ValueError(f"--shots={shots} and --num_images={num_images}: expected at most one of them.")
    labels = images.labels
    if labels is None and shots is not None:
        raise ValueError(f"--shots={shots}: the images have no labels; pass --num_images.")
    if num_images is not None or labels is None:
        num_images = min(UNLABELLED, images.count) if num_images is None else num_images
        check_at_least("num_images", num_images, 1)
        if num_images > images.count:
            raise ValueError(f"num_images: expected at most {images.count}, all images, got {num_images}.")
        return np.sort(random.choice(images.count, num_images, replace=False))
    shots = 1 if shots is None else shots
    check_at_least("shots", shots, 1)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    least = min(len(rows) for rows in classes)
    if shots > least:
        raise ValueError(f"shots: expected at most {least}, the images of the smallest class, got {shots}.")
    return np.concatenate([random.choice(rows, shots, replace=False) for rows in classes])


def unseen(
    images: Images, test: Images | None, chosen: np.ndarray, most: int | None, seed: int
) -> tuple[Images, np.ndarray]:
    """The images to measure on, with their row numbers: `test`, or else all that were not chosen.

    Args:
      images: that were chosen from.
      test: test images that are given apart, or None.
      chosen: row numbers of the images to attack from.
      most: the largest number of rows, chosen at random; None for all.
      seed: of this choice.
    """
    rows = np.setdiff1d(np.arange(images.count), chosen) if test is None else np.arange(test.count)
    if most is not None:
        check_at_least("num_test", most, 0)
        rows = np.sort(np.random.default_rng((seed, 1)).choice(rows, min(most, len(rows)), replace=False))
    return images if test is None else test, rows
