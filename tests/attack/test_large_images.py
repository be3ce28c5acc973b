"""Where attacks on images of 128 pixels or more begin by default."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lft_jax import AttackRecipe, Constraint, universal_perturbation
from lft_jax.attack import QUERY
from lft_jax.attack.universal import SEARCH
from lft_jax.tasks.tile import repeated_tile

RNG = np.random.default_rng(0)


def rows_apart(images):
    """Two classes of images of any size."""
    return 10 * jnp.stack([images[:, ::2].mean((1, 2, 3)), images[:, 1::2].mean((1, 2, 3))], 1)


@pytest.mark.parametrize(
    ("sides", "evaluations"), [((127, 140), SEARCH.evaluations), ((140, 127), SEARCH.evaluations), ((128, 128), 0)]
)
def test_large_images_are_attacked_from_zeros_by_default(sides, evaluations):
    images = RNG.uniform(0.3, 0.7, size=(1, *sides, 1)).astype(np.float32)
    found = universal_perturbation(rows_apart, images, epsilon=0.1, steps=1, optimizer=optax.sgd(0.0))
    step = 20 + 30 + 1  # labels of jigsaws, gradients, history
    # Labels, turns, the image; at the end labels, losses, history.
    search = 8 + 12 * SEARCH.evaluations + 2 + 20 + 2 * 30 + 1
    assert found.queries == 1 + step + (search if min(sides) < 128 else 0)


@pytest.mark.parametrize(
    ("channels", "other", "tiled"),
    [
        (3, {}, True),
        (1, {}, False),
        (3, {"target": 1}, False),
        (3, {"norm": "l2", "epsilon": 5.0}, False),
        (3, {"constraint": Constraint("l2", penalty=0.1), "epsilon": None}, False),
        (3, {"oracle": QUERY}, False),
        (3, {"recipe": AttackRecipe()}, False),
    ],
)
def test_large_images_of_three_channels_are_attacked_from_the_tile_by_default(channels, other, tiled):
    images = RNG.uniform(0.3, 0.7, size=(1, 128, 130, channels)).astype(np.float32)
    scales = []

    def update(updates, state, params=None, *, scale, **extra):
        jax.debug.callback(scales.append, scale)
        return jax.tree.map(jnp.zeros_like, updates), state

    still = optax.GradientTransformationExtraArgs(lambda params: (), update)
    found = universal_perturbation(rows_apart, images, steps=1, **{"epsilon": 0.1, "optimizer": still, **other})
    jax.effects_barrier()
    expected = 0.1 * repeated_tile((128, 130, 3)) if tiled else np.zeros((128, 130, channels))
    np.testing.assert_allclose(found.perturbation, expected, rtol=1e-6)
    if other.get("norm", "linf") == "linf" and "constraint" not in other:
        np.testing.assert_allclose(scales, 0.04 if tiled else 0.1, rtol=1e-6)


def test_a_start_that_is_given_takes_the_place_of_the_tile():
    images, start = np.full((1, 128, 128, 3), 0.5, np.float32), np.full((128, 128, 3), 0.05)
    found = universal_perturbation(rows_apart, images, epsilon=0.1, steps=1, optimizer=optax.sgd(0.0), start=start)
    np.testing.assert_allclose(found.perturbation, start, rtol=1e-6)
