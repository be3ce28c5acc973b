"""Which images attacks see, which choose among attacks, and which judge them."""

from typing import NamedTuple

import numpy as np

#: Of all images: those that attacks may see, and those that choose the strongest attack.
SUPPORT_SHARE, CHOICE_SHARE = 0.25, 0.15
#: The largest number of images that choose.
MOST_CHOICE = 200
#: The smallest number of images that can be split.
LEAST = 20


class Split(NamedTuple):
    """Row numbers of the images of each part; the classes are as frequent in each part as among all images.

    Attributes:
      support: `[S]`, what attacks may see.
      choice: `[C]`, what chooses the strongest attack of several.
      query: `[Q]`, what the attacks are judged on, and nothing else.
    """

    support: np.ndarray
    choice: np.ndarray
    query: np.ndarray


def stratified_rows(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """A random sample of images in which classes are as frequent as among all of them, up to one image each.

    Args:
      labels: `[N]` integers.
      count: number of images; all of them if there are fewer.
      seed: of the choice.

    Returns:
      `[min(count, N)]` row numbers, in a random order of which each contiguous part is again stratified.

    Examples:
      >>> labels = np.asarray([0] * 60 + [1] * 20)
      >>> rows = stratified_rows(labels, 20)
      >>> np.bincount(labels[rows]).tolist()
      [15, 5]
    """
    labels = np.asarray(labels)
    rng = np.random.default_rng((seed, 0))
    places = np.empty(len(labels))
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        places[rows] = (np.arange(len(rows)) + rng.uniform()) / len(rows)
    return np.argsort(places, kind="stable")[:count]


def split_images(labels: np.ndarray, most_support: int, most_query: int, seed: int) -> Split:
    """Splits the images into disjoint parts.

    Args:
      labels: `[N]`, the classes to stratify by.
      most_support: largest number of support images; there are at most a quarter of all images.
      most_query: largest number of query images.
      seed: of the split.

    Raises:
      ValueError: for fewer than 20 images.
    """
    count = len(labels)
    if count < LEAST:
        raise ValueError(f"images: an audit splits them into three parts and needs at least {LEAST}, got {count}.")
    support, choice = min(int(SUPPORT_SHARE * count), most_support), min(int(CHOICE_SHARE * count), MOST_CHOICE)
    order = stratified_rows(labels, count, seed)
    return Split(order[:support], order[support : support + choice], order[support + choice :][:most_query])


def support_order(labels: np.ndarray, seed: int, draw: int) -> np.ndarray:
    """A random order of the support images in which the first `n` come from as many classes as possible.

    Args:
      labels: `[S]`, the classes of the support images.
      seed: of the audit.
      draw: number of the draw.
    """
    rng = np.random.default_rng((seed, 1, draw))
    order = rng.permutation(len(labels))
    shuffled, ranks = labels[order], np.empty(len(labels), int)
    classes = {label: place for place, label in enumerate(rng.permutation(np.unique(labels)).tolist())}
    for label in classes:
        at = shuffled == label
        ranks[at] = np.arange(np.sum(at))
    turns = np.asarray([classes[label] for label in shuffled.tolist()])
    return order[np.lexsort((turns, ranks))]
