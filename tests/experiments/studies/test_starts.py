"""The study of learned starts: its closed form, its weights, what it draws, and a run at a small size."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.report.starts import starts_section
from experiments.studies import _patterns, starts
from experiments.studies._patterns import BROAD, UNIFORM, LearnedSearch, PatternDistribution, Pool
from lft_jax import PatternSearch

KEY = jax.random.key(0)


def test_the_expected_best_is_that_of_all_draws():
    rng = np.random.default_rng(0)
    weights, losses, success = rng.dirichlet(np.ones(4)), rng.permutation(4), rng.random(4)
    brute = sum(
        np.prod(weights[list(drawn)]) * success[min(drawn, key=lambda i: losses[i])]
        for drawn in itertools.product(range(4), repeat=3)
    )
    found = _patterns.expected_best(*(jnp.asarray(x, jnp.float32) for x in (weights, losses, success)), 3)
    np.testing.assert_allclose(found, brute, rtol=1e-5)


def planted_pool(success):
    """A pool with each kind of tile once, as often as BROAD has it, and each bin and relation of waves once."""
    relations, bins = np.divmod(np.arange(3 * _patterns.BINS**2), _patterns.BINS**2)
    tiles = np.repeat(np.arange(1, len(_patterns.PERIODS)), len(bins) // 8)
    none = np.full(len(tiles), -1)
    kinds, relations, bins = (np.concatenate(pair) for pair in ((0 * bins, tiles), (relations, none), (bins, none)))
    of = success(kinds, bins)
    return Pool(*(np.stack([leaf]) for leaf in (kinds, relations, bins, -of, of.astype(np.float32))))


def test_weights_turn_a_pool_into_the_distribution():
    rng = np.random.default_rng(1)
    table = rng.dirichlet(np.ones(64)).reshape(8, 8)
    of = PatternDistribution((0.4, 0.3, 0.1, 0.1, 0.1), (0.5, 0.2, 0.3), tuple(map(tuple, table.tolist())))
    pool = planted_pool(lambda kinds, bins: 0.0 * kinds)
    parts = tuple(jnp.log(jnp.asarray(part)) for part in dataclasses.astuple(of))
    weights = np.exp(_patterns.log_weights(parts, Pool(*map(jnp.asarray, pool))))[0]
    for part, categories in zip(dataclasses.astuple(of), pool[:3], strict=True):
        chosen = categories[0] >= 0
        shares = np.bincount(categories[0][chosen], weights[chosen])
        np.testing.assert_allclose(shares / shares.sum(), np.ravel(part), rtol=1e-4)


@pytest.mark.standard_promotion
def test_a_fit_finds_what_succeeds():
    place = 8 * 2 + 5
    pool = planted_pool(lambda kinds, bins: ((bins == place) | (kinds == 2)) + 0.0)
    found = _patterns.fit([pool], 2, 0.01)
    table = np.asarray(found.frequencies)
    assert np.argmax(table) == place and table[2, 5] > 5 / 64  # a blur keeps a bin from having all
    assert np.argmax(found.periods[1:]) == 1 and found.periods[2] > 0.5
    np.testing.assert_allclose([np.sum(part) for part in dataclasses.astuple(found)], 1, rtol=1e-6)
    assert _patterns.success_of(found, pool, 2) > _patterns.success_of(UNIFORM, pool, 2)
    # A large penalty leaves what the fit begins with.
    np.testing.assert_allclose(_patterns.fit([pool], 2, 1e4).periods, _patterns.PRIOR.periods, atol=0.02)


def test_waves_have_frequencies_of_their_bin_and_phases_of_their_relation():
    table = np.zeros((8, 8))
    table[1, 6] = 1
    of = PatternDistribution(UNIFORM.periods, (0.5, 0.5, 0.0), tuple(map(tuple, table.tolist())))
    search = LearnedSearch(tiles=0, waves=40, refinements=0, distribution=of).check()
    drawn = search._random(KEY, 3, jnp.float32)
    differ = set()
    for number in range(search.waves):
        image = _image(jax.tree.map(lambda leaf, i=number: leaf[i], drawn), 64)
        spectrum = np.abs(np.fft.fft2(image[..., 0]))
        row, column = np.unravel_index(np.argmax(spectrum), spectrum.shape)
        down, across = np.minimum((row, column), (64 - row, 64 - column)) / 64  # of a cosine of this frequency
        assert 1 / 16 - 1 / 64 <= down <= 2 / 16 + 1 / 64 and 6 / 16 - 1 / 64 <= across <= 7 / 16 + 1 / 64
        agreement = [np.mean(image[..., i] * image[..., j]) for i, j in itertools.combinations(range(3), 2)]
        differ.add(int(np.sum(np.asarray(agreement) < -0.9)))
        assert all(abs(value) > 0.9 for value in agreement)
    assert differ == {0, 2}  # all alike, or one of three is the opposite of both others
    signs = np.sign(np.asarray(drawn.frequency[:, 1]))
    assert {-1, 1} == set(signs.tolist())


def _image(pattern, side):
    """A wave as the docstring of `PatternSearch` defines it."""
    at = np.arange(side)
    turns = at[:, None] * float(pattern.frequency[0]) + at[None] * float(pattern.frequency[1])
    return np.where(np.cos(2 * np.pi * (turns[..., None] + np.asarray(pattern.phase))) >= 0, 1, -1)


def test_a_learned_search_makes_as_many_evaluations():
    found = starts.methods(BROAD, 20)
    searches = {start: found[start, 20].recipe.search for start in starts.STARTS}
    assert searches["uniform"].evaluations == searches["learned"].evaluations
    assert (searches["learned"].waves, searches["learned"].periods) == (16, (2, 2, 3, 3, 4, 4, 8, 8))
    assert _patterns.apportioned(np.asarray([0.5, 0.3, 0.2]), 7).tolist() == [4, 2, 1]
    # Tiles are those of the search that it extends.
    ours, theirs = (search._random(KEY, 3, jnp.float32) for search in (LearnedSearch(8, 16), PatternSearch(8, 16)))
    np.testing.assert_array_equal(ours.cells[:8], theirs.cells[:8])
    np.testing.assert_array_equal(ours.period, theirs.period)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_small_study_resumes_to_the_same_results(tmp_path):
    flags = starts.Config(
        victims=("victims/mnist_small_cnn_0", "victims/mnist_lenet_4"),
        radii=(2.0,),
        patterns=24,
        searched=2,
        judged=3,
        penalties=(1.0,),
        models=("digits_small_cnn_1000",),
        steps=1,
        draws=2,
        queries=50,
        workdir=str(tmp_path / "work"),
        output=str(tmp_path / "found.json"),
    )
    whole = starts.measure(flags)
    assert [(row["start"], row["steps"]) for row in whole["rows"]] == [
        ("uniform", 0),
        ("uniform", 1),
        ("learned", 0),
        ("learned", 1),
    ]
    for cell in whole["models"]:
        made = cell["evaluations"].values()
        assert max(made) - min(made) in (0, 10)  # a start that is kept is measured once more, on the support images
        pair = [row for row in whole["rows"] if row["steps"] == cell["steps"]]
        differences = np.subtract(pair[1]["draw_asr"], pair[0]["draw_asr"])
        np.testing.assert_allclose(cell["difference"], differences.mean())
    found = PatternDistribution.from_dict(whole["distribution"])
    np.testing.assert_allclose([np.sum(part) for part in dataclasses.astuple(found)], 1, rtol=1e-6)
    kept = json.loads((tmp_path / "found.json").read_text())
    kept["rows"] = kept["rows"][:1]
    (tmp_path / "found.json").write_text(json.dumps(kept))
    assert starts.measure(flags)["rows"] == whole["rows"]
    with pytest.raises(ValueError, match=r"output: .* has results of"):
        starts.measure(dataclasses.replace(flags, steps=3))


def test_test_models_are_no_victims_of_the_meta_training():
    with pytest.raises(ValueError, match="public/resnet32 is a model for test, expected one for training"):
        starts.try_patterns("public/resnet32", starts.Config())


def test_differences_are_paired_by_draw_and_the_page_shows_them():
    rows = [
        {"model": "toy", "start": start, "steps": 0, "draw_asr": asr, "evaluations": 968}
        for start, asr in {"uniform": [0.2, 0.6], "learned": [0.3, 0.7]}.items()
    ]
    (cell,) = starts.summary([*rows, {**rows[0], "steps": 20}])  # 20 steps lack the learned start
    np.testing.assert_allclose([cell["difference"], cell["interval"]], [0.1, 0], atol=1e-9)
    validation = {"parts": "all", "penalty": 0.3, "source_gain": {"mnist": 0.015}}
    results = {
        "flags": {"patterns": 8, "radii": [1.0], "victims": ["a", "b"], "images": 10},
        "provenance": {"command": "python -m experiments.studies.starts", "commit": "abc", "device": "1 x cpu"},
        "sources": ["mnist", "mnist"],
        "ranks": [
            {"patterns": kind, "sources": ["mnist", "mnist"], "correlation": 0.25} for kind in ("waves", "tiles")
        ],
        "validation": [validation],
        "chosen": {"parts": "all", "penalty": 0.3},
        "models": [cell],
    }
    text = starts_section(results, "results/public/starts.json", "../starts")
    for line in (
        "| mnist, mnist | 0.25 | 0.25 |",
        "| all | 0.3 | +1.5 |",
        "| `toy` | 0 | 968 | 2 | 40.0 | 50.0 | +10.0 ± 0.0 |",
    ):
        assert line in text


def test_rank_correlations_are_those_of_pairs_of_victims():
    waves, tiles = np.asarray([[1.0, 2, 3], [2, 3, 1], [3, 2, 1]]), np.asarray([[5.0, 6], [6, 5], [7, 8]])
    kinds = np.asarray([[0, 1, 0, 1, 0]])
    losses = np.zeros((3, 5))
    losses[:, ::2], losses[:, 1::2] = waves, tiles
    found = starts.shared_ranks([Pool(kinds, kinds, kinds, row[None], row[None]) for row in losses], ["a", "a", "b"])
    # 1 - 6 sum d^2 / (n (n^2 - 1)) of three ranks: d^2 sums to 6 of the first two, to 8 and 2 with the third.
    assert [(row["patterns"], *row["sources"]) for row in found] == [
        ("waves", "a", "a"),
        ("waves", "a", "b"),
        ("tiles", "a", "a"),
        ("tiles", "a", "b"),
    ]
    np.testing.assert_allclose([row["correlation"] for row in found], [-0.5, (-1 + 0.5) / 2, -1, 0], atol=1e-9)
