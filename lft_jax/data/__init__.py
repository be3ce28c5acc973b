"""Labelled images: loading them, checking them, and sampling the images of a task.

How the pieces compose::

    name --load_source--> ImageSource (uint8 images, labels)              `sources`, `_tfds`, `_cache`
    images, labels --check_images_labels, class_table--> table, counts    `checks`
    key, table, counts, TaskSize --draw_rows--> support and query rows    `episodes`

A new image source is an .npz file, a data set that is prepared for TFDS, or a branch in `sources.load_source`.
"""

from lft_jax.data.checks import check_images_labels, class_table, unit_range
from lft_jax.data.episodes import TaskSize, draw_rows, resized
from lft_jax.data.sources import EMBEDDED, SPLITS, ImageSource, load_source

__all__ = [
    "EMBEDDED",
    "SPLITS",
    "ImageSource",
    "TaskSize",
    "check_images_labels",
    "class_table",
    "draw_rows",
    "load_source",
    "resized",
    "unit_range",
]
