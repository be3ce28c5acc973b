import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from lft_jax.base import Estimate
from lft_jax.optimizers import Part
from lft_jax.optimizers.fine_tuning import Paused, fine_tune, fine_tune_step
from lft_jax.optimizers.rules import MomentumUpdate, coordinate_lstm
from lft_jax.optimizers.transform import learned_fine_tuner

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(7)
THETA = {"image": np.array([[0.5, -1.0], [0.2, 0.7]]), "none": None}
RULE = coordinate_lstm(4, 1, features=("spread", "constraint", "progress"), base_update=MomentumUpdate(0.3))


def smooth_loss(theta):
    return jnp.sum(jnp.sin(2 * theta["image"])) * theta["image"][0, 0] + jnp.sum(theta["image"] ** 2)


def linear_loss(theta):
    return jnp.sum(theta["image"] * jnp.asarray([[1.0, -2.0], [0.5, 0.1]]))


def noisy_oracle(loss, noise=0.1):
    """An oracle that samples, with all extras that an oracle can have."""

    def oracle(theta, key):
        value, grads = jax.value_and_grad(loss)(theta)
        grads = jax.tree.map(lambda g: g + noise * jax.random.uniform(key, dtype=g.dtype), grads)
        extras = {"spread": jax.tree.map(lambda g: 0.1 + g**2, grads), "scale": jnp.asarray(0.2)}
        return Estimate(value, grads, jnp.asarray(6, jnp.int32), extras)

    return oracle


def project(theta):
    return jax.tree.map(lambda x: jnp.clip(x, -0.9, 0.9), theta)


def python_loop(optimizer, oracle, theta, key, *, num_steps, project, second_order=False):
    """A reference for `fine_tune` without scan or helpers. Returns `(thetas, values, queries)`, three lists."""
    optimizer, total = optax.with_extra_args_support(optimizer), 0
    state, thetas, values, queries = optimizer.init(theta), [], [], []
    for k, step_key in enumerate(jax.random.split(key, num_steps)):
        estimate = oracle(theta, step_key)
        if not second_order:
            estimate = Estimate(*(jax.tree.map(jax.lax.stop_gradient, part) for part in estimate))
        updates, state = optimizer.update(estimate.grads, state, theta, progress=k / num_steps, **estimate.extras)
        theta = project(jax.tree.map(lambda x, u: x + u, theta, updates))
        total += estimate.queries
        thetas, values, queries = [*thetas, theta], [*values, estimate.value], [*queries, total]
    return thetas, values, queries


def stacked(trees):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def weights(gain=0.5):
    leaves, structure = jax.tree.flatten(jax.eval_shape(RULE.init, KEY))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [jnp.asarray(gain * rng.normal(size=x.shape)) for x in leaves])


def assert_close(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, **{"rtol": 1e-9, "atol": 1e-12, **tolerance}), actual, expected
    )


# ---- The trajectory ----


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "build",
    [lambda: learned_fine_tuner(weights(), RULE), lambda: optax.sgd(0.3, momentum=0.5), lambda: optax.adam(0.2)],
    ids=["lft", "sgd", "adam"],
)
def test_equals_a_python_loop(build):
    optimizer, options = build(), dict(num_steps=3, project=project)
    loop = jax.jit(functools.partial(python_loop, optimizer, noisy_oracle(smooth_loss), **options))
    thetas, values, queries = loop(THETA, KEY)
    for remat in (False, True):
        run = jax.jit(functools.partial(fine_tune, optimizer, noisy_oracle(smooth_loss), remat=remat, **options))
        trajectory = run(THETA, KEY)
        assert_close(trajectory.thetas, stacked(thetas))
        assert_close(trajectory.values, jnp.stack(values))
        np.testing.assert_array_equal(trajectory.queries, queries)
        assert trajectory.queries.dtype == jnp.int32


def quadratic(theta, key):
    return Estimate(0.5 * jnp.sum(theta**2), theta, jnp.asarray(1, jnp.int32), {})


def test_projects_after_each_step():
    # Steps of 1.5 times the gradient overshoot by half; the upper bound is active after the first step.
    theta = fine_tune(optax.sgd(1.5), quadratic, -1.0, KEY, num_steps=4, project=lambda x: jnp.minimum(x, 0.1)).thetas
    np.testing.assert_allclose(theta, [0.1, -0.05, 0.025, -0.0125])


def test_value_progress_and_extras_reach_the_optimizer():
    def update(updates, state, params=None, *, value, progress, spread, scale):
        assert value.shape == ()
        return jax.tree.map(lambda s: progress.astype(s.dtype) + scale * s, spread), state

    def oracle(theta, key):
        extras = {"spread": jax.tree.map(jnp.ones_like, theta), "scale": jnp.asarray(10.0)}
        return quadratic(theta["x"], key)._replace(grads=theta, extras=extras)

    spy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    thetas = fine_tune(spy, oracle, {"x": jnp.zeros(2)}, KEY, num_steps=4).thetas["x"]
    expected = np.cumsum([10, 10.25, 10.5, 10.75])
    np.testing.assert_allclose(thetas, np.stack([expected, expected], axis=1))


def test_each_step_has_its_own_key_and_a_run_is_reproducible():
    def oracle(theta, key):
        return Estimate(jax.random.uniform(key), theta, jnp.asarray(1, jnp.int32), {})

    run = jax.jit(lambda key: fine_tune(optax.sgd(0.1), oracle, jnp.ones(1), key, num_steps=5).values)
    first = run(KEY)
    assert len(np.unique(first)) == 5
    np.testing.assert_array_equal(run(KEY), first)
    assert not np.any(np.isin(run(jax.random.key(8)), first))


def test_one_step_is_the_first_of_many():
    optimizer, theta = optax.sgd(0.1), jnp.asarray([1.0, -2.0])
    trajectory = fine_tune(optimizer, quadratic, theta, KEY, num_steps=1, project=lambda x: x + 1)
    new, state, estimate = fine_tune_step(
        optimizer, quadratic, theta, optimizer.init(theta), KEY, progress=0.0, project=lambda x: x + 1
    )
    np.testing.assert_allclose(new, [1.9, -0.8])
    assert_close((trajectory.thetas[0], trajectory.values[0], trajectory.state), (new, estimate.value, state))


def test_the_parts_of_a_run_equal_the_whole():
    """Keys, progress and the optimizer's state continue; the first part ignores what it is given as paused."""
    optimizer, options = learned_fine_tuner(weights(), RULE), {"num_steps": 5, "project": project}
    run = functools.partial(fine_tune, optimizer, noisy_oracle(smooth_loss), watch=lambda state: state.count, **options)
    whole = jax.jit(run)(THETA, KEY)
    part = jax.jit(lambda paused, length: run(THETA, KEY, part=Part(length, paused)), static_argnums=1)
    other = jax.tree.map(lambda x: x + 3, (THETA, optimizer.init(THETA)))
    paused, parts = Paused(*other, 0), []
    for length in (2, 2, 1):
        parts.append(part(paused, length))
        paused = Paused(jax.tree.map(lambda x: x[-1], parts[-1].thetas), parts[-1].state, paused.done + length)
    for name in ("thetas", "values", "watched"):
        joined = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(getattr(p, name) for p in parts))
        assert_close(joined, getattr(whole, name))
    assert_close(parts[-1].state, whole.state)
    np.testing.assert_array_equal(whole.watched, np.arange(1, 6))
    ends = [fine_tune(optax.sgd(0.1), quadratic, 1.0, KEY, num_steps=3, part=part).thetas for part in (Part(2), None)]
    np.testing.assert_allclose(ends[0], ends[1][:2])


@pytest.mark.parametrize(("paused", "length"), [(None, 0), (None, 4), (Paused(1.0, (), 2), 4)])
def test_parts_of_a_wrong_length_raise(paused, length):
    with pytest.raises(ValueError, match=f"part.length must be .*got {length}"):
        fine_tune(optax.sgd(0.1), quadratic, 1.0, KEY, num_steps=3, part=Part(length, paused))


@pytest.mark.parametrize("num_steps", [0, -1, float("nan")])
def test_too_few_steps_raise(num_steps):
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        fine_tune(optax.sgd(0.1), quadratic, 1.0, KEY, num_steps=num_steps)


def test_an_empty_window_raises():
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        fine_tune(optax.sgd(0.1), quadratic, 1.0, KEY, num_steps=2, window=0)


# ---- The meta-gradient ----


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("second_order", [False, True])
def test_meta_gradient_in_closed_form(second_order, remat):
    # Gradient descent on theta^2 / 2 multiplies theta by 1 - lr in each step. With constant inner gradients, the
    # derivative of the last theta with respect to lr is minus the sum of the gradients of all steps.
    def end(rate):
        options = dict(num_steps=5, second_order=second_order, remat=remat)
        return fine_tune(optax.sgd(rate), quadratic, 2.0, KEY, **options).thetas[-1]

    shrink = 1 - 0.1
    expected = -5 * 2 * shrink**4 if second_order else -2 * sum(shrink**k for k in range(5))
    np.testing.assert_allclose(jax.grad(end)(0.1), expected, rtol=1e-10)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    ("window", "met"), [(1, [1, 1, 1, 1, 1]), (2, [1, 2, 1, 2, 1]), (3, [1, 2, 3, 1, 2]), (5, [1, 2, 3, 4, 5])]
)
def test_truncated_meta_gradients_in_closed_form(window, met, remat):
    # As above, with only the gradients since the last truncation; `met` is their number after each step.
    def along(rate, window):
        return fine_tune(optax.sgd(rate), quadratic, 2.0, KEY, num_steps=5, remat=remat, window=window).thetas

    shrink = 1 - 0.1
    np.testing.assert_allclose(along(0.1, window), along(0.1, None), rtol=1e-12)
    expected = [-2 * sum(shrink**i for i in range(k + 1 - count, k + 1)) for k, count in enumerate(met)]
    np.testing.assert_allclose(jax.jacrev(along)(0.1, window), expected, rtol=1e-10)


def test_the_start_gets_a_derivative_from_the_first_window_only():
    def total(theta):
        return jnp.sum(fine_tune(optax.sgd(0.1), quadratic, theta, KEY, num_steps=4, window=2).thetas)

    np.testing.assert_allclose(jax.grad(total)(2.0), 2.0)  # of two steps, each with a constant gradient


def meta_loss(run, loss, **options):
    """The sum of a loss along a fine-tuning run, as a function of the rule's weights, jitted."""

    def objective(params):
        thetas = run(
            learned_fine_tuner(params, RULE),
            noisy_oracle(loss),
            THETA,
            KEY,
            num_steps=2,
            project=lambda x: x,
            **options,
        )
        thetas = stacked(thetas[0]) if run is python_loop else thetas.thetas
        return jnp.sum(jax.vmap(smooth_loss)(thetas))

    return jax.jit(objective)


@pytest.mark.parametrize("second_order", [False, True])
def test_meta_gradient_equals_that_of_a_python_loop(second_order):
    params = weights()
    expected = jax.grad(meta_loss(python_loop, smooth_loss, second_order=second_order))(params)
    actual = jax.grad(meta_loss(fine_tune, smooth_loss, second_order=second_order, remat=not second_order))(params)
    assert_close(actual, expected, rtol=1e-7, atol=1e-10)
    assert all(np.any(x != 0) for x in jax.tree.leaves(expected))


@pytest.mark.parametrize(("loss", "second_order"), [(smooth_loss, True), (linear_loss, False)])
def test_meta_gradient_equals_finite_differences(loss, second_order):
    # Without second order, only for a loss whose inner gradient is constant.
    check_grads(meta_loss(fine_tune, loss, second_order=second_order), (weights(),), order=1, modes=["rev"])
