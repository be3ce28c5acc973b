"""TFDS image-classification data sets, read through `tfds.data_source` (without TensorFlow) and decoded once."""

import difflib
import os
from typing import Any

import numpy as np

from lft_jax.data._cache import cached
from lft_jax.data._embedded import EMBEDDED

#: Data sets whose train and test splits have different classes. Their train and validation splits do too.
SPLIT_BY_CLASS = ("omniglot",)
_READ = 1000  # examples that are read at once


def load(name, split, data_dir, cache_dir):
    """Returns `(images, labels, num_classes)` of a split, see `load_source`."""
    builder = _builder(name, data_dir)
    shape, num_classes = _features(name, builder.info.features)
    available = builder.info.splits
    test = next((key for key in ("test", "validation") if key in available), None)
    if "train" not in available or test is None:
        raise ValueError(f"name: {name!r} needs a train and a test split in TFDS, it has {sorted(available)}.")
    whole = test if split == "test" else "train"
    key = f"{builder.info.full_name.replace('/', '-')}-{whole}"
    images, labels = cached(key, lambda: _decode(builder, whole, shape), cache_dir)
    if name in SPLIT_BY_CLASS and split != "test":
        classes = np.unique(labels)
        last = np.isin(labels, classes[len(classes) - len(classes) // 10 :])
        part = last if split == "validation" else ~last
        return images[part], labels[part], num_classes
    held_out = min(5000, len(labels) // 10)
    part = {"train": slice(None, -held_out), "validation": slice(-held_out, None), "test": slice(None)}[split]
    return images[part], labels[part], num_classes


def _builder(name, data_dir):
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"name: {name!r} is not embedded{_near(name, EMBEDDED)}; other sources are read with TFDS: "
            "pip install 'lft_jax[tfds]'."
        ) from error
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        known = [*EMBEDDED, *tfds.list_builders(with_community_datasets=False)]
        raise ValueError(
            f"name: unknown source {name!r}{_near(name, known)}. Known: {', '.join(EMBEDDED)}, data sets "
            "of TFDS such as mnist and cifar10, and paths ending in .npz."
        ) from error
    if not builder.info.splits:
        raise FileNotFoundError(
            f"{name!r} is not prepared in {builder.data_dir}. Set TFDS_DATA_DIR (or data_dir) to its folder, or "
            f"prepare it once (needs TensorFlow): tfds.builder({name!r}, file_format='array_record')"
            ".download_and_prepare()."
        )
    return builder


def _near(name, known):
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def _features(name: str, features: Any) -> tuple[Any, Any]:
    import tensorflow_datasets as tfds

    named = isinstance(features, tfds.features.FeaturesDict)
    image, label = (features[key] if named and key in features else None for key in ("image", "label"))
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(f"name: {name!r} must have an `image` and a class `label`, it has {features}.")
    if None in image.shape or image.np_dtype != np.uint8:
        raise ValueError(f"name: {name!r} must have uint8 images of one size, it has {image.np_dtype} {image.shape}.")
    return image.shape, label.num_classes


def _decode(builder, split, shape):
    data = builder.as_data_source(split=split)
    images, labels = np.empty((len(data), *shape), np.uint8), np.empty(len(data), np.int32)
    for first in range(0, len(data), _READ):
        rows = range(first, min(first + _READ, len(data)))
        for row, example in zip(rows, data.__getitems__(rows), strict=True):  # twice as fast as one by one
            images[row], labels[row] = example["image"], example["label"]
    return images, labels
