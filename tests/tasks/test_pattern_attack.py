"""The race of patterns and the changes of its winner, on functions of few parameters."""

import itertools

import numpy as np
import pytest

from lft_jax import PatternAttack
from lft_jax.tasks import pattern_attack
from lft_jax.tasks.pattern_attack import Found, drawn, race_evaluations
from lft_jax.tasks.tile import repeated_tile

SHAPE = (9, 8, 3)
LABELS = np.array([0, 1, 0, 1, 1, 0])


class Linear:
    """Logits of two classes, whose difference is a scalar product with the pattern; counts images."""

    def __init__(self, weights, offsets=0.0):
        self.weights, self.offsets, self.asked = weights, np.broadcast_to(offsets, len(LABELS)), 0

    def __call__(self, patterns, rows):
        self.asked += len(patterns) * len(rows)
        margins = np.einsum("bhwc,hwc->b", patterns, self.weights)[:, None] + self.offsets[rows][None]
        signs = np.where(LABELS[rows] == 0, 1, -1)[None]
        return np.stack([margins * signs / 2, -margins * signs / 2], -1)


def linear(seed=0, **kwargs):
    return Linear(np.random.default_rng(seed).normal(size=SHAPE) / 50, **kwargs)


def raced(attack, ask, evaluations=100, seed=0):
    rounds = attack.rounds(evaluations, len(LABELS))
    return attack.raced(ask, LABELS, SHAPE, np.random.default_rng(seed), rounds), rounds


@pytest.mark.parametrize(("evaluations", "images"), [(1, 1), (6, 6), (7, 6), (40, 10), (190, 10), (3990, 10), (90, 30)])
def test_the_rounds_of_a_race_keep_to_their_evaluations_and_end_with_all_images(evaluations, images):
    rounds = PatternAttack().rounds(evaluations, images)
    counts, seen = zip(*rounds, strict=True)
    assert seen[-1] == images and list(seen) == sorted(set(seen)) and list(counts) == sorted(counts, reverse=True)
    assert counts[-1] >= 1 and images <= race_evaluations(rounds) <= evaluations
    by_hand, before = 0, 0
    for count, each in rounds:
        by_hand += count * (each - before)
        before = each
    assert race_evaluations(rounds) == by_hand


def test_small_budgets_are_all_for_the_race_and_large_ones_for_changes():
    shares = [race_evaluations(PatternAttack().rounds(n, 10)) / n for n in (200, 1000, 4000)]
    assert shares[0] > 0.95 and 0.3 < shares[1] < 0.5 and shares[2] < shares[1]


def test_the_number_of_images():
    counts = [PatternAttack().images(n, 600) for n in (2, 4, 20, 50, 100, 1000, 4000, 100_000)]
    assert counts == [1, 1, 4, 10, 10, 10, 20, 100]
    assert PatternAttack().images(4000, 7) == 7
    with pytest.raises(ValueError, match="evaluations must be at least 2, got 1"):
        PatternAttack().images(1, 7)


@pytest.mark.parametrize("decision", [False, True])
def test_the_losses(decision):
    """Against their definition, with the sigmoid written out."""
    attack, rng = PatternAttack(temperature=0.7, decision=decision), np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 4, 3)), rng.integers(3, size=(5, 4))
    for target in (None, 2):
        found = attack.losses(logits, labels, target)
        for place in np.ndindex(5, 4):
            z, y = logits[place], labels[place] if target is None else target
            margin = (z[y] - np.delete(z, y).max()) * (1 if target is None else -1)
            expected = float(margin > 0) if decision else 1 / (1 + np.exp(-margin / 0.7))
            np.testing.assert_allclose(found[place], expected)


def test_patterns_are_signs_with_their_periods_and_differ():
    shape = (12, 12, 3)
    patterns = drawn(80, shape, np.random.default_rng(0))
    assert np.all(np.abs(patterns) == 1) and len(np.unique(patterns, axis=0)) == 80
    for pattern, (cells, size, grey) in zip(patterns[:8], pattern_attack.KINDS, strict=True):
        if cells:
            period = cells * int(size)
            np.testing.assert_array_equal(pattern[period:], pattern[:-period])
            np.testing.assert_array_equal(pattern[:, period:], pattern[:, :-period])
            np.testing.assert_array_equal(pattern[:: int(size)].repeat(int(size), 0), pattern)
        if grey:
            np.testing.assert_array_equal(pattern, np.broadcast_to(pattern[..., :1], shape))
    for shape in ((12, 12, 1), (1, 2, 1), (3, 5, 2)):  # small images have few
        assert drawn(60, shape, np.random.default_rng(1)).shape == (60, *shape)


def test_a_race_finds_the_best_pattern_where_all_images_agree():
    """Then each round ranks as all images do: brute force over the same patterns."""
    ask = linear()
    found, rounds = raced(PatternAttack(), ask)
    assert ask.asked == race_evaluations(rounds)
    patterns = drawn(rounds[0][0], SHAPE, np.random.default_rng(0))
    margins = np.einsum("bhwc,hwc->b", patterns, ask.weights)
    np.testing.assert_array_equal(found.pattern, patterns[np.argmin(margins)])
    np.testing.assert_allclose(found.loss, 1 / (1 + np.exp(-margins.min() / 2)), rtol=1e-5)


def test_a_race_tells_of_its_best_patterns_as_it_goes():
    """In parts of at most 100 evaluations; each is tried on as many images as all of its round."""
    ask, told, rounds = linear(), [], PatternAttack().rounds(2000, len(LABELS))

    def watch(pattern, share, loss):
        told.append((ask.asked, share, loss, pattern))

    rng = np.random.default_rng(0)
    found = PatternAttack().raced(ask, LABELS, SHAPE, rng, rounds, watch=watch)
    asked, shares, losses, patterns = zip(*told, strict=True)
    assert np.all(np.diff([0, *asked]) <= 100) and asked[-1] == race_evaluations(rounds)
    assert sorted(set(shares)) == [images / len(LABELS) for _, images in rounds] and list(shares) == sorted(shares)
    for loss, pattern in zip(losses, patterns, strict=True):
        margin = np.sum(pattern * ask.weights)
        np.testing.assert_allclose(loss, -np.log1p(np.exp(-margin)), rtol=1e-5)
    np.testing.assert_array_equal(patterns[int(np.argmin(losses))], found.pattern)


def test_a_race_of_decisions_needs_only_the_place_of_the_largest_score():
    attack, rng = PatternAttack(decision=True), np.random.default_rng(5)
    plain = linear(offsets=rng.normal(size=len(LABELS)))

    def garbage(patterns, rows):
        logits = plain(patterns, rows)
        best = np.argmax(logits, -1)[..., None] == np.arange(2)
        return np.where(best, rng.uniform(5, 1e9), rng.uniform(-1e9, 5, logits.shape))

    one, other = raced(attack, plain)[0], raced(attack, garbage)[0]
    np.testing.assert_array_equal(one.pattern, other.pattern)
    assert one.loss == other.loss


def test_changes_of_cells_find_the_best_tile():
    """For a linear loss each cell matters on its own; then no change of a cell lowers it, and rectangles follow."""
    attack, ask, rng = PatternAttack(), linear(), np.random.default_rng(1)
    found = raced(attack, ask)[0]
    tile = np.ones((4, 4, 3), np.float32)
    pattern = np.tile(tile, (3, 2, 1))[:9]
    found = found._replace(pattern=pattern, logits=ask(pattern[None], np.arange(6))[0])
    for _ in range(400):
        if found.idle >= len(found.order):
            break
        found, spent = attack.changed(found, ask, LABELS, rng, 0.5)
        assert spent in (2, 6)
    sums = np.zeros((4, 4, 3))
    for i, j, c in np.ndindex(SHAPE):
        sums[i % 4, j % 4, c] += ask.weights[i, j, c]
    np.testing.assert_array_equal(found.pattern, np.tile(-np.sign(sums), (3, 2, 1))[:9])
    losses = [found.loss]
    for _ in range(200):
        found, _ = attack.changed(found, ask, LABELS, rng, 0.9)
        losses.append(found.loss)
    assert np.all(np.diff(losses) <= 1e-6) and losses[-1] < losses[0]


def test_a_change_that_raises_the_loss_is_not_kept_whatever_the_first_images_say():
    """On the first two images the loss falls, on the others it rises more."""
    attack = PatternAttack()
    start = attack.start(SHAPE, 6, 2, np.random.default_rng(0))._replace(pattern=np.ones(SHAPE, np.float32))

    def ask(patterns, rows):
        calls.append(list(rows))
        margins = np.where(np.isin(rows, calls[0]), -1.0, 5.0)
        signs = np.where(LABELS[rows] == 0, 1, -1)
        return np.stack([margins * signs / 2, -margins * signs / 2], -1)[None]

    calls = []
    found, spent = attack.changed(start, ask, LABELS, np.random.default_rng(0), 0.0)
    assert spent == 6 and sorted(itertools.chain(*calls)) == list(range(6))
    np.testing.assert_array_equal(found.pattern, start.pattern)
    assert found.idle == found.turn == 1


def test_rectangles_have_one_sign_or_one_for_each_channel():
    rng, pattern = np.random.default_rng(0), np.ones((20, 16, 3), np.float32)
    areas = []
    for progress in (0.0, 1.0):
        sizes = []
        for _ in range(300):
            changed = pattern_attack._with_rectangle(pattern, rng, progress)
            places = np.argwhere(np.any(changed < 0, -1))
            sizes.append(len(places))
            if len(places):
                (top, left), (bottom, right) = places.min(0), places.max(0) + 1
                inside = changed[top:bottom, left:right]
                assert np.all(inside == inside[:1, :1])
        areas.append(np.mean(sizes))
    assert areas[1] < areas[0] / 4


def test_nan_never_wins():
    ask = linear()

    def broken(patterns, rows):
        logits = ask(patterns, rows)
        return np.where(np.sum(patterns, (1, 2, 3))[:, None, None] > 0, np.nan, logits)

    found = raced(PatternAttack(), broken)[0]
    assert np.isfinite(found.loss)
    kept, _ = PatternAttack().changed(found, lambda *args: np.nan * ask(*args), LABELS, np.random.default_rng(0), 0.0)
    np.testing.assert_array_equal(kept.pattern, found.pattern)


def test_before_a_race_there_is_the_same_structure():
    before, after = PatternAttack().start(SHAPE, 6, 2), raced(PatternAttack(), linear())[0]
    assert isinstance(before, Found)
    for one, other in zip(before, after, strict=True):
        assert np.shape(one) == np.shape(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"race": -0.1}, "race must be in \\[0, 1\\], got -0.1"),
        ({"race": 1.5}, "race must be in \\[0, 1\\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PatternAttack(**settings).check()


@pytest.mark.parametrize(("shape", "learned"), [((128, 140, 3), True), ((127, 140, 3), False), ((128, 140, 1), False)])
def test_the_learned_tile_is_in_the_race_of_large_images(shape, learned):
    first, second = drawn(2, shape, np.random.default_rng(0))
    if learned:
        np.testing.assert_array_equal(first, np.where(repeated_tile(shape) < 0, -1, 1))
    else:  # a random tile of 2x2 pixels
        np.testing.assert_array_equal(first[2:], first[:-2])
    assert set(np.unique(np.stack([first, second]))) <= {-1, 1}


def test_the_learned_tile_wins_a_race_that_it_should_win():
    shape, labels = (128, 128, 3), np.zeros(10, int)
    wanted = np.where(repeated_tile(shape) < 0, -1, 1)

    def ask(patterns, rows):  # margins fall with the likeness to the tile
        likeness = np.mean(patterns * wanted[None], (1, 2, 3))
        return np.broadcast_to(np.stack([1 - likeness, likeness], -1)[:, None], (len(patterns), len(rows), 2))

    attack = PatternAttack()
    found = attack.raced(ask, labels, shape, np.random.default_rng(0), attack.rounds(100, 10))
    np.testing.assert_array_equal(found.pattern, wanted)
