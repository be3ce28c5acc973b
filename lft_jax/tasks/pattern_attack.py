"""An attack by queries alone: a race of random patterns, and changes of the best one that are kept if they help.

Here `n` is the number of support images, `B` that of patterns, `[H, W, C]` the shape of an image. Patterns are arrays
of -1 and 1, times the scale of the constraint. All is NumPy: a model that is asked may be anywhere.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from lft_jax import base
from lft_jax.tasks.tile import fits, repeated_tile

#: `(patterns [B, H, W, C], rows [R]) -> logits [B, R, classes]` of these support images.
Ask = Callable[[np.ndarray, np.ndarray], np.ndarray]

#: Kinds of random patterns, in turn: side of a tile in cells, side of a cell in pixels, alike in all channels; and
#: waves: 0, largest frequency in cycles per pixel, alike in all channels.
KINDS = (
    (2, 1, True),
    (2, 1, False),
    (4, 1, True),
    (0, 0.5, True),
    (2, 2, True),
    (0, 0.5, False),
    (4, 1, False),
    (0, 0.25, True),
)
_SHARES = (0.2, 0.5, 1.0)  # of the images that the rounds of a race have seen
_ALONE = 20  # evaluations of each image that are all for the race
_KEPT = 2.5  # patterns of a round for each one of the next
_PERIOD = 4  # side of the tile whose cells changes flip, in pixels
_FIRST = 0.4  # of the images that a change is tried on first
_CLAMP = 12.0  # nats
_SAME = 1e-9  # losses that differ by less are equal
_TOGETHER = 100  # evaluations of a race between two calls of `watch`
_REDRAWN = 8  # attempts to draw a pattern that is not there yet


class Found(NamedTuple):
    """The best pattern so far.

    Attributes:
      pattern: `[H, W, C]`.
      logits: `[n, classes]`, of the support images with it.
      loss: `[]`, on them; infinite before the race.
      order: `[cells]`, in which the changes of cells are tried.
      turn: `[]`, the number of them that were tried.
      idle: `[]`, those since the last one that lowered the loss; they end when this is the number of cells.
    """

    pattern: np.ndarray
    logits: np.ndarray
    loss: np.ndarray | np.floating
    order: np.ndarray
    turn: np.ndarray
    idle: np.ndarray


@dataclasses.dataclass(frozen=True)
class PatternAttack:
    """Attacks by queries alone, without gradients and without estimates of them.

    A universal perturbation of a convolutional network is nearly a periodic texture of full contrast. So the first
    evaluations go into a *race* of random tiles and plane waves (see `PatternSearch`): all are tried on a fifth of
    the images, the best 40% of them on half of the images, the best of these on all. On images of three channels and of
    128 pixels or more along both sides, the learned tile of `AttackRecipe(start="tile")` is one of them. The other
    evaluations try changes of the winner, one at a time. A change is tried on two fifths of the images first, and on
    the others only if it does not raise the loss there; it is kept if it does not raise it on all. First these are the
    signs of the cells of a 4x4 tile, wherever it repeats, one after the other, in one channel or in all. When no cell
    is left whose change lowers the loss, rectangles get one sign, smaller ones with time. Of decisions, changes must
    lower the loss both times.

    Changes fit the images that they are tried on, and may fool fewer others than the winner did. So the last
    evaluations, 80 and one for each image, compare the two on 30 new `Proxies`, and the better one is the result.
    Attacks whose changes have less than four times as many evaluations do not.

    The loss of changes, and of the comparison at the end, is a smooth share of images that are not fooled: the mean of
    `sigmoid(margin / temperature)`, where the margin is the logit of the true class minus the largest other one, or the
    largest other one minus that of a target. Races compare the clamped cross-entropy (see `AttackLoss`).

    Attributes:
      race: share of the evaluations that the race gets beyond the first 20 of each image, which are all for it; in
        [0, 1].
      temperature: of the loss, in logits, above 0.
      decision: whether only the predicted class is used. Both losses are then the share of images that are not fooled.

    Examples:
      >>> PatternAttack().rounds(100, images=10)
      [(25, 2), (10, 5), (4, 10)]
      >>> PatternAttack().rounds(1000, images=10)
      [(100, 2), (40, 5), (16, 10)]
      >>> PatternAttack().images(100, available=600)
      10

    References:
      Races by successive halving: Jamieson & Talwalkar 2016, arXiv 1502.07943. Changes that are kept if they help:
      Guo et al. 2019, SimBA, arXiv 1905.07121; rectangles: Andriushchenko et al. 2020, Square Attack, arXiv 1912.00049.
      Procedural patterns: Co et al. 2019, arXiv 1810.00470.
    """

    race: float = 0.25
    temperature: float = 2.0
    decision: bool = False

    def check(self) -> "PatternAttack":
        """Returns itself.

        Raises:
          ValueError: for a field out of range.
        """
        if not 0 <= self.race <= 1:
            raise ValueError(f"race must be in [0, 1], got {self.race!r}.")
        base.check_positive("temperature", self.temperature)
        return self

    def images(self, evaluations: int, available: int) -> int:
        """The number of support images that an attack with this many evaluations in all uses.

        Few images leave evaluations for many patterns: at least 10 (or a fifth of the evaluations), and the square root
        of a tenth of the evaluations if that is more.

        Args:
          evaluations: of the model on one image, at least 2.
          available: number of images that there are.

        Raises:
          ValueError: for fewer than 2 evaluations.
        """
        base.check_at_least("evaluations", evaluations, 2)
        return min(available, max(1, min(10, evaluations // 5), int((evaluations / 10) ** 0.5)))

    def rounds(self, evaluations: int, images: int) -> list[tuple[int, int]]:
        """The rounds of the race.

        Args:
          evaluations: of the model on one image, without those of the clean images, for the race and all changes; at
            least `images`.
          images: number of support images.

        Returns:
          `[(patterns, images)]`: how many patterns of each round have been tried on how many images after it. The last
          round has all images.
        """
        alone = min(evaluations, _ALONE * images)
        evaluations = alone + int(self.race * (evaluations - alone))
        seen = sorted({max(1, round(share * images)) for share in _SHARES})
        found = [(1, images)]
        for first in range(2, evaluations + 1):
            counts = [max(1, int(first / _KEPT**i)) for i in range(len(seen))]
            rounds = list(zip(counts, seen, strict=True))
            if race_evaluations(rounds) > evaluations:
                break
            found = rounds
        return found

    def losses(
        self,
        logits: Float[np.ndarray, "*many classes"],
        labels: Integer[np.ndarray, "*many"],
        target: int | None = None,
    ) -> Float[np.ndarray, "*many"]:
        """The loss of each image.

        Args:
          logits: of the perturbed images; with `decision`, any numbers whose largest one is at the predicted class.
          labels: the true classes.
          target: class that images should be classified as; None for any wrong one.
        """
        if self.decision:
            classes = np.argmax(logits, -1)
            return (classes == labels if target is None else classes != target).astype(np.float64)
        logits, wanted = np.asarray(logits, np.float64), labels if target is None else np.full_like(labels, target)
        mine = np.take_along_axis(logits, wanted[..., None], -1)[..., 0]
        others = np.where(np.arange(logits.shape[-1]) == wanted[..., None], -np.inf, logits).max(-1)
        margins = (mine - others) * (1 if target is None else -1)
        return 0.5 * (1 + np.tanh(margins / (2 * self.temperature)))

    def start(self, shape: tuple[int, ...], images: int, classes: int, rng: np.random.Generator | None = None) -> Found:
        """What is known before the race; without `rng`, only its structure."""
        nothing = np.zeros(shape, np.float32), np.zeros((images, classes), np.float32)
        order, zero = np.arange(len(_cells(shape)), dtype=np.int32), np.asarray(0, np.int32)
        return Found(*nothing, np.float32(np.inf), order if rng is None else rng.permutation(order), zero, zero)

    def raced(
        self,
        ask: Ask,
        labels: Integer[np.ndarray, " n"],
        shape: tuple[int, ...],
        rng: np.random.Generator,
        rounds: list[tuple[int, int]],
        target: int | None = None,
        watch: Callable[[np.ndarray, float, float], object] | None = None,
    ) -> Found:
        """The winner of a race.

        Args:
          ask: the model on some of the support images.
          labels: `[n]`, their true classes.
          shape: `(H, W, C)`.
          rng: source of the patterns, and of the order of the images.
          rounds: of `rounds(evaluations, n)`.
          target: as for `losses`.
          watch: called every hundred evaluations or so with the best pattern of these, the share of the images that it
            has been tried on, in (0, 1], and its mean loss on them; or None.
        """
        patterns, order = drawn(rounds[0][0], shape, rng), rng.permutation(len(labels))
        totals, left, seen, best = np.zeros(len(patterns)), np.arange(len(patterns)), 0, 0
        logits = np.zeros((len(patterns), len(labels), 0), np.float32)

        def leader(numbers):
            return numbers[np.argmin(np.where(np.isnan(totals[numbers]), np.inf, totals[numbers]))]

        for count, images in rounds:
            left = left[np.argsort(totals[left], kind="stable")][:count]
            rows = order[seen:images]
            many = max(1, _TOGETHER // len(rows))
            for some in np.split(left, range(many, len(left), many)):
                new = ask(patterns[some], rows)
                if not logits.size:
                    logits = np.zeros((len(patterns), len(labels), new.shape[-1]), new.dtype)
                logits[np.ix_(some, rows)] = new
                totals[some] += self._ranks(new, np.broadcast_to(labels[rows], new.shape[:2]), target).sum(1)
                best = leader(some)
                if watch is not None and np.isfinite(totals[best]):
                    watch(patterns[best], images / len(labels), float(totals[best] / images))
            seen, best = images, leader(left)
        found = self.start(shape, len(labels), logits.shape[-1], rng)
        loss = np.float32(np.mean(self.losses(logits[best], labels, target)))
        return found._replace(pattern=patterns[best], logits=logits[best], loss=loss)

    def _ranks(self, logits, labels, target):
        """The loss of each image in a race: the clamped cross-entropy, which tells more of patterns that fool few."""
        if self.decision:
            return self.losses(logits, labels, target)
        logits, wanted = np.asarray(logits, np.float64), labels if target is None else np.full_like(labels, target)
        shifted = logits - logits.max(-1, keepdims=True)
        mine = np.take_along_axis(shifted, wanted[..., None], -1)[..., 0]
        entropies = np.log(np.sum(np.exp(shifted), -1)) - mine
        return -np.minimum(entropies, _CLAMP) if target is None else np.minimum(entropies, _CLAMP)

    def changed(
        self,
        found: Found,
        ask: Ask,
        labels: Integer[np.ndarray, " n"],
        rng: np.random.Generator,
        progress: float,
        target: int | None = None,
    ) -> tuple[Found, int]:
        """Tries one change, and keeps it unless it raises the loss; of decisions, only if it lowers it.

        Args:
          found: the best pattern so far.
          ask: the model on some of the support images.
          labels: `[n]`, their true classes.
          rng: source of the change.
          progress: share of the evaluations that is spent, in [0, 1]; rectangles shrink with it.
          target: as for `losses`.

        Returns:
          The best pattern now, and the evaluations that were made, at most `n`.
        """
        of_cells, count = int(found.idle < len(found.order)), len(labels)
        if of_cells:
            pattern, cells = found.pattern.copy(), _cells(found.pattern.shape)
            row, column, channel = cells[found.order[found.turn % len(cells)]]
            pattern[row::_PERIOD, column::_PERIOD, channel] *= -1
        else:
            pattern = _with_rectangle(found.pattern, rng, progress)
        before = found._replace(turn=found.turn + np.int32(of_cells), idle=found.idle + np.int32(of_cells))
        old, order = self.losses(found.logits, labels, target), rng.permutation(count)
        logits, losses, spent, first = found.logits.copy(), old.copy(), 0, max(1, round(_FIRST * count))
        for rows in filter(len, (order[:first], order[first:])):
            logits[rows] = ask(pattern[None], rows)[0]
            losses[rows] = self.losses(logits[rows], labels[rows], target)
            spent += len(rows)
            tried = order[:spent]
            allowed = -_SAME if self.decision else _SAME  # of decisions, ties say nothing, and would drift
            if not np.mean(losses[tried]) <= np.mean(old[tried]) + allowed:  # also if it is NaN
                return before, spent
        found = before._replace(pattern=pattern, logits=logits, loss=np.float32(np.mean(losses)))
        return found if np.mean(losses) >= np.mean(old) - _SAME else found._replace(idle=np.asarray(0, np.int32)), spent


def race_evaluations(rounds: list[tuple[int, int]]) -> int:
    """Evaluations of a race with these rounds."""
    seen = [0, *(images for _, images in rounds)]
    return sum(count * (images - before) for (count, images), before in zip(rounds, seen, strict=False))


def drawn(number: int, shape: tuple[int, ...], rng: np.random.Generator) -> Float[np.ndarray, "B H W C"]:
    """Random patterns `[number, H, W, C]` of all `KINDS`, in turn; the same one twice only where there are few.

    For images that the learned tile is for, the first one is its signs.
    """
    patterns, known = np.empty((number, *shape), np.float32), set()
    learned = int(fits(shape))
    if learned:
        patterns[0] = np.where(repeated_tile(shape) < 0, -1, 1)
    for i in range(learned, number):
        for attempt in range(_REDRAWN):
            patterns[i] = random_pattern(KINDS[(i + attempt) % len(KINDS)], shape, rng)
            packed = np.packbits(patterns[i] > 0).tobytes()
            if packed not in known:
                break
        known.add(packed)
    return patterns


def random_pattern(
    kind: tuple[int, float, bool], shape: tuple[int, ...], rng: np.random.Generator
) -> Float[np.ndarray, "H W C"]:
    """A random pattern `[H, W, C]` of a kind, see `KINDS`."""
    cells, size, grey = kind
    height, width, channels = shape
    depth = 1 if grey else channels
    if cells:
        tile = rng.choice(np.asarray([-1, 1], np.float32), (cells, cells, depth))
        found = tile[np.arange(height) // size % cells][:, np.arange(width) // size % cells]
    else:
        down, across = rng.uniform([0, -size], [size, size])
        turns = down * np.arange(height)[:, None] + across * np.arange(width)[None]
        found = np.where(np.cos(2 * np.pi * (turns[..., None] + rng.uniform(size=depth))) >= 0, 1, -1)
    return np.broadcast_to(found, shape)


def _cells(shape):
    """`[(row, column, channel or all)]`, the changes of the cells of a tile."""
    height, width, channels = shape
    kinds = [slice(None)] + (list(range(channels)) if channels > 1 else [])
    return list(itertools.product(range(min(_PERIOD, height)), range(min(_PERIOD, width)), kinds))


def _with_rectangle(pattern, rng, progress):
    """The pattern with one sign, or one for each channel, in a random rectangle."""
    pattern, (height, width, channels) = pattern.copy(), pattern.shape
    largest = max(2.0, height * (0.5 * (1 - progress) ** 1.5 + 0.06))
    tall, wide = np.rint(np.exp(rng.uniform(0, np.log(largest), 2))).astype(int)
    top, left = rng.integers(1 - tall, height), rng.integers(1 - wide, width)
    sign = rng.choice(np.asarray([-1, 1], np.float32), 1 if rng.random() < 0.5 else channels)
    pattern[max(top, 0) : top + tall, max(left, 0) : left + wide] = sign
    return pattern
