"""The transformation in compositions of optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lft_jax.optimizers.transform import learned_fine_tuner
from tests.optimizers.trees import EVERY_RULE, RULES, assert_close, rows, tree, tuner, weights


def images_only(tree):
    return jax.tree.map(lambda x: x.ndim == 3, tree)


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
