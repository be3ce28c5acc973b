"""The spectral rule and the transforms it is made of."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

import lft_jax
from lft_jax import _periods, _spectrum
from lft_jax.optimizers import SpectralRule, rule_from_dict, rule_to_dict, spectral_lstm

CLIPPED = np.exp([-3.0, 6.0])  # signal to noise
SHAPES = ((28, 28, 1), (32, 32, 3), (8, 8, 1), (33, 50, 3), (5, 7, 4))
shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3))


def _images(shape, seed=0, count=6):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def _reference(rule, gradients, noises, theta, scale, progresses):
    """Steps of a rule whose heads are 0, with NumPy's transform of the whole spectrum and no half of it."""
    height, width, _ = theta.shape
    periods = [p for p in _periods.PERIODS if p < min(height, width)]
    longest = max(periods, default=1)
    rows, columns = (-(-side // longest) * longest for side in (height, width))
    group = np.zeros((rows, columns), int)
    for period in (*reversed(periods), 1):
        for i in range(rows):
            for j in range(columns):
                if (i * period) % rows == 0 and (j * period) % columns == 0:
                    group[i, j] = period
    side = np.sqrt(height * width)
    closed = 4.0 if min(height, width) < 128 else 8.0
    needed = {p: np.exp(-4.0) if p == 1 or (p or side) <= side / 8 else closed for p in _spectrum.GROUPS}
    momentum, noise_of_momentum, steps = 0.0, 0.0, []
    for gradient, noise, progress in zip(gradients, noises, progresses, strict=True):
        size = np.sum(gradient**2)
        momentum = rule.decay * momentum + np.fft.fft2(gradient, (rows, columns), (0, 1)) / np.sqrt(size)
        noise_of_momentum = rule.decay**2 * noise_of_momentum + noise / size
        power, weight = np.sum(np.abs(momentum) ** 2, -1), np.zeros(group.shape)
        for period in np.unique(group):
            ratio = np.clip(np.sum(power[group == period]) / np.sum(noise_of_momentum[group == period]), *CLIPPED)
            weight[group == period] = 1 / (1 + (needed[period] / ratio) ** 6)
        image = np.real(np.fft.ifft2(momentum * weight[..., None], axes=(0, 1)))[:height, :width]
        image /= np.sqrt(np.mean(image**2))
        bent = image * np.sqrt((1 + rule.tau**2) / (image**2 + rule.tau**2))
        steps.append(scale * rule.step * (1 - (1 - rule.final) * progress) * bent)
    return steps


def _without_heads(params):
    return {**params, **{name: jax.tree.map(jnp.zeros_like, params[name]) for name in ("periods", "all")}}


@hypothesis.given(shapes)
@hypothesis.settings(max_examples=25, deadline=None)
def test_a_transform_is_inverted_and_keeps_the_power(shape):
    image = _images(shape, count=1)[0]
    of = _spectrum.frequencies(shape)

    @jax.jit
    def transformed_and_back(image):
        spectrum = _spectrum.transformed(image)
        return _spectrum.image_of(spectrum, shape), jnp.sum(_spectrum.group_sums(_spectrum.power(spectrum), of))

    back, total = transformed_and_back(image)
    np.testing.assert_allclose(back, image, atol=1e-5)
    height, width = _spectrum.sides(shape)
    np.testing.assert_allclose(total, height * width * np.sum(image**2), rtol=1e-4)
    assert np.sum(of.counts) == height * width


@pytest.mark.parametrize("period", (1, 2, 4, 8, 16))
def test_what_repeats_with_a_period_has_the_frequencies_of_its_groups(period):
    tile = np.random.default_rng(0).normal(size=(period, period, 3)).astype(np.float32)
    image = np.tile(tile, (32 // period, 64 // period, 1))
    of = _spectrum.frequencies(image.shape)
    powers = _spectrum.group_sums(_spectrum.power(_spectrum.transformed(jnp.asarray(image))), of)
    longer = [g == 0 or g > period for g in _spectrum.GROUPS]
    assert np.sum(powers[np.asarray(longer)]) < 1e-5 * np.sum(powers)
    assert np.all(powers[~np.asarray(longer)] > 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_noise_is_the_variance_of_the_mean(shape):
    copies = _images(shape)
    full = np.fft.fft2(copies, _spectrum.sides(shape), (1, 2))
    variance = np.var(full.real, axis=0, ddof=1) + np.var(full.imag, axis=0, ddof=1)
    half = np.sum(variance, -1)[:, : _spectrum.sides(shape)[1] // 2 + 1] / len(copies)
    np.testing.assert_allclose(_spectrum.noise_of_mean(jnp.asarray(copies)), half, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", (*SHAPES, (128, 131, 1)))
def test_without_heads_it_is_the_formula(shape):
    rule, scale, progresses = spectral_lstm(step=0.6, decay=0.8, final=0.2, tau=0.5), 0.1, (0.0, 0.4, 0.8)
    batches = [_images(shape, seed) + _images(shape, 9, 1) for seed in range(3)]
    theta = jnp.zeros(shape)
    gradients = [np.mean(batch, 0) for batch in batches]
    full = [np.fft.fft2(batch, _spectrum.sides(shape), (1, 2)) for batch in batches]
    noises = [np.sum(np.var(f.real, 0) + np.var(f.imag, 0), -1) / (len(f) - 1) for f in full]
    tx = lft_jax.learned_fine_tuner(_without_heads(rule.init(jax.random.key(0))), rule)
    state = tx.init(theta)
    expected = _reference(rule, gradients, noises, np.zeros(shape), scale, progresses)

    @jax.jit
    def update_of(batch, state, progress):
        noise, gradient = _spectrum.noise_of_mean(batch), jnp.mean(batch, 0)
        return tx.update(gradient, state, theta, noise=noise, scale=scale, progress=progress)

    for batch, progress, step in zip(batches, progresses, expected, strict=True):
        update, state = update_of(batch, state, progress)
        np.testing.assert_allclose(update, -step, rtol=2e-2, atol=2e-4)


def test_it_moves_with_its_gradients():
    """A translation of all gradients translates the step: no pixel is special."""
    rule, batch = SpectralRule(), _images((32, 32, 3))
    tx = lft_jax.learned_fine_tuner(rule.init(jax.random.key(0)), rule)
    theta = jnp.zeros((32, 32, 3))

    @jax.jit
    def step(batch):
        noise, gradient = _spectrum.noise_of_mean(batch), jnp.mean(batch, 0)
        return tx.update(gradient, tx.init(theta), theta, noise=noise, scale=0.1)[0]

    moved = np.roll(batch, (3, 5), (1, 2))
    np.testing.assert_allclose(step(moved), np.roll(step(batch), (3, 5), (0, 1)), atol=1e-4)


def test_what_all_examples_share_passes_and_noise_does_not():
    rows = np.arange(32)
    shared = np.broadcast_to(np.cos(np.pi * rows)[:, None, None], (32, 32, 1)).astype(np.float32)
    batch = 0.3 * shared + _images((32, 32, 1), count=30)
    rule = spectral_lstm(tau=100.0)  # steps along the direction itself
    tx = lft_jax.learned_fine_tuner(_without_heads(rule.init(jax.random.key(0))), rule)
    theta = jnp.zeros((32, 32, 1))
    mean = jnp.asarray(np.mean(batch, 0))
    filtered, _ = tx.update(mean, tx.init(theta), theta, noise=_spectrum.noise_of_mean(jnp.asarray(batch)))

    def alike(direction):
        return np.sum(direction * shared) / np.linalg.norm(direction) / np.linalg.norm(shared)

    assert alike(-np.asarray(filtered)) > 0.97 > alike(np.asarray(mean))


@pytest.mark.parametrize("shape", (*SHAPES, (6,), (4, 6), ()))
def test_leaves_of_any_shape_and_gradients_of_zero(shape):
    rule = spectral_lstm(hidden=3)
    params, theta = rule.init(jax.random.key(0)), jnp.zeros(shape)

    @jax.jit
    @jax.value_and_grad
    def total(params, gradient):
        tx = lft_jax.learned_fine_tuner(params, rule)
        update, state = tx.update(gradient, tx.init(theta), theta)
        return jnp.sum(update**2) + jnp.sum(tx.update(gradient, state, theta + update)[0] ** 2)

    for gradient in (0.0, 1e-30, 1.0):
        value, slopes = total(params, theta + gradient)
        assert gradient or value == 0
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))


def test_derivatives_are_those_of_finite_differences():
    with jax.enable_x64(True):
        rule = spectral_lstm(hidden=3)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), rule.init(jax.random.key(0)))
        batches = jnp.asarray(np.stack([_images((6, 8, 2), seed) for seed in range(3)]), jnp.float64)
        start = 0.01 * batches[0, 0]

        @jax.jit
        def loss(params, start):
            tx = lft_jax.learned_fine_tuner(params, rule)
            theta, state = start, tx.init(start)
            for number, batch in enumerate(batches):
                noise, mean = _spectrum.noise_of_mean(batch), jnp.mean(batch, 0)
                updates, state = tx.update(mean, state, theta, noise=noise, scale=0.1, progress=number / 3)
                theta = theta + updates
            return jnp.sum(theta * batches[0, 1])

        check_grads(loss, (params, start), 1, ("rev",), atol=1e-5, rtol=1e-5)


def test_no_recompilation_and_the_same_state():
    rule, theta = SpectralRule(), jnp.zeros((9, 9, 1))
    tx = lft_jax.learned_fine_tuner(rule.init(jax.random.key(0)), rule)
    update = jax.jit(tx.update)
    state = tx.init(theta)
    for number in range(3):
        updates, state = update(
            theta + number, state, theta, scale=jnp.float32(0.1), progress=jnp.float32(0.1 * number)
        )
    assert update._cache_size() == 1
    assert updates.shape == theta.shape


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"step": 0.0}, "step must be a finite number above 0"),
        ({"tau": -1.0}, "tau must be a finite number above 0"),
        ({"decay": 1.0}, r"decay must be in \(0, 1\), got 1.0"),
        ({"final": 1.5}, r"final must be in \[0, 1\], got 1.5"),
    ),
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        SpectralRule(**fields)


def test_descriptions():
    rule = spectral_lstm(5, step=0.3)
    assert rule_from_dict(rule_to_dict(rule)) == rule
    fields = dataclasses.asdict(rule)
    fields.pop("tau")
    with pytest.raises(ValueError, match="the fields of a SpectralRule are"):
        rule_from_dict({"spectral": fields})
