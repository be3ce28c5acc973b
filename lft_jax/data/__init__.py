"""Image sources and the checks and index tables that episodes are drawn with."""

from lft_jax.data.checks import check_images_labels, class_table, unit_range
from lft_jax.data.episodes import draw_rows, resized
from lft_jax.data.sources import EMBEDDED, SPLITS, ImageSource, load_source

__all__ = [
    "EMBEDDED",
    "SPLITS",
    "ImageSource",
    "check_images_labels",
    "class_table",
    "draw_rows",
    "load_source",
    "resized",
    "unit_range",
]
