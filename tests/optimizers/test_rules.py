import functools
import json

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lft_jax.optimizers import _network, rules
from lft_jax.optimizers.features import FEATURES, Signal
from lft_jax.optimizers.rules import MomentumUpdate, coordinate_lstm, spatial_lstm

KEY = jax.random.key(5)
EVERYTHING = tuple(FEATURES)
SIGN = MomentumUpdate(step=0.4, decay=0.7)
BOTH_KINDS = pytest.mark.parametrize("build", [coordinate_lstm, functools.partial(spatial_lstm, maps=(3,))])


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def weights(rule, gain=1.0):
    """Random weights in all arrays, biases and the head included."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(rule.init, KEY))
    return jax.tree.unflatten(structure, [np.float32(gain * random(i, *x.shape)) for i, x in enumerate(leaves)])


@functools.partial(jax.jit, static_argnums=0)
def history(rule, params, grads, scale=1.0):
    """The steps `[T, ...]` of a rule for a sequence of gradients `[T, ...]`."""

    def step(state, grad):
        flat = jnp.ones_like(grad)
        number = jnp.asarray(0.5, grad.dtype)
        now = Signal(grad, flat, flat, jnp.stack([flat, grad]), jnp.asarray(scale, grad.dtype), number)
        return rule.apply(params, now, state)[::-1]

    return jax.lax.scan(step, rule.init_state(grads[0]), grads)[1]


# ---- Values ----


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def textbook_lstm(params, xs):
    """One coordinate's features `[T, F]` through stacked LSTM layers and a linear head, `[T, outputs]`."""
    hidden = [np.zeros(len(cell["bias"]) // 4) for cell in params["cells"]]
    memory = [np.zeros_like(h) for h in hidden]
    outputs = []
    for x in xs:
        for layer, cell in enumerate(params["cells"]):
            w_x, w_h = cell["weight"][:, : len(x)], cell["weight"][:, len(x) :]
            i, f, o, g = np.split(w_x @ x + w_h @ hidden[layer] + cell["bias"], 4)
            memory[layer] = sigmoid(f) * memory[layer] + sigmoid(i) * np.tanh(g)
            hidden[layer] = x = sigmoid(o) * np.tanh(memory[layer])
        outputs.append(params["head"]["weight"] @ x + params["head"]["bias"])
    return np.stack(outputs)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("layers", [1, 2])
def test_coordinate_lstm_is_a_textbook_lstm_at_each_coordinate(layers):
    rule = coordinate_lstm(4, layers, features=("raw", "progress"), output_scale=0.3)
    params, grads = weights(rule), random(1, 5, 2, 3)
    steps, params = history(rule, params, grads), jax.tree.map(np.float64, params)
    for i, j in np.ndindex(2, 3):
        xs = np.stack([grads[:, i, j], np.full(5, 0.5)], axis=1)
        np.testing.assert_allclose(steps[:, i, j], 0.3 * textbook_lstm(params, xs)[:, 0], rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_convolutions_are_same_padded_and_shared_by_all_channels():
    maps, height, width, channels = 2, 4, 5, 3
    x = jnp.asarray(random(0, maps, height, width, channels))
    layer = {"weight": jnp.asarray(random(1, 6, 9 * maps)), "bias": jnp.asarray(random(2, 6))}
    kernel = layer["weight"].reshape(6, 3, 3, maps)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("CHWN", "OHWI", "CHWN")
    ) + layer["bias"].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(_network.convolution(layer, x), expected, rtol=1e-10)
    # Without a channel axis there is one channel. A line is an image of height one.
    np.testing.assert_allclose(_network.convolution(layer, x[..., 0]), expected[..., 0], rtol=1e-10)
    line = _network.convolution(layer, x[:, 0, :, 0])
    np.testing.assert_array_equal(line, _network.convolution(layer, x[:, :1, :, :1]).reshape(line.shape))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 5), (5,), (2, 1, 1)])
def test_gradients_of_convolution_and_cell_equal_finite_differences(shape):
    layer = {"weight": jnp.asarray(random(1, 3, 9 * 2)), "bias": jnp.asarray(random(2, 3))}
    jax.test_util.check_grads(_network.convolution, (layer, jnp.asarray(random(0, 2, *shape))), 2, modes=["rev"])
    gates, memory = jnp.asarray(random(3, 12, 4)), jnp.asarray(random(4, 3, 4))
    jax.test_util.check_grads(_network._gated, (gates, memory), 2, modes=["rev"])


@pytest.mark.usefixtures("x64")
def test_spatial_lstm_feeds_its_features_and_maps_to_the_lstm():
    rule = spatial_lstm(4, 1, maps=(3, 2), features="raw", output_scale=0.3, base_update=None)
    params, grads = weights(rule), random(1, 3, 4, 5)
    maps = grads[:, None, None]  # [T, channels, batch, H, W]
    for layer in params["convolutions"]:
        kernel = layer["weight"].reshape(len(layer["bias"]), 3, 3, -1).astype(float)
        axes = ("CNHW", "OHWI", "CNHW")
        maps = np.stack([jax.lax.conv_general_dilated(m, kernel, (1, 1), "SAME", dimension_numbers=axes) for m in maps])
        maps = np.maximum(maps + np.asarray(layer["bias"]).reshape(-1, 1, 1, 1), 0)
    xs = np.concatenate([grads[:, None], maps[:, :, 0]], axis=1)
    steps, params = history(rule, params, grads), jax.tree.map(np.float64, params)
    for i, j in np.ndindex(4, 5):
        expected = 0.3 * textbook_lstm(params, xs[:, :, i, j])[:, 0]
        np.testing.assert_allclose(steps[:, i, j], expected, rtol=1e-6, atol=1e-9)


@BOTH_KINDS
def test_a_base_update_with_a_zero_network_is_a_sign_step(build):
    rule = build(4, 1, features="raw", base_update=SIGN)
    params = weights(rule)
    params["head"] = jax.tree.map(np.zeros_like, params["head"])
    grads, momentum = random(0, 4, 3, 2).astype(np.float32), 0.0
    for grad, step in zip(grads, history(rule, params, grads, scale=0.2), strict=True):
        momentum = 0.7 * momentum + grad
        expected = 0.2 * 0.4 * np.sign(momentum)
        np.testing.assert_allclose(step, expected, rtol=1e-5)


def test_the_network_scales_and_shifts_its_base_update():
    rule = coordinate_lstm(4, 1, features="raw", base_update=SIGN, output_scale=0.1)
    params, grads = weights(rule), random(0, 2, 3)
    a, b = np.moveaxis(
        [0.1 * textbook_lstm(jax.tree.map(np.float64, params), grads[:, i, None]) for i in range(3)], (0, 2), (2, 0)
    )
    momentum = np.stack([grads[0], 0.7 * grads[0] + grads[1]])
    sign = np.sign(momentum)
    expected = 0.2 * (sign / (1 + np.exp(-a) * (1 - 0.4) / 0.4) + b)
    np.testing.assert_allclose(history(rule, params, grads.astype(np.float32), scale=0.2), expected, rtol=1e-4)


# ---- Symmetries ----


@given(order=st.permutations(range(6)))
def test_coordinatewise_rules_commute_with_permutations(order):
    rule = coordinate_lstm(4, 1, features=EVERYTHING, base_update=SIGN)
    params, grads = weights(rule, 0.3), random(0, 2, 6).astype(np.float32)
    permuted = history(rule, params, grads[:, order])
    np.testing.assert_allclose(permuted, history(rule, params, grads)[:, order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8, 1), (2, 4, 2, 4)])
def test_coordinatewise_rules_do_not_depend_on_the_shape(shape):
    rule = coordinate_lstm(4, 1, features=("log_sign", "momentum"), base_update=SIGN)
    params, grads = weights(rule, 0.3), random(0, 2, 64).astype(np.float32)
    shaped = history(rule, params, grads.reshape(2, *shape))
    np.testing.assert_allclose(shaped.reshape(2, 64), history(rule, params, grads), rtol=1e-4, atol=1e-6)


def test_spatial_rules_see_a_neighbourhood_and_commute_with_translations():
    rule = spatial_lstm(4, maps=(3, 3), features="raw", base_update=None)
    params, grads = weights(rule), random(0, 2, 12, 10, 2).astype(np.float32)
    steps = history(rule, params, grads)
    shifted = history(rule, params, np.roll(grads, (2, 1), axis=(1, 2)))
    inside = np.s_[:, 4:-2, 3:-2]  # away from the border by the reach of two convolutions, and by the shift
    np.testing.assert_allclose(shifted[inside], np.roll(steps, (2, 1), axis=(1, 2))[inside], rtol=1e-4, atol=1e-5)
    grads[:, 5, 5, 0] += 10
    changed = np.abs(history(rule, params, grads) - steps) > 1e-5
    reach = np.zeros_like(changed)
    reach[:, 3:8, 3:8, 0] = True
    assert not np.any(changed & ~reach)  # neither farther away nor in the other channel
    assert np.all(np.any(changed[..., 0], axis=(0, 1))[3:8])  # and on every column within reach


# ---- Safety ----


@BOTH_KINDS
@pytest.mark.parametrize("shape", [(), (3,), (0,), (4, 3), (4, 3, 2), (2, 0, 3), (2, 3, 1, 2)], ids=str)
def test_accepts_any_shape(build, shape):
    rule = build(4, 1, features=EVERYTHING, base_update=SIGN)
    steps = jax.eval_shape(
        functools.partial(history, rule), weights(rule), jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    )
    assert steps.shape == (2, *shape)


@BOTH_KINDS
def test_derivatives_are_finite_even_at_zero_gradients(build):
    rule = build(4, 1, features=("log_sign", "adam", "momentum", "spread"), base_update=SIGN)
    params, grads = weights(rule, 0.1), random(0, 2, 3, 2).astype(np.float32)

    def objective(params, grads):
        steps = history(rule, params, grads)
        return jnp.sum(steps), steps

    derivatives = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
    after_zero = np.where(np.arange(2)[:, None, None] > 0, grads, 0)
    for unit in (0, 1e-30, 1, 1e30, after_zero):
        slopes, steps = derivatives(params, grads * np.float32(unit))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((slopes, steps))), unit
        assert all(np.any(x != 0) for x in jax.tree.leaves(slopes[0]["head"])), unit


def test_steps_are_finite_for_large_weights():
    rule = coordinate_lstm(4, 1, features="raw", base_update=SIGN)
    params = weights(rule, 1e6)
    for grads in (np.zeros((2, 3), np.float32), random(0, 2, 3).astype(np.float32)):
        assert np.all(np.isfinite(history(rule, params, grads)))


def test_initial_weights():
    rule = spatial_lstm(30, 2, maps=(8, 5), features=("log_sign", "raw"))
    params = jax.jit(rule.init)(KEY)
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert shapes == {
        "convolutions": [{"weight": (8, 27), "bias": (8,)}, {"weight": (5, 72), "bias": (5,)}],
        "cells": [{"weight": (120, 38), "bias": (120,)}, {"weight": (120, 60), "bias": (120,)}],
        "head": {"weight": (2, 30), "bias": (2,)},
    }
    for cell in params["cells"]:
        np.testing.assert_array_equal(cell["bias"], np.repeat([0, 1, 0, 0], 30))  # forget gates open
        np.testing.assert_allclose(np.std(cell["weight"]), 1 / np.sqrt(cell["weight"].shape[1]), rtol=0.1)
    assert np.max(np.abs(params["head"]["weight"])) < 0.1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: coordinate_lstm(features="log_sing"), r"features: unknown name 'log_sing'. Did you mean 'log_sign'"),
        (lambda: coordinate_lstm(features=()), "features must name at least one of raw, log_sign"),
        (lambda: coordinate_lstm(0), "hidden must be at least 1, got 0"),
        (lambda: coordinate_lstm(float("nan")), "hidden must be at least 1"),
        (lambda: coordinate_lstm(4, 0), "layers must be at least 1"),
        (lambda: spatial_lstm(maps=(4, 0)), "maps must be at least 1"),
        (lambda: coordinate_lstm(output_scale=0), "output_scale must be a finite number above 0, got 0"),
        (lambda: coordinate_lstm(output_scale=-0.1), "output_scale must be"),
        (lambda: coordinate_lstm(output_scale=float("nan")), "output_scale must be"),
        (lambda: coordinate_lstm(output_scale=float("inf")), "output_scale must be"),
        (lambda: MomentumUpdate(step=0), r"MomentumUpdate.step must be in \(0, 1\), got 0"),
        (lambda: MomentumUpdate(step=1.0), r"MomentumUpdate.step must be in \(0, 1\), got 1.0"),
        (lambda: MomentumUpdate(decay=1.0), r"MomentumUpdate.decay must be in \[0, 1\), got 1.0"),
        (lambda: MomentumUpdate(decay=-0.1), "MomentumUpdate.decay"),
        (lambda: MomentumUpdate(decay=float("nan")), "MomentumUpdate.decay"),
        (
            lambda: rules.rule_from_dict({"hidden": 4}),
            r"the fields of a Rule are \['base_update', 'features', 'hidden'",
        ),
    ],
)
def test_invalid_arguments_raise(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("rule", [coordinate_lstm(4), spatial_lstm(4, maps=(3,)), spatial_lstm(base_update=SIGN)])
def test_descriptions_round_trip_through_json(rule):
    again = rules.rule_from_dict(json.loads(json.dumps(rules.rule_to_dict(rule))))
    assert again == rule
    assert hash(again) == hash(rule)


def test_base_updates_of_earlier_versions_must_be_along_the_sign():
    rule = coordinate_lstm(4, base_update=SIGN)
    description = rules.rule_to_dict(rule)
    del description["base_update"]
    assert rules.rule_from_dict({**description, "start": {"step": 0.4, "decay": 0.7}}) == rule
    assert rules.rule_from_dict({**description, "start": {"step": 0.4, "decay": 0.7, "along": "sign"}}) == rule
    with pytest.raises(ValueError, match="base_update: along must be 'sign', got 'gradient'"):
        rules.rule_from_dict({**description, "base_update": {"step": 1.0, "decay": 0.9, "along": "gradient"}})
    with pytest.raises(ValueError, match="fields of a Rule are"):
        rules.rule_from_dict({**rules.rule_to_dict(rule), "start": None})
    with pytest.raises(ValueError, match=r"fields of a base_update are .* got \['stride'\]"):
        rules.rule_from_dict({**description, "start": {"stride": 0.4}})
