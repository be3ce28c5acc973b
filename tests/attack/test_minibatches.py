"""`AttackRecipe.batch`: steps on random support images, against the gradients of single images."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lft_jax import AttackLoss, AttackRecipe, Augmentation, Proxies, WaveSearch, ZerothOrder, universal_perturbation
from lft_jax.tasks.perturbation import perturb
from lft_jax.tasks.recipe import search_queries, step_queries

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(16, 3)).astype(np.float32)
IMAGES = RNG.uniform(0.3, 0.7, size=(5, 4, 4, 1)).astype(np.float32)
LABELS = (IMAGES.reshape(5, -1) @ WEIGHTS).argmax(1)


def linear(images):
    return images.reshape(len(images), -1) @ WEIGHTS


def one_step(batch, key=0, **options):
    """The perturbation after one gradient step of size 0.1 from zeros."""
    recipe = AttackRecipe(augmentation=None, batch=batch, **options.pop("parts", {}))
    options = {"optimizer": optax.sgd(0.1), "epsilon": 1.0, "steps": 1, "progress": False, **options}
    return universal_perturbation(linear, IMAGES, LABELS, recipe=recipe, key=jax.random.key(key), **options)


def steps_of_images():
    """`[5, 4, 4, 1]`: the step along the gradient of each image alone."""

    def loss(theta, image, label):
        return AttackLoss("cross_entropy")(linear(perturb(image[None], theta)), label[None])[0]

    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(jnp.zeros((4, 4, 1)), jnp.asarray(IMAGES), jnp.asarray(LABELS))
    return -0.1 * np.asarray(grads)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_is_along_the_mean_gradient_of_different_images(batch):
    single, seen = steps_of_images(), set()
    subsets = list(itertools.combinations(range(5), batch))
    means = np.stack([single[list(rows)].mean(0) for rows in subsets])
    for key in range(20):
        distance = np.abs(means - one_step(batch, key).perturbation).max((1, 2, 3))
        assert np.sort(distance)[0] < 1e-6 < np.sort(distance)[1]
        seen |= set(subsets[int(distance.argmin())])
    assert seen == set(range(5))


def test_steps_of_one_run_see_other_images():
    steps = [one_step(1, steps=count, optimizer=optax.sgd(1e-4)).perturbation for count in range(6)[1:]]
    moves = np.diff([np.zeros_like(steps[0]), *steps], axis=0) / 1e-4
    nearest = [int(np.abs(10 * steps_of_images() - move).max((1, 2, 3)).argmin()) for move in moves]
    assert len(set(nearest)) > 1


@pytest.mark.parametrize("batch", [5, 100])
def test_a_batch_of_all_images_changes_nothing(batch):
    np.testing.assert_array_equal(one_step(batch).perturbation, one_step(None).perturbation)
    assert one_step(batch).queries == one_step(None).queries == 5 + 5 + 5


@pytest.mark.parametrize("augmentation", [None, Augmentation()])
def test_queries_are_those_of_the_batch(augmentation):
    seen = []

    def counted(images):
        seen.append(len(images))
        return linear(images)

    oracle, recipe = ZerothOrder(num_directions=3, per_example=True), AttackRecipe(augmentation=augmentation, batch=2)
    options = {"oracle": oracle, "optimizer": optax.sgd(0.1), "epsilon": 0.2, "steps": 3, "progress": False}
    result = universal_perturbation(counted, IMAGES, LABELS, recipe=recipe, **options)
    assert sum(seen) == result.queries == result.history["queries"][-1] == 5 + 3 * (2 * 6 + 5)


def test_a_search_takes_a_batch_too():
    recipe = AttackRecipe(augmentation=None, batch=2, search=WaveSearch(3, 2))
    assert search_queries(recipe, (5, 4, 4, 1)) == 2 * recipe.search.evaluations
    assert step_queries(recipe, (5, 4, 4, 1)) == 2
    assert one_step(2, parts={"search": WaveSearch(3, 2)}).queries == 5 + 2 * recipe.search.evaluations + 2 + 5


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"batch": 0}, "batch of the recipe must be at least 1, got 0"),
        ({"batch": 2, "augmentation": Proxies()}, r"batch of the recipe: Proxies\(size=...\) is that of a step"),
    ],
)
def test_bad_batches_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        AttackRecipe(**parts).check()
