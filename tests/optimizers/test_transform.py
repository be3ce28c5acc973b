import functools

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
from lft_jax.optimizers.rules import MomentumUpdate, coordinate_lstm, spatial_lstm
from lft_jax.optimizers.transform import learned_fine_tuner

KEY = jax.random.key(2)
RULES = {
    "coordinate": coordinate_lstm(3, 1, features=("log_sign", "constraint")),
    "spatial": spatial_lstm(3, 1, maps=(2,), features=("momentum", "spread"), base_update=MomentumUpdate(0.3)),
}
DTYPES = {"image": "float32", "list": ["bfloat16", None], "empty": "float16"}
SHAPES = {"image": (2, 2, 1), "list": [(), None], "empty": (0, 2)}
EVERY_RULE = pytest.mark.parametrize("name", RULES)


def tree(seed, dtypes=DTYPES, lead=()):
    """A dict of random arrays with a list, a None, a scalar and an empty leaf; all shapes are prefixed by `lead`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda d, shape: np.asarray(rng.normal(size=(*lead, *shape)), jnp.dtype(d)), dtypes, SHAPES)


def weights(rule, dtype=np.float32):
    leaves, structure = jax.tree.flatten(jax.eval_shape(rule.init, KEY))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [dtype(0.3 * rng.normal(size=x.shape)) for x in leaves])


def tuner(rule, **options):
    return learned_fine_tuner(weights(rule), rule, **options)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def check(a, e):
        slack = 1 if jnp.finfo(a.dtype).bits > 16 else 2000  # half precision rounds
        np.testing.assert_allclose(np.float64(a), np.float64(e), rtol=rtol * slack, atol=atol * slack)

    jax.tree.map(check, actual, expected)


# ---- Compositions with optax ----


def images_only(tree):
    return jax.tree.map(lambda x: x.ndim == 3, tree)


def rows(tree, index):
    return jax.tree.map(lambda x: x[np.asarray(index)], tree)


def blank(tree, index):
    return jax.tree.map(
        lambda x: np.where(np.isin(range(len(x)), index).reshape(-1, *[1] * (x.ndim - 1)), 0 * x, x), tree
    )


def clipped(grads):
    return jax.tree.map(lambda g: np.clip(g, -0.5, 0.5), grads)


def pair_means(grads):
    return jax.tree.map(lambda g: ((g[::2] + g[1::2]) / 2)[np.asarray([0, 0, 1, 1])], grads)


def labels(tree):
    return jax.tree.map(lambda image: "lft" if image else "sgd", images_only(tree))


def with_nan(grads):
    return jax.tree.map(lambda g: g + np.reshape([0, np.nan, 0, 0], (4, *[1] * (g.ndim - 1))).astype(g.dtype), grads)


#: name: (wrap, feed, expect). `feed` changes the gradients `[4, ...]` that the wrapped transformation gets. `expect`
#: returns its expected updates, from the unchanged gradients and `alone(gradients)`, the updates without the wrapper.
COMPOSITIONS = {
    "chain": (
        lambda tx: optax.chain(optax.clip(0.5), tx, optax.scale(2.0)),
        lambda grads: grads,
        lambda grads, alone: jax.tree.map(lambda u: 2 * u, alone(clipped(grads))),
    ),
    "masked": (
        lambda tx: optax.masked(tx, images_only),
        lambda grads: grads,
        lambda grads, alone: {**grads, "image": alone(grads)["image"]},
    ),
    "multi_transform": (
        lambda tx: optax.multi_transform({"lft": tx, "sgd": optax.sgd(0.5)}, labels),
        lambda grads: grads,
        lambda grads, alone: {**jax.tree.map(lambda g: -0.5 * g, grads), "image": alone(grads)["image"]},
    ),
    "multi_steps": (
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda grads: grads,
        lambda grads, alone: blank(rows(alone(rows(pair_means(grads), [0, 2, 2, 2])), [0, 0, 1, 1]), [0, 2]),
    ),
    "apply_if_finite": (
        lambda tx: optax.apply_if_finite(tx, 3),
        with_nan,
        lambda grads, alone: blank(rows(alone(rows(grads, [0, 2, 3, 3])), [0, 0, 1, 2]), [1]),
    ),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def updates_along(name, wrap, grads, theta, params):
    """The updates `[K, ...]` for gradients `[K, ...]`, at constant parameters."""
    tx = wrap(learned_fine_tuner(params, RULES[name]))

    def step(state, grad):
        return tx.update(grad, state, theta)[::-1]

    return jax.lax.scan(step, tx.init(theta), grads)[1]


def plain(tx):
    return tx


@pytest.mark.standard_promotion
@EVERY_RULE
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_composes(composition, name):
    wrap, feed, expect = COMPOSITIONS[composition]
    theta, grads, params = tree(0), tree(1, lead=(4,)), weights(RULES[name])
    expected = expect(grads, lambda grads: jax.device_get(updates_along(name, plain, grads, theta, params)))
    assert_close(updates_along(name, wrap, feed(grads), theta, params), expected)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_derivatives_by_the_weights_are_finite_in_compositions(composition):
    wrap, feed, _ = COMPOSITIONS[composition]
    theta, grads = {"image": jnp.ones((1, 2, 1))}, feed({"image": jnp.ones((4, 1, 2, 1))})

    @jax.jit
    @jax.grad
    def derivatives(params):
        return jnp.sum(updates_along("coordinate", wrap, grads, theta, params)["image"])

    slopes = jax.tree.leaves(derivatives(weights(RULES["coordinate"])))
    assert all(np.all(np.isfinite(x)) and np.any(x != 0) for x in slopes)


@pytest.mark.standard_promotion
@EVERY_RULE
@pytest.mark.parametrize("composition", ["plain", *COMPOSITIONS])
def test_keeps_the_shapes_of_its_state_and_all_dtypes(composition, name):
    wrap = COMPOSITIONS[composition][0] if composition in COMPOSITIONS else plain
    tx, theta = wrap(tuner(RULES[name])), tree(0)
    state = jax.eval_shape(tx.init, theta)
    updates, new_state = jax.eval_shape(tx.update, tree(1), state, theta)
    assert new_state == state  # structures, shapes, dtypes, weak types
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(lambda g: (g.shape, g.dtype), theta)


@pytest.mark.usefixtures("x64")
@EVERY_RULE
def test_leaves_of_all_dtypes(name):
    # Half precision is computed in float32 and then rounded.
    dtypes, tx = ["float16", "bfloat16", "float32", "float64"], tuner(RULES[name])
    grads = [jnp.asarray([0.5, -1.0, 0.25], dtype) for dtype in dtypes]
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    assert [u.dtype for u in updates] == dtypes
    assert [leaf["cells"][0][0].dtype for leaf in state.leaves] == ["float32", "float32", "float32", "float64"]
    assert_close(updates, [updates[3].astype(dtype) for dtype in dtypes])


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


# ---- Extra arguments and errors ----


SPY = {"features": tuple(FEATURES), "base_update": MomentumUpdate(0.3)}


@functools.partial(jax.jit, static_argnames="options")
def first_update(grads, theta=None, options=(), **extra):
    """The first update of a rule with all features."""
    tx = tuner(coordinate_lstm(3, 1, **SPY), **dict(options))
    return tx.update(grads, tx.init(grads), theta, **extra)[0]


GRADS = {"a": jnp.asarray([0.3, -1.0]), "b": None}
OTHER = {"a": jnp.asarray([0.1, 0.2]), "b": None}
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


@pytest.mark.parametrize("leaf", [np.arange(3), np.ones(2, bool), np.ones(2, np.complex64)])
def test_leaves_that_are_not_floating_point_raise(leaf):
    with pytest.raises(ValueError, match=f"must be floating-point, got {jnp.result_type(leaf)}"):
        tuner(RULES["coordinate"]).init({"x": np.ones(2, np.float32), "y": leaf})


@pytest.mark.parametrize("argument", ["theta", "spread", "context"])
def test_trees_of_another_structure_raise(argument):
    name = {"theta": "params"}.get(argument, argument)
    with pytest.raises(ValueError, match=f"{name} must have the structure of the gradients.*'a'.*got.*'z'"):
        first_update(GRADS, **{argument: {"z": jnp.ones(2)}})


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_an_invalid_scale_raises(scale):
    with pytest.raises(ValueError, match="scale must be a finite number above 0"):
        tuner(RULES["coordinate"], scale=scale)
