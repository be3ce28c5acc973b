"""Rates of an attack on the query images, with their intervals."""

import math
import statistics
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95


class Rate(NamedTuple):
    """A share of some images, with its Wilson interval.

    Attributes:
      hits: number of images that count.
      images: number of images.
      rate: their quotient; NaN without images.
      low, high: the interval.
    """

    hits: float
    images: int
    rate: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it: without NaN."""
        return {name: None if value != value else value for name, value in self._asdict().items()}


def wilson(hits: float, images: int, level: float = LEVEL) -> tuple[float, float]:
    """The Wilson interval of a share: the rates that a test of this level does not reject (Wilson 1927).

    Args:
      hits: number of images that count; a mean over several attacks need not be an integer.
      images: number of images; without any, the interval is (0, 1).
      level: of confidence.

    Examples:
      >>> tuple(round(bound, 3) for bound in wilson(8, 10))
      (0.49, 0.943)
    """
    if not images:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    share, spread = hits / images, z * z / images
    middle = (share + spread / 2) / (1 + spread)
    width = z / (1 + spread) * math.sqrt(share * (1 - share) / images + spread / (4 * images))
    # Exact at the ends, where rounding could leave a bound above 0 or below 1.
    return 0.0 if hits == 0 else max(0.0, middle - width), 1.0 if hits == images else min(1.0, middle + width)


def rate(counts: np.ndarray) -> Rate:
    """The share of True in `[N]`."""
    return rate_of(int(np.sum(counts)), len(counts))


def rate_of(hits: float, images: int) -> Rate:
    """The share `hits / images`."""
    return Rate(hits, images, hits / images if images else math.nan, *wilson(hits, images))


def success(clean: np.ndarray, after: np.ndarray, labels: np.ndarray, target: int | None = None) -> Rate:
    """The attack success rate: of the images that are right when clean, the share that the attack succeeds on.

    Args:
      clean: `[N]`, the classes that the model predicts for clean images.
      after: `[N]`, those for perturbed images.
      labels: `[N]`, the true classes.
      target: the class that counts as success; None for any wrong class.
    """
    counted = clean == labels
    if target is None:
        return rate((after != labels)[counted])
    return rate((after == target)[counted & (labels != target)])


def collapse(clean: np.ndarray, after: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How many of the images of class `i` that are right when clean end in class `j`: `[classes, classes]`."""
    found, right = np.zeros((classes, classes), int), clean == labels
    np.add.at(found, (labels[right], after[right]), 1)
    return found
