"""What permutations and translations leave as it is.

*Support images.* Exact gradients, zeroth-order estimates along directions that all examples share, the extras of both,
and steps along them do not depend on the order of the images. Where randomness is drawn by position in the batch, order
matters: directions of each example (`per_example`), `Augmentation`, `Proxies` and minibatches; and the images that a
`PatternAttack` chooses.

*Coordinates.* A coordinatewise rule commutes with permutations.

*Translations.* A spatial rule commutes with shifts away from the border, where it pads with zeros; a spectral one with
circular shifts, if no padding is needed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lft_jax import ZerothOrder, coordinate_lstm, fine_tune, learned_fine_tuner, spatial_lstm, spectral_lstm, uap_family
from lft_jax.optimizers.features import FEATURES, Signal
from lft_jax.oracles.directions import DRAW
from lft_jax.tasks.perturbation import Batch
from tests.trust.cases import for_all

SEED = st.integers(0, 2**32 - 1)
RNG = np.random.default_rng(0)
SHAPE, COUNT = (4, 4, 1), 5
WEIGHTS = RNG.normal(size=(16, 3)).astype(np.float32)
RAW = coordinate_lstm(2, 1, features="raw")


# ---- Support images ----


def model(images):
    return jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS)


MODEL = jax.tree_util.Partial(model)


@functools.partial(jax.jit, static_argnums=0)
def answered(directions, support, theta, params, key):
    """The answer of the oracle, and the end of a fine-tuning run."""
    estimator = ZerothOrder(3, directions=directions) if directions else None
    images, labels = np.full((12, *SHAPE), 0.5, np.float32), np.arange(12) % 3
    family = uap_family(
        images, labels, MODEL, ways=3, query_shots=1, epsilon=0.5, estimator=estimator, loss="cross_entropy"
    )
    oracle = family.oracle(support)
    optimizer = learned_fine_tuner(params, RAW)
    run = fine_tune(optimizer, oracle, theta, key, num_steps=3, project=family.project)
    return oracle(theta, key), run.thetas, family.metrics(theta, support)


@for_all(seed=SEED, directions=st.sampled_from(["", *sorted(DRAW)]))
def test_the_order_of_support_images_does_not_matter(seed, directions):
    rng = np.random.default_rng(seed)
    images, labels = (
        rng.uniform(0.2, 0.8, (COUNT, *SHAPE)).astype(np.float32),
        rng.integers(0, 3, COUNT).astype(np.int32),
    )
    theta, order = rng.uniform(-0.1, 0.1, SHAPE).astype(np.float32), rng.permutation(COUNT)
    params = random_weights(RAW, rng)
    one, other = (
        answered(directions, Batch(images[rows], labels[rows]), theta, params, jax.random.key(seed))
        for rows in (np.arange(COUNT), order)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), one, other)


# ---- Coordinates ----


@functools.partial(jax.jit, static_argnums=0)
def steps(rule, params, signals, progress):
    """The steps for a sequence of signals, `[T, *shape]`."""
    state, found = rule.init_state(signals["grad"][0]), []
    for k in range(len(signals["grad"])):
        now = {name: values[k] for name, values in signals.items()}
        step, state = rule.apply(params, Signal(**now, scale=jnp.float32(0.1), progress=progress), state)
        found.append(step)
    return jnp.stack(found)


def random_weights(rule, rng, size=0.5):
    like = jax.eval_shape(rule.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: (size * rng.normal(size=leaf.shape)).astype(np.float32), like)


def random_signals(rng, shape, times=2):
    names = ("grad", "param", "spread", "update")
    found = {name: rng.normal(size=(times, *shape)).astype(np.float32) for name in names}
    return {
        **found,
        "spread": np.abs(found["spread"]),
        "context": rng.normal(size=(times, 2, *shape)).astype(np.float32),
    }


def moved(signals, move):
    """Signals of images whose pixels are moved; those of frequencies stay."""
    return {name: values if name == "noise" else move(values) for name, values in signals.items()}


COORDINATEWISE = coordinate_lstm(2, 1, features=tuple(FEATURES))


@for_all(seed=SEED, progress=st.floats(0, 0.875, width=32))
def test_coordinatewise_rules_commute_with_permutations(seed, progress):
    rng = np.random.default_rng(seed)
    params, signals, order = random_weights(COORDINATEWISE, rng), random_signals(rng, (12,)), rng.permutation(12)
    found = steps(COORDINATEWISE, params, signals, np.float32(progress))
    permuted = steps(COORDINATEWISE, params, moved(signals, lambda x: x[..., order]), np.float32(progress))
    np.testing.assert_allclose(permuted, np.asarray(found)[:, order], rtol=1e-3, atol=1e-5)


# ---- Translations ----

SPATIAL = spatial_lstm(2, 1, maps=(2, 2), features=tuple(FEATURES))  # a neighbourhood of two pixels
SPECTRAL = spectral_lstm(2)


def circular(shift):
    """A move of arrays `[..., H, W, C]`."""
    return lambda x: np.roll(x, shift, (-3, -2))


@for_all(seed=SEED, down=st.integers(0, 7), across=st.integers(0, 7))
def test_spatial_rules_commute_with_shifts_away_from_the_border(seed, down, across):
    rng = np.random.default_rng(seed)
    params, signals = random_weights(SPATIAL, rng), random_signals(rng, (8, 8, 1))
    found, shifted = (
        np.asarray(steps(SPATIAL, params, moved(signals, circular(by)), np.float32(0.5)))
        for by in ((0, 0), (down, across))
    )
    inside = np.zeros((8, 8), bool)
    inside[2:-2, 2:-2] = True
    both = inside & np.roll(inside, (down, across), (0, 1))  # where neither sees a border
    expected = circular((down, across))(found)
    np.testing.assert_allclose(shifted[:, both], expected[:, both], rtol=1e-3, atol=1e-5)


@for_all(seed=SEED, channels=st.sampled_from([1, 2]))
def test_spatial_rules_do_the_same_at_every_size(seed, channels):
    """An image that is repeated: all pixels see the same as in the small one, but for those at a border."""
    rng = np.random.default_rng(seed)
    params, signals = random_weights(SPATIAL, rng), random_signals(rng, (6, 6, channels))

    def repeated(x):
        return np.tile(x, (1,) * (x.ndim - 3) + (2, 2, 1))

    small = np.asarray(steps(SPATIAL, params, signals, np.float32(0.5)))
    large = np.asarray(steps(SPATIAL, params, moved(signals, repeated), np.float32(0.5)))
    np.testing.assert_allclose(large[:, 2:4, 2:4], small[:, 2:4, 2:4], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(large[:, 8:10, 8:10], small[:, 2:4, 2:4], rtol=1e-3, atol=1e-5)


@for_all(seed=SEED, down=st.integers(0, 15), across=st.integers(0, 15), shape=st.sampled_from([(8, 8, 2), (4, 16, 1)]))
def test_spectral_rules_commute_with_circular_shifts(seed, down, across, shape):
    rng = np.random.default_rng(seed)
    params, signals = random_weights(SPECTRAL, rng), random_signals(rng, shape)
    noise = SPECTRAL.init_state(jnp.zeros(shape))["noise"].shape
    signals = {**signals, "noise": rng.exponential(size=(2, *noise)).astype(np.float32)}
    found, shifted = (
        np.asarray(steps(SPECTRAL, params, moved(signals, circular(by)), np.float32(0.5)))
        for by in ((0, 0), (down, across))
    )
    np.testing.assert_allclose(shifted, circular((down, across))(found), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", [SPATIAL, SPECTRAL], ids=["spatial_lstm", "spectral_lstm"])
@for_all(seed=SEED, shape=st.sampled_from([(5, 7, 2), (1, 3, 1), (9,), (6, 6)]))
def test_one_set_of_weights_serves_all_shapes(rule, seed, shape):
    rng = np.random.default_rng(seed)
    found = steps(rule, random_weights(rule, rng), random_signals(rng, shape), np.float32(0))
    assert found.shape == (2, *shape) and bool(jnp.all(jnp.isfinite(found))) and bool(jnp.any(found != 0))
