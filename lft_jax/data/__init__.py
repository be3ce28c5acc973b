"""TEMPORARY (lead): the data helper replaces this file with the real face of lft_jax.data."""

import numpy as np


def check_images_labels(images, labels, num_classes=None):
    pass


def class_table(labels, num_classes):
    counts = np.bincount(labels, minlength=num_classes).astype(np.int32)
    table = np.zeros((num_classes, counts.max()), np.int32)
    for c in range(num_classes):
        table[c, : counts[c]] = np.flatnonzero(labels == c)
    return table, counts
