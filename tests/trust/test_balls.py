"""Whatever the weights of a rule, a perturbation stays in its ball and is finite, or the run is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from lft_jax import AttackRecipe, Constraint, fine_tune, learned_fine_tuner, oracles, universal_perturbation
from lft_jax.optimizers.rules import RULES
from tests.trust.cases import for_all
from tests.trust.gradients import rule_of
from tests.trust.tasks import SHAPE, AnyConstraint

RULE = {name: rule_of(name) for name in RULES}
EVERY_RULE = pytest.mark.parametrize("name", RULES)
BALLS = (Constraint("linf", 0.3), Constraint("l2", 0.3))
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(3, *SHAPE)).astype(np.float32)
MODEL = RNG.normal(size=(16, 3)).astype(np.float32)

#: What a leaf of the weights holds: numbers of one size, a power of ten, and one odd number among them.
KINDS = st.sampled_from(["normal", "alternating", "constant", "zero"])
ALLOWED = st.tuples(KINDS, st.one_of(st.integers(-2, 1), st.integers(2, 3), st.integers(-46, 3)), st.none())
ODD = st.sampled_from([None, np.nan, np.inf, -np.inf, 3.4e38])
ANY = st.tuples(KINDS, st.integers(-46, 39), ODD)


def weights(rule, leaves, seed):
    """Weights with one of `leaves` for each array, in turn."""
    like, structure = jax.tree.flatten(jax.eval_shape(rule.init, jax.random.key(0)))
    rng, made = np.random.default_rng(seed), []
    for number, leaf in enumerate(like):
        kind, exponent, odd = leaves[number % len(leaves)]
        values = {"normal": rng.normal(size=leaf.shape), "constant": np.ones(leaf.shape), "zero": np.zeros(leaf.shape)}
        values["alternating"] = 1.0 - 2.0 * (np.arange(leaf.size) % 2).reshape(leaf.shape)
        found = values[kind] * 10.0**exponent
        if odd is not None:
            found.flat[rng.integers(leaf.size)] = odd
        with np.errstate(over="ignore"):
            made.append(found.astype(np.float32))
    return structure.unflatten(made)


LEAVES = st.one_of(*3 * [st.lists(ALLOWED, min_size=1, max_size=8)], st.lists(ANY, min_size=1, max_size=8))
WEIGHTS = {"leaves": LEAVES, "seed": st.integers(0, 2**32 - 1)}


def assert_inside(theta, constraint):
    theta = np.asarray(theta, np.float64)
    assert np.all(np.isfinite(theta))
    if constraint.epsilon is not None:
        kind = np.inf if constraint.norm == "linf" else 2
        assert np.linalg.norm(theta.ravel(), kind) <= np.float32(constraint.epsilon) * (1 + 1e-6)


def refused(rule, params):
    """Whether the rule refuses these weights, which it has to if they are NaN or infinite."""
    try:
        learned_fine_tuner(params, rule)
    except ValueError as error:
        assert "must be weights of a rule, at most 10000 in absolute value, got" in str(error)
        return True
    assert all(np.all(np.abs(leaf) <= 1e4) for leaf in jax.tree.leaves(params))
    return False


@functools.partial(jax.jit, static_argnums=0)
def tuned(rule, params, number, epsilon, start, slopes):
    """Three steps down a tilted bowl; `[3, ...]`."""
    balls = AnyConstraint(number, tuple(Constraint(ball.norm, epsilon) for ball in BALLS))

    def losses(thetas):
        return jnp.sum(slopes * thetas + jnp.abs(slopes) * thetas**2, (1, 2, 3))

    exact = oracles.per_example_gradient(losses, num_examples=2)
    optimizer = learned_fine_tuner(params, rule, scale=epsilon)
    key = jax.random.key(0)
    return fine_tune(optimizer, exact, balls.project(start), key, num_steps=3, project=balls.project).thetas


@EVERY_RULE
@for_all(**WEIGHTS, ball=st.sampled_from(range(len(BALLS))), radius=st.floats(-4, 0), steepness=st.integers(-9, 6))
def test_the_transformation_with_a_projection_never_leaves_the_ball(name, leaves, seed, ball, radius, steepness):
    params = weights(RULE[name], leaves, seed)
    if refused(RULE[name], params):
        return
    rng, epsilon = np.random.default_rng(seed), np.float32(10**radius)
    slopes = (10.0**steepness * rng.normal(size=(2, *SHAPE))).astype(np.float32) * (rng.random((2, *SHAPE)) < 0.8)
    start = (rng.normal(size=SHAPE) * rng.choice([0, epsilon, 10])).astype(np.float32)
    thetas = tuned(RULE[name], params, np.int32(ball), epsilon, start, slopes.astype(np.float32))
    for theta in np.asarray(thetas):
        assert_inside(theta, Constraint(BALLS[ball].norm, epsilon))


class Holder:
    """An optimizer of any weights: they are in its state, so that one program serves all."""

    def __init__(self, rule):
        def init(theta):
            return self.weights, learned_fine_tuner(self.weights, rule).init(theta)

        def update(grads, state, theta=None, **extras):
            updates, after = learned_fine_tuner(state[0], rule).update(grads, state[1], theta, **extras)
            return updates, (state[0], after)

        self.weights, self.transformation = None, optax.GradientTransformationExtraArgs(init, update)


HOLDERS = {name: Holder(rule) for name, rule in RULE.items()}


def model(images):
    return jnp.tanh(images.reshape(len(images), -1) @ MODEL)


@for_all(
    **WEIGHTS,
    name=st.sampled_from(sorted(RULE)),
    constraint=st.sampled_from(["linf", "l2", "l1"]),
    radius=st.floats(-3, 0),
)
def test_an_attack_never_leaves_the_ball(name, leaves, seed, constraint, radius):
    HOLDERS[name].weights = params = weights(RULE[name], leaves, seed)
    bound = Constraint(constraint, **({"penalty": 0.01} if constraint == "l1" else {"epsilon": 10**radius}))
    options = {"constraint": bound, "steps": 2, "recipe": AttackRecipe(augmentation=None), "progress": False}
    try:
        result = universal_perturbation(model, IMAGES, optimizer=HOLDERS[name].transformation, **options)
    except ValueError as error:
        assert refused(RULE[name], params), error
    else:
        assert_inside(result.perturbation, bound)
        assert all(np.all(np.isfinite(values)) for values in result.history.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.1e4])
def test_weights_of_no_rule_are_refused_and_named(bad):
    params = RULE["spectral_lstm"].init(jax.random.key(0))
    params["periods"]["bias"] = np.asarray([0, bad], np.float32)
    said = (
        r"params\['periods'\]\['bias'\] must be weights of a rule, at most 10000 in absolute value, got (nan|inf|11000)"
    )
    with pytest.raises(ValueError, match=said):
        learned_fine_tuner(params, RULE["spectral_lstm"])
    jax.eval_shape(lambda params: learned_fine_tuner(params, RULE["spectral_lstm"]).init(IMAGES[0]), params)  # traced


@for_all(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-45, 38),
    radius=st.floats(-4, 0),
    norm=st.sampled_from(["linf", "l2"]),
)
def test_projections_end_in_the_ball_and_stay_there(seed, exponent, radius, norm):
    with np.errstate(over="ignore"):
        theta = (np.random.default_rng(seed).normal(size=SHAPE) * 10.0**exponent).astype(np.float32)
    theta = np.clip(theta, -np.float32(3.4e38), np.float32(3.4e38))
    ball = Constraint(norm, np.float32(10**radius))
    found = np.asarray(ball.project(jnp.asarray(theta)))
    assert_inside(found, ball)
    np.testing.assert_allclose(ball.project(jnp.asarray(found)), found, rtol=1e-6)
    if exponent < 17:  # the nearest point: along the same direction, or coordinate by coordinate
        size = np.linalg.norm(theta.ravel().astype(float))
        nearest = (
            theta * min(1, ball.epsilon / size)
            if norm == "l2" and size
            else np.clip(theta, -ball.epsilon, ball.epsilon)
        )
        np.testing.assert_allclose(found, nearest, rtol=1e-5, atol=1e-30)
