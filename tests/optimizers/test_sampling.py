import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lft_jax import Unroll, learners, oracles
from lft_jax.base import Estimate
from lft_jax.meta.trainer import meta_trainer
from lft_jax.optimizers.fine_tuning import fine_tune, fine_tune_step
from lft_jax.optimizers.rules import MomentumUpdate, coordinate_lstm
from lft_jax.optimizers.sampling import guided, learned_sampler
from lft_jax.optimizers.transform import leaf_signals, learned_fine_tuner
from lft_jax.oracles import _covariance
from lft_jax.tasks.single_image import single_image_family
from lft_jax.tasks.uap import uap_family

KEY = jax.random.key(3)
SAMPLER = coordinate_lstm(3, 1, features=("raw", "update"), output_scale=1.0)
THETA = {"image": np.linspace(-1, 1, 12).reshape(2, 3, 2), "bias": np.array([0.4, 1.5])}
GRAD = {"image": np.cos(np.arange(12.0)).reshape(2, 3, 2), "bias": np.array([2.0, -3.0])}


def theta():
    return jax.tree.map(jnp.asarray, THETA)


def random_like(seed, leading=()):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(*leading, *x.shape))), THETA)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def linear(theta):
    return sum(jax.tree.leaves(jax.tree.map(lambda g, x: jnp.sum(g * x), jax.tree.map(jnp.asarray, GRAD), theta)))


def every_axis(loss=linear, smoothing=0.5):
    """An oracle that uses each coordinate once: with directions `A e_i`, its estimate is `A^2 g` exactly."""
    return oracles.zeroth_order(loss, num_directions=14, smoothing=smoothing, directions="coordinate")


def unit(deviation):
    return deviation / np.sqrt(np.mean(deviation**2))


# ---- The estimates ----


@pytest.mark.parametrize(
    "options",
    [
        {"directions": "gaussian"},
        {"directions": "gaussian", "antithetic": True, "chunk_size": 2},
        {"directions": "rademacher", "resolution": 2},
        {"directions": "sphere"},
        {"directions": "coordinate"},
    ],
)
def test_equal_deviations_change_nothing(options):
    oracle = jax.jit(oracles.zeroth_order(lambda x: jnp.sum(jnp.sin(x) ** 2), num_directions=5, **options))
    theta = jnp.linspace(-1, 1, 33)
    isotropic = oracle(theta, KEY)
    for size in (1.0, 4.0):
        estimate = oracle(theta, KEY, deviation=jnp.full_like(theta, size))
        assert estimate.value == isotropic.value
        np.testing.assert_allclose(estimate.grads, isotropic.grads, rtol=2e-6)  # compiled separately: rounding differs


@given(seed=st.integers(0, 1000))
def test_on_a_linear_loss_the_estimate_is_the_gradient_times_the_squared_deviations(seed):
    with jax.enable_x64(True):
        deviation = random_like(seed)
        estimate = every_axis()(theta(), KEY, deviation=deviation)
        np.testing.assert_allclose(flat(estimate.grads), unit(flat(deviation)) ** 2 * flat(GRAD), rtol=1e-10)


@pytest.mark.parametrize(("kind", "antithetic"), [("gaussian", True), ("rademacher", False), ("sphere", False)])
def test_on_a_linear_loss_random_directions_average_to_that_estimate(x64, kind, antithetic):
    deviation = random_like(1)
    oracle = oracles.zeroth_order(linear, num_directions=200, directions=kind, antithetic=antithetic)
    keys = jax.random.split(KEY, 200)
    found = jax.jit(jax.vmap(lambda key: oracle(theta(), key, deviation=deviation).grads))(keys)
    found = np.stack([flat(jax.tree.map(lambda x, i=i: x[i], found)) for i in range(len(keys))])
    error = found.std(0, ddof=1) / len(keys) ** 0.5
    assert np.all(np.abs(found.mean(0) - unit(flat(deviation)) ** 2 * flat(GRAD)) < 4 * error)
    assert np.max(np.abs(found.mean(0) - flat(GRAD)) / error) > 10


@given(seed=st.integers(0, 1000), vectors=st.integers(1, 5))
def test_half_the_variance_is_in_the_subspace(seed, vectors):
    with jax.enable_x64(True):
        subspace = random_like(seed, (vectors,))
        estimate = every_axis()(theta(), KEY, subspace=subspace)
        columns = np.stack([flat(jax.tree.map(lambda x, i=i: x[i], subspace)) for i in range(vectors)], 1)
        projection = columns @ np.linalg.pinv(columns)
        expected = (np.eye(14) / 2 + 14 / (2 * vectors) * projection) @ flat(GRAD)
        np.testing.assert_allclose(flat(estimate.grads), expected, rtol=1e-9, atol=1e-12)


def test_dependent_vectors_count_once_and_zeros_leave_directions_isotropic(x64):
    one = random_like(5, (1,))
    doubled = jax.tree.map(lambda x: jnp.concatenate([x, -2 * x, 0 * x]), one)
    expected = every_axis()(theta(), KEY, subspace=one).grads
    np.testing.assert_allclose(flat(every_axis()(theta(), KEY, subspace=doubled).grads), flat(expected), rtol=1e-9)
    nothing = jax.tree.map(lambda x: 0 * x, one)
    np.testing.assert_allclose(flat(every_axis()(theta(), KEY, subspace=nothing).grads), flat(GRAD), rtol=1e-9)
    zeros = jax.tree.map(jnp.zeros_like, theta())
    np.testing.assert_allclose(flat(every_axis()(theta(), KEY, deviation=zeros).grads), flat(GRAD), rtol=1e-9)


@pytest.mark.parametrize(("name", "leading"), [("deviation", ()), ("subspace", (2,))])
def test_directions_keep_their_length(x64, name, leading):
    root = _covariance.root(theta(), {name: random_like(2, leading)}, jnp.float64)
    lengths = np.sum(np.asarray(_covariance.spread(jnp.eye(14), root)) ** 2, axis=1)
    np.testing.assert_allclose(lengths.sum(), 14)  # the mean of |A e|^2 over isotropic e of E[e e^T] = I
    assert np.ptp(lengths) > 0.1


def test_an_opaque_loss_is_evaluated_along_the_same_directions(x64):
    deviation = random_like(4)
    estimates = []
    for loss, opaque in ((linear, False), (lambda points: np.stack(jax.vmap(linear)(points)), True)):
        oracle = oracles.zeroth_order(loss, num_directions=7, opaque=opaque)
        estimates.append(flat(oracle(theta(), KEY, deviation=deviation).grads))
    np.testing.assert_allclose(*estimates, rtol=1e-6)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"deviation": jnp.ones(3)}, "deviation must be like theta"),
        ({"subspace": jnp.ones(4)}, r"subspace must be like theta with one more, leading axis \[k\]"),
        ({"deviation": jnp.ones(4), "subspace": jnp.ones((1, 4))}, "either deviation or subspace"),
        ({"variance": jnp.ones(4)}, r"either deviation or subspace, got \['variance'\]"),
    ],
)
def test_invalid_sampling_raises(sampling, message):
    oracle = oracles.zeroth_order(jnp.sum)
    with pytest.raises(ValueError, match=message):
        oracle(jnp.ones(4), KEY, **sampling)


# ---- Their derivatives ----


def test_losses_are_constants_in_derivatives_of_the_estimate(x64):
    """With `A = diag(D)` the estimate is `D s`. The slopes `s` equal `D g`, but are constants in the derivative."""
    deviation, weights = random_like(6), flat(random_like(7))
    ravel = jax.flatten_util.ravel_pytree

    def projected(deviation):
        return jnp.sum(weights * ravel(every_axis()(theta(), KEY, deviation=deviation).grads)[0])

    def frozen(deviation, slopes):
        deviation = ravel(deviation)[0]
        return jnp.sum(weights * deviation / jnp.sqrt(jnp.mean(deviation**2)) * slopes)

    slopes = unit(np.asarray(ravel(deviation)[0])) * np.asarray(ravel(jax.tree.map(jnp.asarray, GRAD))[0])
    expected = jax.grad(frozen)(deviation, slopes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), jax.grad(projected)(deviation), expected)


def numpy_loss(theta):
    """A loss computed by NumPy, which cannot be differentiated."""
    shape = jax.ShapeDtypeStruct((), theta.dtype)
    return jax.pure_callback(lambda x: np.sum(np.asarray(x) ** 2, -1), shape, theta, vmap_method="expand_dims")


@pytest.mark.parametrize("size", [1, 4])
def test_the_meta_gradient_reaches_the_sampler_without_a_derivative_of_the_model(size):
    oracle = oracles.zeroth_order(numpy_loss, num_directions=3)

    def outer(params):
        tx = learned_sampler(params, SAMPLER, optax.sgd(0.01))
        end = fine_tune(tx, oracle, jnp.arange(1.0, size + 1), KEY, num_steps=3).thetas[-1]
        return jnp.sum(end**2)

    grads = jax.jit(jax.grad(outer))(SAMPLER.init(KEY))
    norm = float(optax.tree.norm(grads))
    # The deviation of a single coordinate is always rescaled to 1.
    assert norm < 1e-6 if size == 1 else 1e-4 < norm < 1e3


def test_the_meta_gradient_equals_finite_differences(x64):
    """For an oracle that depends on the deviation directly, so that no losses are held constant."""

    def oracle(theta, key, deviation):
        grads = deviation * jax.random.normal(key, theta.shape, theta.dtype)
        return Estimate(jnp.sum(theta), grads, jnp.asarray(1, jnp.int32), {"context": context})

    context = jnp.linspace(-1, 1, 8).reshape(2, 4)  # differs between coordinates, and does not depend on the sampler
    sampler = coordinate_lstm(2, 1, features=("context", "progress"), output_scale=1.0)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), sampler.init(KEY))
    target = jnp.linspace(0, 1, 4)

    def outer(params):
        tx = learned_sampler(params, sampler, optax.sgd(0.3))
        return jnp.sum((fine_tune(tx, oracle, jnp.ones(4), KEY, num_steps=3).thetas[-1] - target) ** 2)

    along = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape, x.dtype), params)
    moved = [jax.tree.map(lambda p, a, s=s: p + s * a, params, along) for s in (1e-5, -1e-5)]
    slope = (outer(moved[0]) - outer(moved[1])) / 2e-5
    grads = jax.grad(outer)(params)
    assert abs(slope) > 1e-2
    np.testing.assert_allclose(optax.tree.vdot(grads, along), slope, rtol=1e-6)


def test_an_estimate_is_constant_except_for_the_deviation():
    """With isotropic directions the estimate has no derivative by `theta`, as without a sampler."""

    def end(start):
        tx = learned_sampler(SAMPLER.init(KEY), SAMPLER, optax.sgd(0.1))
        state = tx.init(start)
        oracle = oracles.zeroth_order(lambda x: jnp.sum(x**2), num_directions=2)
        theta, _, estimate = fine_tune_step(tx, oracle, start, state, KEY, progress=0.0)
        return jnp.sum(theta) + estimate.value

    np.testing.assert_array_equal(jax.grad(end)(jnp.ones(3)), 1)


# ---- The optimizers ----


def test_the_sampler_gets_the_estimate_and_the_update(x64):
    params = SAMPLER.init(KEY)
    tx = learned_sampler(params, SAMPLER, optax.sgd(0.5))
    state = tx.init(theta())
    np.testing.assert_array_equal(flat(state.sampling["deviation"]), 1)
    states = state.leaves
    for step in range(3):
        grads = random_like(step)
        updates, state = tx.update(grads, state, theta(), progress=0.1)
        np.testing.assert_array_equal(flat(updates), -0.5 * flat(grads))
        for number, leaf in enumerate(leaf_signals(grads, None, update=updates)):
            output, states[number] = SAMPLER.apply(params, leaf, states[number])
            deviation = jax.tree.leaves(state.sampling["deviation"])[number]
            np.testing.assert_allclose(deviation, np.abs(1 + output), rtol=1e-12)
    assert np.ptp(flat(state.sampling["deviation"])) > 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wrap", [lambda tx: learned_sampler(SAMPLER.init(KEY), SAMPLER, tx), guided])
def test_keeps_the_shapes_of_its_state_and_compiles_once(wrap, dtype):
    rule = coordinate_lstm(2, 1, features="raw")
    tx = wrap(learned_fine_tuner(rule.init(KEY), rule))
    theta = {"a": jnp.ones((2, 3), dtype), "b": jnp.ones((), dtype)}
    state = tx.init(theta)
    step = jax.jit(tx.update)
    for _ in range(3):
        updates, new = step(theta, state, theta)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, theta)
        state = new
    assert step._cache_size() == 1


def test_guided_remembers_the_last_estimates():
    tx = guided(optax.sgd(1.0), size=2)
    state = tx.init(jnp.zeros(3))
    for step in range(1, 4):
        _, state = tx.update(jnp.full(3, float(step)), state)
    np.testing.assert_array_equal(state.sampling["subspace"], [[3.0] * 3, [2.0] * 3])


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="rule: the rule of a sampler must not have a base update"):
        learned_sampler({}, coordinate_lstm(base_update=MomentumUpdate()), optax.sgd(1.0))
    with pytest.raises(ValueError, match="size must be at least 1"):
        guided(optax.sgd(1.0), size=0)
    tx = guided(optax.sgd(1.0))
    exact = oracles.gradient(lambda x: jnp.sum(x**2))
    with pytest.raises(TypeError, match="subspace"):  # exact gradients have no directions
        fine_tune_step(tx, exact, jnp.ones(2), tx.init(jnp.ones(2)), KEY, progress=0.0)


# ---- The learner ----


def test_the_second_stage_trains_the_sampler_alone():
    images = np.linspace(0, 1, 5 * 9).reshape(5, 3, 3, 1).astype(np.float32)
    weights = jax.random.normal(KEY, (9, 2))
    family = single_image_family(
        images, np.asarray(images.reshape(5, 9) @ weights).argmax(1), lambda x: x.reshape(-1, 9) @ weights
    )
    rule = coordinate_lstm(2, 1, features="raw")
    stages = {"train": optax.sgd(1.0), "hold": optax.set_to_zero()}
    trainer = meta_trainer(
        learners.l2o(rule, sampler=SAMPLER),
        [family],
        num_steps=4,
        tasks_per_family=2,
        unroll=Unroll(window=3),
        meta_optimizer=optax.partition(stages, {"rule": "hold", "sampler": "train"}),
    )
    state = trainer.init(KEY)
    trained, _ = trainer.step(state)
    jax.tree.map(np.testing.assert_array_equal, trained.params["rule"], state.params["rule"])
    for part in ("cells", "head"):
        changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), trained.params["sampler"], state.params["sampler"])
        assert all(change > 0 for change in jax.tree.leaves(changes[part]) if change is not None)


@pytest.mark.parametrize("per_example", [False, True])
def test_meta_trains_a_sampler_for_universal_perturbations(per_example):
    """A meta-step changes the sampler's weights, with directions shared by all images and with one set per image."""
    random = np.random.default_rng(0)
    images = random.uniform(0.2, 0.8, size=(20, 4, 4, 1)).astype(np.float32)
    weights = jnp.asarray(random.normal(size=(16, 2)), jnp.float32)

    def victim(images):
        return (images - 0.5).reshape(len(images), -1) @ weights

    labels = np.asarray(victim(images)).argmax(1)
    estimator = oracles.ZerothOrder(4, per_example=per_example)
    # Not the hinge, which has no gradient once all query images are fooled.
    options = {"ways": 2, "shots": 2, "query_shots": 2, "epsilon": 0.1, "loss": "cross_entropy"}
    family = uap_family(images, labels, victim, estimator=estimator, **options)
    sampler = coordinate_lstm(2, 1, features=("raw", "update"), output_scale=1.0)
    learner = learners.lft(coordinate_lstm(2, 1, base_update=MomentumUpdate(0.3)), sampler=sampler)
    trainer = meta_trainer(learner, [family], num_steps=3, tasks_per_family=2, meta_optimizer=optax.sgd(1.0))
    state = trainer.init(jax.random.key(0))
    moved, metrics = trainer.step(state)
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0
    head = "sampler", "head", "weight"
    before, after = (functools.reduce(lambda tree, name: tree[name], head, s.params) for s in (state, moved))
    assert np.all(np.isfinite(after)) and np.abs(after - before).max() > 0
