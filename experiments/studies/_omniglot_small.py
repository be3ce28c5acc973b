"""Omniglot's two small background sets (brendenlake/omniglot, MIT), as a source whose splits have different characters.

Of the 136 characters of `small1.npz` and the 156 of `small2.npz`, 50 are in both, with the same 20 drawings: the Greek
and the Latin alphabet. They are left out of meta-training.
"""

import os
from pathlib import Path

import numpy as np

from lft_jax.base import check_name
from lft_jax.data import SPLITS, ImageSource

NAME = "omniglot_small"
_VALIDATION = 5  # one character in so many is for validation
_FILES = {"train": "small1.npz", "validation": "small1.npz", "test": "small2.npz"}


def load(split: str) -> ImageSource:
    """One split, from the folder `omniglot_small` of the folder that `LFT_SHARED_DIR` names.

    "test" has all characters of `small2.npz`. "train" and "validation" have those characters of `small1.npz` of which
    no drawing is in `small2.npz`: every fifth is for validation. "train" also has them rotated by 90, 180 and 270
    degrees, as classes of their own (arXiv 1703.03400, section 5.2); the others do not.

    Args:
      split: "train", "validation" or "test".

    Returns:
      The split: 28x28x1 images, ink 255 on 0, 20 of each class, in the order of the classes. The class of a rotated
      character of "train" is 4 times the number of the character plus the number of quarter turns.

    Raises:
      ValueError: for an unknown split, or if `LFT_SHARED_DIR` is not set.
      FileNotFoundError: if a file is missing.
    """
    check_name("split", split, SPLITS)
    images, labels = _read(_FILES[split])
    if split == "test":
        return _source(images, labels)
    own = ~np.isin(labels, shared_characters()[0])
    images, labels = images[own], labels[own]
    characters = np.unique(labels)
    if split == "validation":
        held_out = np.isin(labels, characters[::_VALIDATION])
        return _source(images[held_out], labels[held_out])
    kept = ~np.isin(labels, characters[::_VALIDATION])
    images, labels = images[kept], 4 * labels[kept]
    turned = np.concatenate([np.rot90(images, turns, (1, 2)) for turns in range(4)])
    return _source(turned, np.concatenate([labels + turns for turns in range(4)]))


def shared_characters() -> tuple[np.ndarray, np.ndarray]:
    """The labels in `small1.npz`, and those in `small2.npz`, of characters with a drawing that both files have."""
    (first, first_labels), (second, second_labels) = (_read(name) for name in ("small1.npz", "small2.npz"))
    drawings = [np.asarray([drawing.tobytes() for drawing in images]) for images in (first, second)]
    in_both = [np.isin(some, others) for some, others in (drawings, drawings[::-1])]
    return np.unique(first_labels[in_both[0]]), np.unique(second_labels[in_both[1]])


def _source(images, labels):
    """The classes numbered from 0, in their order."""
    order = np.argsort(labels, kind="stable")
    classes, numbers = np.unique(labels[order], return_inverse=True)
    return ImageSource(NAME, images[order], numbers.astype(np.int32), len(classes))


def _read(name):
    folder = os.environ.get("LFT_SHARED_DIR")
    if not folder:
        raise ValueError("LFT_SHARED_DIR must be set to the folder of omniglot_small/, got nothing.")
    path = Path(folder, NAME, name)
    if not path.is_file():
        raise FileNotFoundError(f"LFT_SHARED_DIR: there is no file {path}.")
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"]
