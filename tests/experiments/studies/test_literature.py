"""Methods of the literature: their steps against closed forms and plain loops, their budgets, and their grids."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import literature
from experiments.studies.literature import CosineLoss, Descent, Problem
from lft_jax import models
from lft_jax.tasks import AttackLoss, AttackRecipe, PatternSearch
from lft_jax.tasks.perturbation import Batch
from lft_jax.tasks.recipe import search_queries
from lft_jax.tasks.tile import repeated_tile

pytestmark = pytest.mark.standard_promotion

GRID = Path(__file__).parents[3] / "results" / "public" / "grid"
EPSILON = 0.1
MARGIN = AttackLoss("hinge", kappa=1e3)
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(8, 8, 1)).astype(np.float32)


def two_classes(images):
    """Class 0 by a bias, so that the margin of every image has the same gradient, `WEIGHTS`."""
    score = jnp.sum(images * WEIGHTS[None], (1, 2, 3)) + 100
    return jnp.stack([score, jnp.zeros_like(score)], -1)


def curved(images):
    """Three classes, with gradients that differ between images."""
    maps = jnp.asarray(np.random.default_rng(1).normal(size=(64, 3)), jnp.float32)
    return jnp.sin(3 * images.reshape(len(images), -1) @ maps)


def problem(function=two_classes, steps=1, **changes):
    images = RNG.integers(64, 192, (4, 8, 8, 1), np.uint8)  # far from where pixels are clipped
    made = Problem(models.from_function(function), images, np.zeros(4, np.int32), EPSILON, steps, 0)
    return made._replace(**changes)


@pytest.mark.parametrize(
    ("method", "steps", "moved"),
    [
        (Descent(MARGIN, step=0.25), 1, 0.25),
        (Descent(MARGIN, step=0.25), 3, 0.75),
        (Descent(MARGIN, step=0.25, final=0.2), 2, 0.25 + 0.25 * 0.6),
        (Descent(MARGIN, step=0.25, batches=3), 1, 0.75),
        (Descent(MARGIN, step=0.25, batches=3, aggregated=True), 2, 0.5),
        (Descent(MARGIN, step=0.25, batches=5, aggregated=True, decay=0.9), 9, 1.0),
        (Descent(MARGIN, "adam", step=0.25, decay=0.9), 2, 0.5),
    ],
)
def test_steps_along_a_constant_gradient(method, steps, moved):
    found = method(problem(steps=steps))
    np.testing.assert_allclose(found.perturbation, -moved * EPSILON * np.sign(WEIGHTS), atol=1e-5)
    assert found.seconds > 0


def test_normalized_steps_have_one_length():
    theta = Descent(MARGIN, "normalized", step=0.05)(problem()).perturbation
    np.testing.assert_allclose(theta, -0.05 * EPSILON * WEIGHTS / np.sqrt(np.mean(WEIGHTS**2)), rtol=1e-4)


def test_aggregated_steps_are_those_of_a_plain_loop():
    steps, method = 3, Descent(AttackLoss("cross_entropy"), step=0.3, decay=0.9, final=0.5, batches=3, aggregated=True)
    given = problem(curved, steps)
    support = Batch(jnp.asarray(given.images, jnp.float32) / 255, jnp.zeros(4, jnp.int32))
    keys = jax.random.split(jax.random.split(jax.random.key(0))[1], steps)

    def gradient(theta, images, targets):
        def loss(theta):
            chosen = jax.nn.log_softmax(curved(jnp.clip(images + theta[None], 0, 1)))[np.arange(len(targets)), targets]
            return jnp.mean(jnp.maximum(chosen, -12))

        return np.asarray(jax.grad(loss)(jnp.asarray(theta)))

    theta, momentum = np.zeros((8, 8, 1), np.float32), 0.0
    for k in range(steps):
        size = 0.3 * EPSILON * (1 - 0.5 * k / steps)
        ahead, found = theta, []
        batches = method._batches(jax.tree_util.Partial(curved), support, keys[k], jnp.float32(EPSILON))
        for images, targets in zip(*batches, strict=True):
            found.append(gradient(ahead, images, targets))
            ahead = np.clip(ahead - size * np.sign(found[-1]), -EPSILON, EPSILON)
        mean = np.mean(found, 0)
        momentum = 0.9 * momentum + mean / np.mean(np.abs(mean))
        theta = np.clip(theta - size * np.sign(momentum), -EPSILON, EPSILON)
    np.testing.assert_allclose(method(given).perturbation, theta, atol=1e-6)


def test_the_cosine_is_that_of_numpy_and_falls():
    first, second = RNG.normal(size=(2, 5, 4)).astype(np.float32)
    expected = np.sum(first * second, 1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    np.testing.assert_allclose(CosineLoss()(jnp.asarray(first), jnp.asarray(second)), expected, rtol=1e-5)
    given = problem(curved, 8)
    theta = Descent(CosineLoss(), "adam", step=0.4, decay=0.5)(given).perturbation
    clean = given.images.astype(np.float32) / 255
    attacked = curved(jnp.clip(clean + theta[None], 0, 1))
    assert float(jnp.mean(CosineLoss()(attacked, curved(jnp.asarray(clean))))) < 0.7


@pytest.mark.parametrize(
    "method",
    [
        Descent(),
        Descent(batches=3, aggregated=True),
        Descent(CosineLoss(), "adam"),
        Descent(search=PatternSearch(tiles=2, waves=1, refinements=3)),
        Descent(direction="none", search=PatternSearch(tiles=1, waves=0, refinements=1)),
    ],
)
def test_evaluations_are_the_images_that_the_model_sees(method):
    seen = []

    def watched(images):
        jax.debug.callback(seen.append, len(images))
        return curved(images)

    # 15 jigsaws: images of 14 pixels have grids of 1 and 2.
    given = problem(lambda images: watched(images[:, :8, :8]), 4)
    given = given._replace(images=RNG.integers(0, 256, (4, 14, 14, 1), np.uint8))
    found = method(given)
    jax.effects_barrier()
    assert sum(int(count) for count in seen) == found.evaluations
    if method.search is None or method.direction == "none":
        assert 0.9 * 4 * 45 < found.evaluations <= 4 * (60 if isinstance(method.loss, CosineLoss) else 45)


def test_periodic_steps_and_tiles_repeat():
    theta = Descent(period=4, step=0.3)(problem(curved, 3)).perturbation
    np.testing.assert_allclose(theta[4:], theta[:4], atol=1e-6)
    np.testing.assert_allclose(theta[:, 4:], theta[:, :4], atol=1e-6)
    tile = Descent(MARGIN, "none", search=PatternSearch(tiles=1, waves=0, refinements=1))(problem(steps=8))
    np.testing.assert_array_equal(tile.perturbation[2:], tile.perturbation[:-2])
    np.testing.assert_allclose(np.abs(tile.perturbation), EPSILON, rtol=1e-6)


def test_shares_of_a_search_fill_the_budget():
    shares, shape = PatternSearch(tiles=0, waves=1, refinements=3), (10, 32, 32, 3)
    search = literature.within(shares, 1000, shape)
    more = dataclasses.replace(search, refinements=search.refinements + 1)
    spent, beyond = (
        search_queries(AttackRecipe(augmentation=literature.PROXIES, search=each), shape) for each in (search, more)
    )
    assert spent <= 1000 < beyond and search.tiles == 0 and abs(search.refinements - 3 * search.waves) <= 4


@pytest.mark.parametrize("family", literature.FAMILIES)
def test_grids_have_at_least_20_settings_with_names_that_can_be_flags(family):
    settings = literature.settings(family)
    assert len(settings) == len(literature.FAMILIES[family]) >= 20
    assert not any("," in name for name in settings)
    assert all(name.startswith(f"{family} ") for name in settings)


def test_the_best_setting_has_the_best_mean_over_files():
    names = list(literature.settings("sign"))[:3]

    def results(*rates):
        return {"rows": [{"method": n, "asr": r, "draw_asr": [r]} for n, r in zip(names, rates, strict=False)]}

    files = [results(0.1, 0.5, 0.9), results(0.6, 0.3)]
    assert literature.best(files, "sign") == [(names[1], pytest.approx(0.4)), (names[0], pytest.approx(0.35))]
    assert literature.best(files, "sign", least=2) == []


def test_frozen_settings_are_the_best_ones_on_the_choosing_models():
    files = [json.loads((GRID / f"{model}.json").read_text(encoding="utf-8")) for model in ("resnet20", "mobilenet025")]
    assert all(results["about"]["role"] == "choosing" for results in files)
    for family, name in literature.FROZEN.items():
        means = dict(literature.best(files, family))
        assert means[name] == max(means.values()) and len(means) > 1
    assert set(literature.FROZEN) == set(literature.FAMILIES)
    assert literature.frozen()["sga-patterns"].search == PatternSearch() and "tile-patterns" not in literature.frozen()


def test_the_tile_as_a_start_takes_shorter_steps():
    frozen, of_tile = (literature.frozen()[name] for name in ("periodic-16", "periodic-16-from-tile"))
    assert of_tile == dataclasses.replace(frozen, start="tile", step=0.4 * frozen.step)
    assert not {"tile-from-tile", "wave-from-tile"} & set(literature.frozen())


def test_steps_begin_at_the_tile():
    images = np.full((4, 8, 8, 3), 128, np.uint8)
    of = problem(lambda x: jnp.stack([x[:, 0, 0, 0], x[:, 1, 1, 1]], 1), images=images)
    found = Descent(step=0.01, start="tile")(of)
    assert np.max(np.abs(found.perturbation - 0.1 * repeated_tile((8, 8, 3)))) < 0.0011
    assert found.evaluations == Descent(step=0.01)(of).evaluations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "newton"}, "direction: unknown"),
        ({"batches": 0}, "batches must be"),
        ({"batches": 7}, "batches must divide the 30 proxies of a step, got 7"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Descent(), **changes)(problem())
    with pytest.raises(ValueError, match="steps must be"):
        Descent()(problem(steps=0))
