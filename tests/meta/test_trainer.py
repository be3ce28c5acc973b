"""Meta-training on quadratic tasks, whose trajectories and meta-gradients are known."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lft_jax import EvolutionStrategies, Imitation, Stages, Unroll, learners
from lft_jax.evaluation import baselines
from lft_jax.meta._gradients import MemoryPlan, memory_plan
from lft_jax.meta.mesh import task_mesh
from lft_jax.meta.outer_loss import outer_losses, step_weights
from lft_jax.meta.trainer import clipped_adam, meta_trainer
from lft_jax.optimizers.rules import coordinate_lstm
from tests.meta.quadratics import KEY, RATE, Quadratic, maml_closed_form, meta_gradient, quadratic

RULE = coordinate_lstm(3, 1, features="raw", output_scale=0.5)
# ---- Weights of the steps ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", [0.25] * 4),
        ("linear", [0.1, 0.2, 0.3, 0.4]),
        ("few", [0.2, 0.2, 0, 0.6]),
        ("final", [0, 0, 0, 1]),
    ],
)
def test_step_weights(name, expected):
    np.testing.assert_allclose(step_weights(name, 4), expected, rtol=1e-12)
    assert step_weights(name, 1) == [1]


def test_unknown_step_weights_and_no_steps_are_refused():
    with pytest.raises(ValueError, match=r"weights: unknown name 'lineal'\. Did you mean 'linear'"):
        step_weights("lineal", 3)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        step_weights("uniform", 0)


# ---- Meta-gradients ----


@pytest.mark.parametrize("second_order", [True, False])
def test_the_meta_gradient_of_maml_is_exact_and_a_mean_over_families(second_order):
    families = [quadratic(0, tag="a"), quadratic(1, tag="b"), quadratic(2, tag="a")]
    learner = learners.maml(optax.sgd(RATE), second_order=second_order)
    trainer = meta_trainer(learner, families, num_steps=1, tasks_per_family=2, meta_optimizer=optax.sgd(1.0))
    params = np.array([0.3, -0.2, 0.1], np.float32)
    grads, metrics = meta_gradient(trainer, trainer.init(KEY)._replace(params=jnp.asarray(params)))
    losses, expected = zip(*(maml_closed_form(f, params, second_order) for f in families), strict=True)
    np.testing.assert_allclose(grads, np.mean(expected, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["family_loss"], losses, rtol=1e-5)  # in the order of the families
    np.testing.assert_allclose(metrics["final_loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(np.mean(expected, axis=0)), rtol=1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("second_order", [True, False])
def test_the_second_order_meta_gradient_matches_finite_differences(second_order):
    family, keys = quadratic(0, noise=0.3), jax.random.split(KEY, 2)
    learner = learners.lft(RULE, second_order=second_order)
    params = jax.tree.map(lambda x: x.astype(float), RULE.init(KEY))
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)

    @jax.jit
    @jax.value_and_grad
    def loss(size):
        moved = jax.tree.map(lambda p, d: p + size * d, params, direction)
        return jnp.mean(outer_losses(learner, moved, family, keys, num_steps=4, steps=np.arange(4)))

    size = 1e-5
    slope = (loss(size)[0] - loss(-size)[0]) / (2 * size)
    # With constant inner gradients the derivative is not that of the loss, on purpose.
    assert np.isclose(loss(0.0)[1], slope, rtol=1e-6) == second_order


def test_families_of_several_shapes_are_averaged():
    """A learned step size, whose meta-gradient after one step is known; two families stack, one does not."""
    families = [quadratic(0), quadratic(1, size=2), quadratic(2)]
    learner = learners.fixed("descent", optax.sgd)
    learner = dataclasses.replace(learner, init=lambda key, families: {"learning_rate": jnp.float32(RATE)})
    trainer = meta_trainer(learner, families, num_steps=1, tasks_per_family=2, meta_optimizer=optax.sgd(1.0))
    grads, metrics = meta_gradient(trainer, trainer.init(KEY))
    losses, slopes = [], []
    for family in families:
        losses.append(maml_closed_form(family, np.zeros(family.query.shape), True)[0])
        moved = family.curvature * family.support  # by descent from 0, at rate 1
        slopes.append(np.sum(family.curvature * (RATE * moved - family.query) * moved))
    np.testing.assert_allclose(grads["learning_rate"], np.mean(slopes), rtol=1e-4)
    np.testing.assert_allclose(metrics["family_loss"], losses, rtol=1e-5)


@pytest.mark.parametrize("weights", ["linear", "final"])
def test_the_outer_loss_weighs_the_steps(weights):
    learner = learners.maml(optax.sgd(RATE))
    family, params = quadratic(0), np.array([0.3, -0.2, 0.1], np.float32)
    trainer = meta_trainer(learner, [family], num_steps=3, meta_optimizer=optax.sgd(1.0), unroll=Unroll(weights))
    _, metrics = trainer.step(trainer.init(KEY)._replace(params=jnp.asarray(params)))
    theta, losses = params, []
    for _ in range(3):
        theta = theta - RATE * family.curvature * (theta - family.support)
        losses.append(float(family.loss(theta, family.query[None])))
    expected = {"linear": np.average(losses, weights=[1, 2, 3]), "final": losses[-1]}[weights]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["final_loss"], losses[-1:], rtol=1e-5)


# ---- The step ----


@pytest.fixture(scope="module")
def run():
    """A run in which some tasks are NaN: the trainer, its states and its metrics. The step is traced only once."""
    traces = []
    learner = learners.lft(RULE)

    def optimizer(params):
        traces.append(params)
        return learner.optimizer(params)

    trainer = meta_trainer(
        dataclasses.replace(learner, optimizer=optimizer),
        [quadratic(0, noise=0.5, fault=0.4)],
        num_steps=2,
        tasks_per_family=1,
        meta_optimizer=optax.sgd(0.1, momentum=0.9),
    )
    states, history = [trainer.init(KEY)], []
    states.append(trainer.step(states[0])[0])
    traced = len(traces)
    states.pop()
    for _ in range(8):
        state, metrics = trainer.step(states[-1])
        states.append(state)
        history.append(metrics)
    assert len(traces) == traced, "the second step was compiled again"
    return trainer, states, history


def test_the_step_is_pure(run):
    trainer, states, history = run
    state, metrics = trainer.step(states[3])
    jax.tree.map(np.testing.assert_array_equal, (state.params, metrics), (states[4].params, history[3]))
    assert [int(state.step) for state in states] == list(range(9))


def test_other_keys_mean_other_tasks(run):
    trainer, states, history = run
    losses = [float(metrics["loss"]) for metrics in history if np.isfinite(metrics["loss"])]
    assert len(set(losses)) == len(losses) > 2
    other, _ = trainer.step(states[0]._replace(key=jax.random.key(12)))
    assert int(other.step) == 1


def test_meta_gradients_that_are_not_finite_are_skipped_and_counted(run):
    _, states, history = run
    skipped = in_a_row = 0
    for before, after, metrics in zip(states, states[1:], history, strict=False):
        bad = not np.isfinite(metrics["grad_norm"])
        skipped, in_a_row = skipped + bad, in_a_row + 1 if bad else 0
        assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (skipped, in_a_row)
        unchanged = jax.tree.map(np.array_equal, before.params, after.params)
        assert all(jax.tree.leaves(unchanged)) == bad
    assert 0 < skipped < len(history)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states[-1].params))


@pytest.mark.standard_promotion
def test_the_default_meta_optimizer_clips_and_decays_to_a_tenth():
    tx = clipped_adam(0.01, 4, max_norm=1.0)

    @jax.jit
    def sizes(scale):
        def step(state, _):
            updates, state = tx.update({"x": scale * jnp.ones(3)}, state)
            return state, (jnp.max(jnp.abs(updates["x"])), state[1][0].nu["x"])

        return jax.lax.scan(step, tx.init({"x": jnp.zeros(3)}), length=6)[1]

    steps, moments = sizes(100.0)
    np.testing.assert_allclose(steps[0], 0.01, rtol=1e-3)
    np.testing.assert_allclose(steps[4:], 0.001, rtol=1e-3)
    np.testing.assert_allclose(moments[0], 0.001 / 3, rtol=1e-3)  # of a gradient of norm 1


# ---- Stages ----


def test_a_curriculum_is_the_shorter_runs_one_after_the_other():
    learner, family = learners.fixed("pgd", baselines.projected_gradient), quadratic(0, noise=0.5)
    # Steps that depend on the progress.
    settings = {"step": jnp.float32(0.3), "decay": jnp.float32(0.5), "final": jnp.float32(0.2)}
    learner = dataclasses.replace(learner, init=lambda key, families: settings)
    options = {"tasks_per_family": 2, "meta_optimizer": optax.sgd(0.1, momentum=0.9), "unroll": Unroll("linear")}
    trainer = meta_trainer(learner, [family], num_steps=3, stages=Stages([(1, 2), (2, 1)]), **options)
    plain = {k: meta_trainer(learner, [family], num_steps=k, **options) for k in (1, 2, 3)}
    state = trainer.init(KEY)
    for num_steps in (1, 1, 2, 3, 3):
        after, metrics = trainer.step(state)
        expected = plain[num_steps].step(state)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            (after.params, metrics),
            (expected[0].params, expected[1]),
        )
        state = after


@pytest.mark.parametrize("curriculum", [[(3, 2)], [(0, 2)], [(2, 1), (1, 1)], [(1, 0)], [(1, 1), (1, 1)]])
def test_curricula_that_do_not_ascend_are_refused(curriculum):
    with pytest.raises(ValueError, match=r"curriculum must be pairs .* with steps ascending to num_steps = 3"):
        meta_trainer(
            learners.lft(RULE),
            [quadratic(0)],
            num_steps=3,
            stages=Stages(curriculum),
            meta_optimizer=optax.sgd(0.1),
        )


# ---- Errors ----


class Unregistered(Quadratic):
    """A family that is not a pytree for JAX."""


def test_families_must_be_pytrees_and_at_least_one():
    options = {"meta_optimizer": optax.sgd(0.1)}
    with pytest.raises(ValueError, match="families must hold at least one"):
        meta_trainer(learners.lft(RULE), [], **options)
    with pytest.raises(TypeError, match="Unregistered is not a registered pytree"):
        meta_trainer(learners.lft(RULE), [quadratic(0), Unregistered(*[np.ones(2)] * 3)], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"tasks_per_family": 0}, "tasks_per_family must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        meta_trainer(learners.lft(RULE), [quadratic(0)], meta_optimizer=optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step_weights": "unifrom"}, "step_weights: unknown name 'unifrom'. Did you mean 'uniform'"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"memory_mib": -1}, "memory_mib must be a finite number above 0, got -1"),
    ],
)
def test_bad_unrolls_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Unroll(**fields)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"weights": "final"}, {"unroll": Unroll("final")}),
        ({"weights": "linear", "window": 1}, {"unroll": Unroll("linear", window=1)}),
        ({"remat": True, "memory_mib": 9.0}, {"unroll": Unroll(remat=True, memory_mib=9.0)}),
        ({"estimator": EvolutionStrategies(2)}, {"meta_gradient": EvolutionStrategies(2)}),
        ({"curriculum": [(1, 1)]}, {"stages": Stages([(1, 1)])}),
        (
            {"imitation": Imitation(optax.sgd(0.3), 1)},
            {"stages": Stages(imitation=Imitation(optax.sgd(0.3), 1))},
        ),
    ],
    ids=lambda keywords: "-".join(keywords),
)
def test_old_keywords_give_the_numbers_of_the_new_ones(old, new):
    options = {"num_steps": 3, "tasks_per_family": 2, "meta_optimizer": optax.sgd(0.1)}

    def losses(**keywords):
        trainer = meta_trainer(learners.lft(RULE), [quadratic(0)], **options, **keywords)
        state, found = trainer.init(KEY), []
        for _ in range(2):
            state, metrics = trainer.step(state)
            found.append([metrics["loss"], metrics["grad_norm"]])
        return np.asarray(found)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = losses(**old)
    said = [f"meta_trainer: {name}= is deprecated, write {next(iter(new))}=" for name in old]
    assert all(str(warning.message).startswith(text) for warning, text in zip(caught, said, strict=True))
    np.testing.assert_array_equal(found, losses(**new))
    if "remat" not in old:  # which changes no number
        assert not np.array_equal(found, losses())
    with pytest.raises(TypeError, match="not both"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses(**old, **new)


def test_maml_across_shapes_is_refused_when_the_run_begins():
    families = [quadratic(0), quadratic(1, size=2)]
    trainer = meta_trainer(learners.maml(optax.sgd(0.1)), families, meta_optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="maml needs congruous tasks"):
        trainer.init(KEY)


# ---- Many devices (more than one: tests/end_to_end/test_devices.py) ----


def test_a_mesh_of_one_device_changes_nothing():
    families = [quadratic(0, noise=0.3), quadratic(1, size=4, noise=0.3)]
    options = {"num_steps": 3, "tasks_per_family": 2, "meta_optimizer": optax.sgd(0.1)}
    after = []
    for mesh in (None, task_mesh(1)):
        trainer = meta_trainer(learners.lft(RULE), families, mesh=mesh, **options)
        after.append(meta_gradient(trainer, trainer.init(KEY)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *after)


def test_meshes_that_cannot_share_the_tasks_are_refused():
    with pytest.raises(ValueError, match="num_devices must be from 1 to 1, the devices available, got 3"):
        task_mesh(3)
    other = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    with pytest.raises(ValueError, match=r"mesh must have one axis, 'task', .*got \{'data': 1\}"):
        meta_trainer(learners.lft(RULE), [quadratic(0)], meta_optimizer=optax.sgd(0.1), mesh=other)


# ---- Memory ----


@pytest.mark.parametrize("learner", [learners.lft(RULE), learners.lft(RULE, second_order=True)])
@pytest.mark.parametrize("memory_mib", [1e-6, 2e-3, 8e-3])
def test_a_memory_budget_changes_no_number(learner, memory_mib):
    families = [quadratic(0, noise=0.3), quadratic(1, size=4, noise=0.3)]
    options = {"num_steps": 5, "tasks_per_family": 6, "meta_optimizer": optax.sgd(0.1)}
    after = []
    for budget in (Unroll("linear", remat=False), Unroll("linear", memory_mib=memory_mib)):
        trainer = meta_trainer(learner, families, unroll=budget, **options)
        after.append(meta_gradient(trainer, trainer.init(KEY)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), *after)


def plan(mib, **options):
    learner, family = learners.lft(RULE), quadratic(0)
    params = learner.init(KEY, (family,))
    return memory_plan(learner, params, family, 12, num_steps=10, steps=8, unroll=Unroll(memory_mib=mib, **options))


def test_the_plan_fits_its_budget():
    assert plan(1000) == MemoryPlan(remat=False, tasks=12, steps=8)
    assert plan(1e-9) == MemoryPlan(remat=True, tasks=1, steps=1)
    assert plan(1000, remat=True).remat
    assert not plan(1e-9, remat=False).remat
    plans = [plan(mib) for mib in np.geomspace(1e-5, 1, 12)]
    assert {p.tasks for p in plans} <= {1, 2, 3, 4, 6, 12}
    assert len(set(plans)) > 3
    # With more memory, remat is switched off once; before and after that, the number of parts decreases.
    assert [p.remat for p in plans] == sorted((p.remat for p in plans), reverse=True)
    for remat in (True, False):
        tasks = [p.tasks for p in plans if p.remat == remat]
        assert tasks == sorted(tasks)


def test_windows_of_one_step_store_more_than_no_remat_does():
    """They store eleven states for ten steps; no remat stores ten, and remat of all steps seven."""
    budgets = np.geomspace(1e-4, 1, 25)
    options = ({"window": 1, "remat": True}, {"remat": False}, {"remat": True})
    cut, plain, whole = ([plan(mib, **o).tasks for mib in budgets] for o in options)
    assert all(a <= b <= c for a, b, c in zip(cut, plain, whole, strict=True))
    assert cut != whole


def test_rematerialised_memory_grows_with_the_square_root_of_the_steps():
    rule = coordinate_lstm(20, 2)
    learner, family = learners.lft(rule), quadratic(0, size=500)
    params = rule.init(KEY)
    keys = jax.random.split(KEY, 1)

    def temporaries(num_steps, remat):
        def total(params):
            options = {
                "num_steps": num_steps,
                "steps": np.arange(num_steps),
                "unroll": Unroll(remat=remat),
                "steps_at_once": 1,
            }
            return jnp.sum(outer_losses(learner, params, family, keys, **options))

        return jax.jit(jax.grad(total)).lower(params).compile().memory_analysis().temp_size_in_bytes

    stored, recomputed = ({k: temporaries(k, remat) for k in (25, 400)} for remat in (False, True))
    assert stored[400] > 10 * stored[25]
    assert recomputed[400] < 5 * recomputed[25]
    assert recomputed[400] < stored[400] / 6
