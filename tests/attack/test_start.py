"""The pattern that a search finds and the steps that follow: the better one is the result."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lft_jax import AttackRecipe, PatternSearch, Proxies, ZerothOrder, universal_perturbation
from lft_jax.tasks.perturbation import perturb
from lft_jax.tasks.recipe import end_queries

RNG = np.random.default_rng(0)
STRIPES = np.tile([[1], [-1]], (4, 8)).ravel()
WEIGHTS = (RNG.normal(size=(64, 3)) + np.outer(STRIPES, [1, 0, -1])).astype(np.float32)
IMAGES = RNG.uniform(0.3, 0.7, size=(5, 8, 8, 1)).astype(np.float32)
LABELS = (IMAGES.reshape(5, -1) @ WEIGHTS).argmax(1)
RECIPE = AttackRecipe(augmentation=Proxies(size=6), search=PatternSearch(tiles=4, waves=4, refinements=2))
STAYS, UNDOES, HELPS = optax.sgd(0.0), optax.sgd(-1.0), optax.sgd(1.0)


def linear(images):
    return images.reshape(len(images), -1) @ WEIGHTS


def run(optimizer, *, steps=3, **options):
    options = {"epsilon": 0.1, "recipe": RECIPE, "key": jax.random.key(3), "progress": False, **options}
    return universal_perturbation(linear, IMAGES, LABELS, optimizer=optimizer, steps=steps, **options)


def loss(theta):
    """Of the images themselves, which rank perturbations of a linear model as proxies do."""
    logits = np.asarray(linear(perturb(jnp.asarray(IMAGES), jnp.asarray(theta))))
    logits = logits - logits.max(1, keepdims=True)
    return np.mean(logits[np.arange(5), LABELS] - np.log(np.exp(logits).sum(1)))


def test_steps_that_undo_a_pattern_are_not_the_result():
    found, undone, helped = (run(optimizer) for optimizer in (STAYS, UNDOES, HELPS))
    assert np.any(found.perturbation)
    np.testing.assert_array_equal(undone.perturbation, found.perturbation)
    assert undone.history["loss"][-1] == pytest.approx(loss(found.perturbation), abs=1e-5)
    assert undone.history["loss"][-2] > undone.history["loss"][-1]
    assert loss(helped.perturbation) < loss(found.perturbation)
    # Eleven patterns on six proxies, two of them on the images, two on six other proxies, and a kept start again.
    given = run(HELPS, start=np.zeros((8, 8, 1)))
    assert undone.queries == helped.queries + 5 == given.queries + 11 * 6 + 2 * 5 + 2 * 6 + 5


def test_without_proxies_or_a_search_steps_are_the_result():
    plain = AttackRecipe(augmentation=None, search=RECIPE.search)
    start = run(STAYS).perturbation
    for options in ({"recipe": plain}, {"start": start}):
        ended = run(UNDOES, **options)
        assert loss(ended.perturbation) > loss(start)
    for recipe in (plain, AttackRecipe(augmentation=RECIPE.augmentation)):
        assert end_queries(recipe, IMAGES.shape) == 0


@pytest.mark.parametrize("optimizer", [UNDOES, HELPS])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(optimizer):
    whole, part = run(optimizer), run(optimizer, callback=lambda entry: entry["step"] == 2)
    rest = run(optimizer, start=part)
    np.testing.assert_array_equal(rest.perturbation, whole.perturbation)
    for name, values in whole.history.items():
        if name != "queries":  # the clean images are evaluated again
            np.testing.assert_array_equal(rest.history[name], values)


@pytest.mark.parametrize("optimizer", [UNDOES, HELPS])
def test_evaluations_are_counted(optimizer):
    counted = 0

    def model(images):
        nonlocal counted
        counted += len(images)
        return np.asarray(images).reshape(len(images), -1) @ WEIGHTS

    options = {"epsilon": 0.1, "steps": 2, "recipe": RECIPE, "progress": False}
    oracle = ZerothOrder(num_directions=4, smoothing=1e-2, per_example=True)
    result = universal_perturbation(model, IMAGES, LABELS, oracle=oracle, optimizer=optimizer, **options)
    assert result.queries == result.history["queries"][-1] == counted


def test_fewer_steps_are_compared_with_the_start_too():
    whole = run(UNDOES)
    assert run(UNDOES, max_queries=whole.queries).queries == whole.queries
    shorter = run(UNDOES, max_queries=whole.queries - 1)
    assert len(shorter.history["loss"]) == 2 and shorter.queries == whole.queries - 6 - 5
    np.testing.assert_array_equal(shorter.perturbation, whole.perturbation)  # the start
    assert shorter.history["loss"][-1] == whole.history["loss"][-1] < shorter.history["loss"][0]
    # Its steps go on from where they were, not from the start.
    assert shorter.paused.done == 2 and np.any(np.asarray(shorter.paused.theta) != shorter.perturbation)
    rest = run(UNDOES, start=shorter)
    np.testing.assert_array_equal(rest.perturbation, whole.perturbation)
    assert rest.history["loss"][-1] == whole.history["loss"][-1] and rest.paused is None
    again = run(UNDOES, start=shorter, max_queries=shorter.queries)  # no step is left
    np.testing.assert_array_equal(again.perturbation, shorter.perturbation)
