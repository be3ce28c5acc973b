"""The search for a tile or a plane wave to start from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax import AttackRecipe, PatternSearch, WaveSearch, oracles, uap_family
from lft_jax.tasks.patterns import _changed, _image, _Pattern

KEY = jax.random.key(0)
SCALE = jnp.float32(0.25)
SHAPES = [(16, 16, 1), (7, 5, 3)]


def pixels(pattern, shape):
    """A pattern in NumPy, pixel by pixel."""
    period, cells, (down, across), phase = (np.asarray(x) for x in pattern)
    image = np.empty(shape)
    for i, j, c in np.ndindex(shape):
        turns = down * i + across * j + phase[c]
        image[i, j, c] = cells[i % period, j % period, c] if period else np.where(np.cos(2 * np.pi * turns) >= 0, 1, -1)
    return image


def drawn(search, shape, key=KEY):
    """All random patterns of a search with this key, one by one."""
    found, _ = search._drawn(key, shape[2], jnp.float32)
    return [jax.tree.map(lambda leaf: leaf[i], found) for i in range(search.tiles + search.waves)]  # noqa: B023


def loss_for(shape, key=1):
    """Minus the correlation with noise."""
    noise = jax.random.normal(jax.random.key(key), shape)
    return lambda theta: -jnp.sum(theta * noise)


@pytest.mark.parametrize("shape", SHAPES)
def test_patterns_are_tiles_of_each_period_and_waves_with_one_phase_or_one_for_each_channel(shape):
    found = drawn(PatternSearch(tiles=5, waves=4, periods=(2, 3)), shape)
    assert [int(pattern.period) for pattern in found] == [2, 3, 2, 3, 2, 0, 0, 0, 0]
    for pattern in found:
        np.testing.assert_array_equal(_image(pattern, shape), pixels(pattern, shape))
        np.testing.assert_array_equal(np.abs(pattern.cells), 1)
    assert [len(np.unique(pattern.phase)) for pattern in found[5:]] == [1, shape[2], 1, shape[2]]
    frequencies = np.stack([pattern.frequency for pattern in drawn(PatternSearch(waves=500), shape)])
    np.testing.assert_allclose(frequencies.min(0), [0, -0.5], atol=0.02)
    np.testing.assert_allclose(frequencies.max(0), [0.5, 0.5], atol=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_pattern_is_found(shape):
    """Brute force over the same patterns."""
    search, loss = PatternSearch(tiles=6, waves=6, refinements=0), loss_for(shape)
    candidates = [SCALE * _image(pattern, shape) for pattern in drawn(search, shape)]
    expected = min(candidates, key=loss)
    np.testing.assert_array_equal(search(loss, jnp.zeros(shape), SCALE, KEY), expected)


@pytest.mark.parametrize("kind", [{"tiles": 3, "waves": 0, "periods": (2, 4)}, {"tiles": 0, "waves": 3}])
def test_refinements_lower_the_loss_traced_and_in_turns_alike(kind):
    shape = (9, 8, 3)
    losses = []
    for refinements in (0, 5, 60):
        search, loss = PatternSearch(**kind, refinements=refinements), loss_for(shape)
        keys = jax.random.split(KEY, 4)
        found = jax.jit(jax.vmap(lambda key: search(loss, jnp.zeros(shape), SCALE, key)))(keys)  # noqa: B023
        zeros = jnp.zeros(shape)
        state, lowest = search.begin(zeros, keys[1]), []
        for number in range(search.evaluations):
            state, tried, value = search.turn(state, number, zeros, SCALE, loss)
            np.testing.assert_allclose(value, loss(tried), rtol=1e-6)
            lowest.append(value)
        np.testing.assert_array_equal(found[1], search.end(state, zeros, SCALE))
        assert state.lowest == min(lowest[1:]) and state.of_start == lowest[0]
        losses.append(np.asarray(jax.vmap(loss)(found)))
    assert np.all(np.diff(losses, axis=0) <= 0) and np.all(losses[2] < losses[0])


def test_flips_in_turn_find_the_best_tile():
    """For a linear loss each cell matters on its own, so that one flip of each finds the optimum."""
    shape, loss = (6, 4, 3), loss_for((6, 4, 3))
    found = PatternSearch(1, 0, 12)(loss, jnp.zeros(shape), SCALE, KEY)
    sums = np.asarray(jax.grad(loss)(jnp.zeros(shape))).reshape(3, 2, 2, 2, 3).sum((0, 2))
    np.testing.assert_array_equal(found, 0.25 * np.tile(-np.sign(sums), (3, 2, 1)))


def test_changes_are_of_one_cell_within_the_tile_or_of_the_wave():
    tile = _Pattern(jnp.int32(2), jnp.ones((4, 4, 3)), jnp.zeros(2), jnp.arange(3.0))
    units = jax.random.normal(KEY, (6,))
    flipped = [np.argwhere(_changed(tile, 0.01, jnp.int32(i), units).cells == -1) for i in range(12)]
    assert [len(place) for place in flipped] == [1] * 12
    places = {tuple(place[0].tolist()) for place in flipped}
    assert places == set(np.ndindex(2, 2, 3))
    changed, size = _changed(tile, 0.01, jnp.int32(0), units), 0.01 * np.exp(1.5 * units[0])
    np.testing.assert_allclose(changed.frequency, size * units[1:3], rtol=1e-5)
    np.testing.assert_allclose(changed.phase - tile.phase, size * 20 / (2 * np.pi) * units[3:], rtol=1e-3)
    alike = _changed(tile._replace(phase=jnp.zeros(3)), 0.01, jnp.int32(0), units).phase
    assert alike[0] != 0 and len(np.unique(alike)) == 1


def test_a_start_is_kept_if_no_pattern_is_better():
    def loss(theta):
        return jnp.sum(theta**2)

    start, search = jnp.full((5, 5, 1), 0.25), PatternSearch(3, 3, 2)
    np.testing.assert_array_equal(search(loss, start, jnp.float32(0.3), KEY), start)
    kept = jax.grad(lambda theta: jnp.sum(search(loss, theta, jnp.float32(0.3), KEY)))(start)
    np.testing.assert_array_equal(kept, 1)
    np.testing.assert_allclose(jnp.abs(search(loss, start, jnp.float32(0.2), KEY)), 0.2, rtol=1e-6)


def test_evaluations_are_counted():
    """A loss counts its own calls, which are of one pattern each."""
    calls = []

    def loss(theta):
        assert theta.shape == (3, 3, 1)
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(theta)

    search = PatternSearch(4, 3, 5)
    jax.block_until_ready(search(loss, jnp.zeros((3, 3, 1)), SCALE, KEY))
    jax.effects_barrier()
    assert len(calls) == search.evaluations == 13


@pytest.mark.parametrize("evaluations", [2, 3, 4, 9, 40, 200])
def test_a_search_within_a_budget(evaluations):
    search = PatternSearch.within(evaluations).check()
    assert search.evaluations == evaluations and search.tiles >= 1


def test_double_precision(x64):
    theta = PatternSearch(2, 2, 3)(lambda theta: jnp.sum(theta**2 - theta), jnp.zeros((5, 4, 2)), jnp.asarray(0.1), KEY)
    assert theta.dtype == jnp.float64


def test_searches_are_hashable_and_compare_by_value():
    assert hash(PatternSearch(periods=(2, 4))) == hash(PatternSearch(periods=(2, 4)))
    assert PatternSearch(3) != PatternSearch(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PatternSearch().tiles = 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tiles": -1}, "patterns: tiles must be at least 0, got -1"),
        ({"tiles": 0, "waves": 0}, "patterns: tiles \\+ waves must be at least 1, got 0"),
        ({"refinements": -1}, "patterns: refinements must be at least 0, got -1"),
        ({"step": 0.0}, "patterns: step must be a finite number above 0"),
        ({"periods": ()}, "patterns: periods must be a tuple of at least one number, got \\(\\)"),
        ({"periods": (2, 0)}, "patterns: periods must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AttackRecipe(search=PatternSearch(**settings)).check()
    with pytest.raises(ValueError, match="patterns: evaluations must be at least 2, got 1"):
        PatternSearch.within(1)


def test_tasks_start_from_the_best_pattern_and_count_its_queries():
    images = np.random.default_rng(0).uniform(0.2, 0.8, size=(20, 6, 5, 1)).astype(np.float32)
    weights = jax.random.normal(KEY, (30, 2))

    def victim(images):
        return (images - 0.5).reshape(len(images), -1) @ weights

    recipe = AttackRecipe(augmentation=None, search=PatternSearch(4, 3, 2))
    options = {"ways": 2, "shots": 2, "query_shots": 2, "epsilon": 0.1, "recipe": recipe}
    family = uap_family(images, np.arange(20) % 2, victim, estimator=oracles.ZerothOrder(3), **options)
    support = family.sample(KEY).support
    start, queries = family.warm_start(family.init(KEY), support, KEY)
    assert queries == 10 * 4
    np.testing.assert_allclose(jnp.abs(start), 0.1, rtol=1e-6)


def test_the_old_name_of_the_field_is_accepted_with_a_warning():
    search, recipe = WaveSearch(2, 3), AttackRecipe(search=PatternSearch())
    for old in (lambda: AttackRecipe(waves=search), lambda: dataclasses.replace(recipe, waves=search)):
        with pytest.warns(DeprecationWarning, match="AttackRecipe: waves is deprecated, write search instead"):
            assert old() == AttackRecipe(search=search)
    with pytest.warns(DeprecationWarning, match="waves is deprecated"):
        assert recipe.waves is recipe.search
    with pytest.raises(TypeError, match="AttackRecipe: give waves= or search=, not both"):
        AttackRecipe(waves=search, search=search)
    images = np.zeros((4, 2, 2, 1), np.float32)
    options = {"ways": 2, "shots": 1, "query_shots": 1, "epsilon": 0.1}
    family = uap_family(images, np.arange(4) % 2, lambda x: x.reshape(-1, 4)[:, :2], **options)
    with pytest.warns(DeprecationWarning, match="with_recipe: waves= is deprecated, write search= instead"):
        assert family.with_recipe(waves=search).recipe.search == search
    with pytest.raises(TypeError, match="with_recipe: give waves= or search=, not both"):
        family.with_recipe(waves=search, search=search)


def test_the_patterns_of_a_search_are_drawn_as_a_few_numbers_each():
    """Whatever the size of the image, so that a search takes little memory."""
    search = PatternSearch(tiles=40, waves=40, periods=(2, 4))
    found = jax.eval_shape(lambda key: search._drawn(key, 3, jnp.float32)[0], KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(found)) < 80 * 60
