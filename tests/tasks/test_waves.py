"""The search for a plane wave to start from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax import WaveSearch, evaluation, oracles, uap_family
from lft_jax.evaluation.baselines import make_baselines
from lft_jax.tasks.recipe import AttackRecipe
from lft_jax.tasks.waves import _wave

KEY = jax.random.key(0)


def stripes(down, across, phase, shape=(9, 8, 2)):
    """A wave in NumPy, pixel by pixel."""
    wave = np.empty(shape)
    for i, j, c in np.ndindex(shape):
        wave[i, j, c] = 1 if np.cos(2 * np.pi * (down * i + across * j + phase)) >= 0 else -1
    return wave


def test_a_wave_is_stripes_of_full_contrast_the_same_in_all_channels():
    for numbers in ((0.1137, -0.3719, 0.2031), (0.5, 0.0133, 0.9037), (0.0, 0.2617, 0.4011)):
        wave = _wave(jnp.asarray(numbers, jnp.float32), (9, 8, 2))
        np.testing.assert_array_equal(wave, stripes(*numbers))


@pytest.mark.parametrize("shape", [(16, 16, 1), (12, 20, 3)])
def test_the_search_finds_a_hidden_wave(shape):
    """The loss is minus the correlation with the hidden wave; refinement finds a lower one than 50 random waves."""
    hidden = stripes(0.13, 0.21, 0.3, shape)

    def loss(theta):
        return -jnp.mean(theta * hidden.astype(np.float32))

    def found(key, **settings):
        return loss(WaveSearch(**settings)(loss, jnp.zeros(shape), jnp.float32(1), key))

    keys = jax.random.split(KEY, 10)
    drawn = np.asarray(jax.vmap(lambda key: found(key, candidates=50, refinements=0))(keys))
    refined = np.asarray(jax.vmap(lambda key: found(key, candidates=50, refinements=150))(keys))
    assert np.all(refined <= drawn) and np.mean(refined < drawn) >= 0.7
    assert refined.min() < -0.85 < drawn.min()


def test_a_start_is_kept_if_no_wave_is_better_and_waves_have_the_scale():
    def loss(theta):
        return jnp.sum(theta**2)

    start = jnp.full((4, 4, 1), 0.25)
    search = WaveSearch(5, 5)
    np.testing.assert_array_equal(search(loss, start, jnp.float32(0.3), KEY), start)
    kept = jax.grad(lambda theta: jnp.sum(search(loss, theta, jnp.float32(0.3), KEY)))(start)
    np.testing.assert_array_equal(kept, 1)
    wave = search(loss, start, jnp.float32(0.2), KEY)
    np.testing.assert_allclose(jnp.abs(wave), 0.2, rtol=1e-6)


def test_evaluations_are_counted():
    """A loss counts its own calls."""
    calls = []

    def loss(theta):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(theta)

    search = WaveSearch(7, 4)
    jax.block_until_ready(search(loss, jnp.zeros((3, 3, 1)), jnp.float32(1), KEY))
    jax.effects_barrier()
    assert len(calls) == search.evaluations == 12
    for cost in (2, 3, 9, 160):
        assert WaveSearch.within(cost).check().evaluations == cost
    with pytest.raises(ValueError, match="waves must be at least 2, got 1"):
        WaveSearch.within(1)


def test_attack_tasks_start_from_the_best_wave_and_count_its_queries():
    """On a linear victim, the start is a wave of size epsilon, and the queries include those of the search."""
    random = np.random.default_rng(0)
    images = random.uniform(0.2, 0.8, size=(30, 6, 6, 1)).astype(np.float32)
    weights = jnp.asarray(random.normal(size=(36, 3)), jnp.float32)

    def victim(images):
        return (images - 0.5).reshape(len(images), -1) @ weights

    labels = np.asarray(victim(images)).argmax(1)
    family = uap_family(
        images,
        labels,
        victim,
        ways=2,
        shots=2,
        query_shots=2,
        epsilon=0.1,
        estimator=oracles.ZerothOrder(3),
        recipe=AttackRecipe(augmentation=None, search=WaveSearch(6, 5)),
    )
    pgd = make_baselines("linf")["pgd"]
    options = {"num_steps": 2, "at": (1, 2)}
    still = {**pgd.default.params, "step": 0.0}
    keys = jax.random.split(KEY, 8)
    found = evaluation.evaluate(pgd.learner, still, family, keys, **options)
    np.testing.assert_array_equal(found["queries"], np.tile([[4 * 12 + 24, 4 * 12 + 48]], (8, 1)))
    np.testing.assert_allclose(found["linf"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(found["l1"], 3.6, rtol=1e-5)
    plain = evaluation.evaluate(pgd.learner, still, family.with_recipe(search=None), keys, **options)
    assert np.all(plain["linf"] == 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 0}, "waves: candidates must be at least 1, got 0"),
        ({"refinements": -1}, "waves: refinements must be at least 0, got -1"),
        ({"step": 0.0}, "waves: step must be a finite number above 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WaveSearch(**settings).check()
