"""The learned tile as a start: repetition against a loop, its ball, and what refuses it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lft_jax.tasks import AttackLoss, AttackRecipe, Batch, Constraint, uap_family
from lft_jax.tasks import tile as tiles
from lft_jax.tasks.perturbation import norm
from lft_jax.tasks.recipe import attack_oracle, initial_perturbation

KEY = jax.random.key(0)


@given(st.tuples(st.integers(1, 70), st.integers(1, 70)))
def test_it_repeats_from_the_first_pixel(sides):
    found, one = tiles.repeated_tile((*sides, 3)), tiles.repeated_tile((32, 32, 3))
    assert found.shape == (*sides, 3) and found.dtype == np.float32
    for row in range(sides[0]):
        for column in range(sides[1]):
            np.testing.assert_array_equal(found[row, column], one[row % 32, column % 32])


def test_it_is_in_its_range_and_no_constant():
    tile = tiles.repeated_tile((32, 32, 3))
    assert np.all(np.abs(tile) <= 1) and np.mean(np.abs(tile)) > 0.5
    assert np.all(np.std(tile, (0, 1)) > 0.3)


@pytest.mark.parametrize("ball", [("linf", 0.04), ("l2", 3.0)])
@pytest.mark.parametrize("shape", [(40, 50, 3), (32, 32, 3)])
def test_a_start_is_the_tile_within_the_ball(ball, shape):
    constraint = Constraint(*ball)
    theta = np.asarray(initial_perturbation("tile", constraint, shape, jnp.float32, KEY))
    assert norm(theta, ball[0]) <= ball[1] * (1 + 1e-6)
    largest = ball[1] / (1 if ball[0] == "linf" else np.prod(shape) ** 0.5)
    np.testing.assert_allclose(theta, largest * tiles.repeated_tile(shape), rtol=1e-5)


def test_a_family_begins_from_it():
    images, labels = np.full((20, 8, 9, 3), 0.5, np.float32), np.arange(20, dtype=np.int32) % 2
    options = {"ways": 2, "epsilon": 0.1, "recipe": AttackRecipe(start="tile")}
    family = uap_family(images, labels, lambda x: x[:, 0, :2, 0], **options)
    np.testing.assert_allclose(family.init(KEY), 0.1 * tiles.repeated_tile((8, 9, 3)), rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_have_none(channels):
    with pytest.raises(ValueError, match="start: the tile is for images of 3 channels"):
        initial_perturbation("tile", Constraint("linf", 0.1), (8, 8, channels), jnp.float32, KEY)


def test_its_card_says_what_it_was_learned_on():
    card = json.loads(tiles.PATH.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["learned_on"] == "efficientnet_lite2" and card["period"] == tiles.SIDE
    assert {row["role"] for row in card["without_steps"]} == {"training", "choosing"}


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_the_scale_that_optimizers_are_told_is_that_of_the_recipe(factor):
    batch = Batch(jnp.full((3, 4, 4, 1), 0.5), jnp.asarray([0, 1, 0]))

    def estimate(step_scale):
        recipe = AttackRecipe(loss=AttackLoss(), step_scale=step_scale)
        oracle = attack_oracle(lambda x: x[:, 0, :2, 0], batch, recipe, Constraint("linf", 0.1))
        return oracle(jnp.zeros((4, 4, 1)), KEY)

    whole, part = estimate(1.0), estimate(factor)
    np.testing.assert_allclose(part.extras["scale"], 0.1 * factor, rtol=1e-6)
    np.testing.assert_array_equal(part.grads, whole.grads)  # the noise of proxies keeps the scale of the ball


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_scale_of_steps_is_above_zero(value):
    with pytest.raises(ValueError, match="step_scale"):
        AttackRecipe(step_scale=value).check()
