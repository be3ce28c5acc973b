"""The learned fine-tuner as a transformation of optax."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from lft_jax.optimizers.features import FEATURES
from lft_jax.optimizers.rules import MomentumUpdate, coordinate_lstm
from lft_jax.optimizers.sampling import learned_sampler
from lft_jax.optimizers.transform import learned_fine_tuner
from lft_jax.pretrained import list_pretrained, load_pretrained
from tests.optimizers.trees import EVERY_RULE, RULES, assert_close, rows, tree, tuner, weights

# ---- Under JAX's transformations ----


@EVERY_RULE
def test_compiles_once_even_with_a_donated_state(name):
    tx, theta, traces = tuner(RULES[name]), tree(0), []

    @functools.partial(jax.jit, donate_argnums=1)
    def step(grads, state, theta):
        traces.append(None)
        return tx.update(grads, state, theta)

    state = tx.init(theta)
    for k in range(3):
        _, state = step(tree(k), state, theta)
    assert (len(traces), state.count) == (1, 3)


@EVERY_RULE
def test_vmap(name):
    tx, grads, thetas = tuner(RULES[name]), tree(1, lead=(2,)), tree(0, lead=(2,))

    def two_updates(grads, theta):
        _, state = tx.update(grads, tx.init(theta), theta)
        return tx.update(grads, state, theta)

    together = jax.jit(jax.vmap(two_updates))(grads, thetas)
    for i in range(2):
        assert_close(rows(together[0], i), jax.jit(two_updates)(rows(grads, i), rows(thetas, i))[0])


@pytest.mark.usefixtures("x64")
@EVERY_RULE
def test_derivatives_by_the_weights_equal_finite_differences(name):
    grads = {"image": np.random.default_rng(0).normal(size=(3, 2, 2)), "none": None}

    @jax.jit
    def objective(params):
        tx, theta = learned_fine_tuner(params, RULES[name]), {"image": jnp.ones((2, 2)), "none": None}

        def step(carry, grad):
            theta, state = carry
            updates, state = tx.update(grad, state, theta)
            return (optax.apply_updates(theta, updates), state), None

        (theta, _), _ = jax.lax.scan(step, (theta, tx.init(theta)), grads)
        return jnp.sum(theta["image"] ** 2)

    check_grads(objective, (weights(RULES[name], np.float64),), order=1, modes=["rev"])


# ---- Parameters without a gradient ----


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """Like an equinox module: arrays, numbers and functions are fields of one tree."""

    weight: object
    table: object = None
    activation: object = None


@EVERY_RULE
@pytest.mark.parametrize("compiled", [False, True])
def test_arrays_without_a_gradient_are_left_alone(name, compiled):
    """As params of `equinox.filter(model, is_array)`, whose gradients are None at other than floating-point arrays."""
    tx, rng = tuner(RULES[name]), np.random.default_rng(3)
    first, second, *grads = (jnp.asarray(rng.normal(size=(2, 3)), jnp.float32) for _ in range(4))
    others = (jnp.arange(4), np.ones(2, bool), {"key": jax.random.key(0), "none": None})
    layers = [Layer(first, others[0]), Layer(second, others[1], others[2])]
    update = jax.jit(tx.update) if compiled else tx.update
    state, alone = tx.init(layers), tx.init([first, second])
    assert_close(state, alone)  # no state for them
    for _ in range(2):
        updates, state = update([Layer(grad) for grad in grads], state, layers)
        expected, alone = update(grads, alone, [first, second])
        assert_close(updates, [Layer(update) for update in expected])
    assert_close(state, alone)


def test_sgd_takes_the_same_trees():
    params, grads = {"w": jnp.ones(2), "n": jnp.arange(2)}, {"w": jnp.ones(2), "n": None}
    for tx in (optax.sgd(0.1), tuner(RULES["coordinate"])):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)


def test_a_state_of_other_parameters_raises():
    tx = tuner(RULES["coordinate"])
    state = tx.init({"w": jnp.ones(2), "frozen": jnp.ones(3)})
    with pytest.raises(ValueError, match="updates: 1 gradients, but the state is of 2 floating-point parameters"):
        tx.update({"w": jnp.ones(2), "frozen": None}, state)
    with pytest.raises(ValueError, match="updates: 2 gradients, but the state is of 1 floating"):
        tx.update({"w": jnp.ones(2), "n": jnp.arange(2)}, tx.init({"w": jnp.ones(2), "n": jnp.arange(2)}))


# ---- The scale: injected, scheduled, mapped ----


GRADS = {"a": jnp.asarray([0.3, -1.0]), "b": None}
OTHER = {"a": jnp.asarray([0.1, 0.2]), "b": None}


def along(tx, theta, grads, **extra):
    """The updates for a list of gradients at constant parameters, each by a compiled call."""
    state, update, updates = tx.init(theta), jax.jit(tx.update), []
    for grad in grads:
        step, state = update(grad, state, theta, **extra)
        updates.append(step)
    return updates, state


THETA = {"a": jnp.asarray([0.2, -0.1]), "b": None}
SCALED = coordinate_lstm(3, 1, features=("constraint", "raw"), base_update=MomentumUpdate(0.3))


def scaled(scale):
    return learned_fine_tuner(weights(SCALED), SCALED, scale=scale)


@pytest.mark.parametrize("options", [{}, {"static_args": ("params", "rule")}])
def test_inject_hyperparams(options):
    grads = [GRADS, OTHER]
    tx = optax.inject_hyperparams(learned_fine_tuner, **options)(weights(SCALED), SCALED, scale=0.3)
    updates, state = along(tx, THETA, grads)
    expected, alone = along(scaled(0.3), THETA, grads)
    assert_close(updates, expected)
    assert_close(state.inner_state, alone)
    state.hyperparams["scale"] = jnp.float32(0.7)
    assert_close(tx.update(GRADS, state, THETA)[0], scaled(0.7).update(GRADS, alone, THETA)[0])


def test_a_schedule_is_a_scale_for_each_update():
    values, grads = [0.5, 0.25, 0.125], [GRADS, OTHER, GRADS]
    scheduled, state = along(scaled(optax.exponential_decay(0.5, 1, 0.5)), THETA, grads)
    expected, alone = [], scaled(1.0).init(THETA)
    for grad, value in zip(grads, values, strict=True):
        step, alone = scaled(value).update(grad, alone, THETA)
        expected.append(step)
    assert_close(scheduled, expected)
    assert_close(state, alone)  # it counts updates in any case, so a schedule adds nothing to the state
    injected = optax.inject_hyperparams(learned_fine_tuner)
    injected = injected(weights(SCALED), SCALED, scale=optax.exponential_decay(0.5, 1, 0.5))
    assert_close(along(injected, THETA, grads)[0], expected)
    overridden = along(scaled(optax.constant_schedule(0.1)), THETA, grads, scale=0.5)
    assert_close(overridden[0], along(scaled(0.5), THETA, grads)[0])


def test_a_schedule_may_end_at_zero():
    tx, at_centre = scaled(optax.linear_schedule(0.5, 0.0, 1)), {"a": jnp.zeros(2), "b": None}
    updates, state = along(tx, at_centre, [GRADS, OTHER])
    assert np.all(updates[0]["a"] != 0)
    np.testing.assert_array_equal(updates[1]["a"], 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_vmap_over_scales():
    scales = [0.1, 0.5, 2.0]

    @jax.jit
    @jax.vmap
    def together(scale):
        tx = scaled(scale)
        return tx.update(GRADS, tx.init(THETA), THETA)[0]

    updates = together(jnp.asarray(scales))
    for number, scale in enumerate(scales):
        assert_close(rows(updates, number), along(scaled(scale), THETA, [GRADS])[0][0])


# ---- The size of the state ----


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", [name for name in list_pretrained() if name != "uap-linf"])
def test_the_size_of_the_state_is_that_of_the_documents(name):
    tx = learned_fine_tuner(*load_pretrained(name))
    for dtype, times in ((jnp.float32, 44), (jnp.bfloat16, 88)):
        theta = jax.ShapeDtypeStruct((32, 32, 3), dtype)
        assert round(size(jax.eval_shape(tx.init, theta)) / size(theta), 2) == times
        for text in (learned_fine_tuner.__doc__, Path(__file__).parents[2].joinpath("docs", "method.md").read_text()):
            assert f"{times} times" in text


@pytest.mark.parametrize("shape", [(32, 32, 3), (224, 224, 3), (32, 32, 1)])
def test_the_size_of_the_state_of_a_rule_on_frequencies(shape):
    """Half of the frequencies, since images are real: a complex number per channel, and one of noise for all."""
    params, rule = load_pretrained("uap-linf")
    theta = jax.ShapeDtypeStruct(shape, jnp.float32)
    height, width, channels = shape
    numbers = height * (width // 2 + 1) * (2 * channels + 1)
    of_cells = size(jax.eval_shape(learned_fine_tuner(params, rule).init, theta)) / 4 - numbers
    assert 0 < of_cells <= 2 * 8 * 8 + 1  # groups of frequencies, and the count of steps
    held = size(jax.eval_shape(learned_fine_tuner(params, rule).init, theta)) / 4 / theta.size
    assert held == pytest.approx(1.2 if channels == 3 else 1.6, abs=0.15)  # as docs/method.md and the docstring say


@pytest.mark.parametrize("features", [("momentum",), ("momentum", "adam"), ("raw", "progress")])
@pytest.mark.parametrize("base_update", [None, MomentumUpdate()])
def test_the_formula_of_the_size_of_the_state(features, base_update):
    rule = coordinate_lstm(5, 2, features=features, base_update=base_update)
    numbers = sum(x.size for x in jax.tree.leaves(tuner(rule).init(jnp.zeros(1000)).leaves))
    held = {"momentum": 3, "adam": 2}
    expected = 2 * 5 * 2 + (base_update is not None) + sum(held.get(name, 0) for name in features)
    assert numbers // 1000 == expected


# ---- Extra arguments and errors ----


SPY = {"features": tuple(FEATURES), "base_update": MomentumUpdate(0.3)}


@functools.partial(jax.jit, static_argnames="options")
def first_update(grads, theta=None, options=(), **extra):
    """The first update of a rule with all features."""
    tx = tuner(coordinate_lstm(3, 1, **SPY), **dict(options))
    return tx.update(grads, tx.init(grads), theta, **extra)[0]


CONTEXT = {"a": jnp.asarray([[0.1, 0.2], [0.3, 0.4]]), "b": None}


@pytest.mark.parametrize(
    ("known", "absent"),
    [
        (dict(theta=OTHER), dict(theta=jax.tree.map(jnp.zeros_like, OTHER))),
        (dict(spread=OTHER), dict(spread=None)),
        (dict(context=CONTEXT), dict(context=jax.tree.map(jnp.zeros_like, CONTEXT))),
        (dict(progress=0.5), dict(progress=0.0)),
        (dict(scale=0.5), dict(scale=1.0)),
    ],
    ids=lambda given: next(iter(given)),
)
def test_extra_arguments_are_used_and_optional(known, absent):
    default = first_update(GRADS)
    assert_close(first_update(GRADS, **absent), default)
    assert not np.allclose(first_update(GRADS, **known)["a"], default["a"], rtol=1e-4)


def test_ignores_unknown_extra_arguments():
    assert_close(first_update(GRADS, value=3.0, no_such_thing=OTHER), first_update(GRADS))


def test_scale_of_the_call_overrides_that_of_the_constructor():
    assert_close(first_update(GRADS, options=(("scale", 0.3),)), first_update(GRADS, scale=0.3))
    assert_close(first_update(GRADS, options=(("scale", 0.3),), scale=0.7), first_update(GRADS, scale=0.7))


def test_spread_and_context_through_a_mask():
    masked = optax.masked(
        tuner(coordinate_lstm(3, 1, **SPY)), {"a": True, "b": None, "c": False}, mask_compatible_extra_args=True
    )
    grads, spread = ({**tree, "c": jnp.ones(3)} for tree in (GRADS, OTHER))
    context = {**CONTEXT, "c": jnp.ones((2, 3))}
    updates, _ = jax.jit(masked.update)(grads, masked.init(grads), grads, spread=spread, context=context)
    assert_close(updates["a"], first_update(GRADS, GRADS, spread=OTHER, context=CONTEXT)["a"])
    np.testing.assert_array_equal(updates["c"], grads["c"])


@given(hnp.arrays(np.float32, 4, elements=st.floats(-3, 3, width=32)))
def test_descends_a_quadratic(target):
    np.testing.assert_allclose(descend(target), target, atol=0.1)


@jax.jit
def descend(target):
    """The result of 100 steps of at most 0.05 from 0 towards `target`."""
    rule = coordinate_lstm(3, 1, base_update=MomentumUpdate(0.5, decay=0.0))
    tx = learned_fine_tuner(jax.tree.map(jnp.zeros_like, weights(rule)), rule, scale=0.1)

    def step(carry, _):
        theta, state = carry
        updates, state = tx.update(theta - target, state, theta)
        return (optax.apply_updates(theta, updates), state), None

    theta = jnp.zeros(4)
    return jax.lax.scan(step, (theta, tx.init(theta)), length=100)[0][0]


def relu(x):
    return jnp.maximum(x, 0)


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (np.ones(2, np.complex64), "complex64"),
        (np.array("text"), "<U4"),
        (relu, "<function relu at .*> of type function"),
        ("same", "'same' of type str"),
        (3, "3 of type int"),
        (True, "True of type bool"),
    ],
)
def test_leaves_of_other_kinds_raise(leaf, found):
    message = rf"params\['layers'\]\[1\]\.activation must be floating-point, got {found}\. .*equinox\.filter.*masked"
    params = {"layers": [Layer(np.ones(2, np.float32)), Layer(np.ones(2, np.float32), activation=leaf)]}
    with pytest.raises(ValueError, match=message):
        tuner(RULES["coordinate"]).init(params)


@pytest.mark.parametrize("leaf", [np.arange(3), np.ones(2, bool), 1])
def test_a_sampler_takes_floating_point_leaves_only(leaf):
    sampler = coordinate_lstm(3, 1, features=("raw", "update"))
    tx = learned_sampler(weights(sampler), sampler, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"params\['y'\] must be floating-point, got"):
        tx.init({"x": np.ones(2, np.float32), "y": leaf})


@pytest.mark.parametrize("argument", ["theta", "spread", "context"])
def test_trees_of_another_structure_raise(argument):
    name = {"theta": "params"}.get(argument, argument)
    with pytest.raises(ValueError, match=f"{name} must have the structure of the gradients.*'a'.*got.*'z'"):
        first_update(GRADS, **{argument: {"z": jnp.ones(2)}})


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_an_invalid_scale_raises(scale):
    with pytest.raises(ValueError, match="scale must be a finite number above 0"):
        tuner(RULES["coordinate"], scale=scale)


def test_several_scales_raise():
    with pytest.raises(ValueError, match=r"scale must be a scalar, got shape \(2,\); use jax.vmap"):
        tuner(RULES["coordinate"], scale=jnp.ones(2))
