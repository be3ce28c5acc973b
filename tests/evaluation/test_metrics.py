"""Evaluation of fine-tuners on linear victims of 4x4 images, against Python loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lft_jax import evaluation, learners
from lft_jax.evaluation import baselines, metrics
from lft_jax.optimizers.rules import coordinate_lstm
from lft_jax.tasks.perturbation import AttackLoss, Constraint
from lft_jax.tasks.uap import uap_family

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(16, 3)).astype(np.float32)
IMAGES = RNG.uniform(0.2, 0.8, size=(60, 4, 4, 1)).astype(np.float32)
LABELS = ((IMAGES - 0.5).reshape(60, -1) @ WEIGHTS).argmax(1)
KEYS = jax.random.split(jax.random.key(5), 4)  # a multiple of the batch size, which compiles faster
STEPS, AT = 3, (1, 3)
PGD = baselines.make_baselines("linf")["pgd"]
SETTING = {"step": 0.4, "decay": 0.0, "final": 0.1}


def linear(weights, images):
    return (images - 0.5).reshape(len(images), -1) @ weights


def family(**options):
    victim = jax.tree_util.Partial(linear, jnp.asarray(WEIGHTS))
    options = {"ways": 2, "shots": 2, "query_shots": 4, "epsilon": 0.1, **options}
    return uap_family(IMAGES, LABELS, victim, **options)


FAMILY = family()


def evaluate(learner=PGD.learner, params=SETTING, family=FAMILY, **options):
    options = {"num_steps": STEPS, "at": AT, "batch_size": 2, **options}
    return evaluation.evaluate(learner, params, family, KEYS, **options)


def signed_descent(support, step, final):
    """The perturbation after each step of PGD on the hinge of a linear victim, in NumPy."""
    images, labels = (np.asarray(x) for x in support)
    theta, thetas = np.zeros((4, 4, 1)), []
    for k in range(STEPS):
        grad = np.zeros(16)
        for image, label in zip(images, labels, strict=True):
            logits = (np.clip(image + theta, 0, 1) - 0.5).ravel() @ WEIGHTS
            rival = max((j for j in range(3) if j != label), key=lambda j: logits[j])
            if logits[label] > logits[rival]:
                inside = ((image + theta > 0) & (image + theta < 1)).ravel()
                grad += (WEIGHTS[:, label] - WEIGHTS[:, rival]) * inside
        theta = theta - step * 0.1 * (1 - (1 - final) * k / STEPS) * np.sign(grad).reshape(4, 4, 1)
        theta = np.clip(theta, -0.1, 0.1)
        thetas.append(theta)
    return thetas


# ---- Tasks ----


@pytest.fixture(scope="module")
def evaluated():
    return evaluate()


def test_evaluation_is_a_loop_over_tasks(evaluated):
    metrics = jax.jit(FAMILY.metrics)
    for task, key in enumerate(KEYS):
        episode = FAMILY.sample(jax.random.split(key, 3)[0])
        thetas = signed_descent(episode.support, 0.4, 0.1)
        for column, step in enumerate(AT):
            expected = metrics(jnp.asarray(thetas[step - 1], jnp.float32), episode.query)
            assert evaluated.keys() == expected.keys() | {"queries"}
            for name, value in expected.items():
                np.testing.assert_allclose(evaluated[name][task, column], value, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(evaluated["queries"], [[4 * step for step in AT]] * len(KEYS))
    assert len(np.unique(evaluated["loss"])) > len(KEYS)


def test_the_first_perturbation_is_that_of_the_first_task(evaluated):
    theta = evaluation.first_perturbation(PGD.learner, SETTING, FAMILY, KEYS[0], STEPS)
    support = FAMILY.sample(jax.random.split(KEYS[0], 3)[0]).support
    np.testing.assert_allclose(theta, signed_descent(support, 0.4, 0.1)[-1], atol=1e-6)
    fixed = evaluation.evaluate_fixed(theta, FAMILY, KEYS, batch_size=2)
    assert fixed.keys() == evaluated.keys() - {"queries"}
    for name, values in fixed.items():
        assert values.shape == (len(KEYS), 1)
        np.testing.assert_allclose(values[0, 0], evaluated[name][0, -1], rtol=1e-5, err_msg=name)


def test_settings_losses_and_learners_of_one_rule_share_a_compilation(evaluated):
    before = metrics._evaluate.compiled()
    cross_entropy = metrics.minimising(FAMILY, AttackLoss("cross_entropy", beta=3.0))
    other = evaluate(params={"step": 0.2, "decay": 0.5, "final": 1.0}, family=cross_entropy)
    assert metrics._evaluate.compiled() == before
    assert not np.array_equal(other["loss"], evaluated["loss"])
    rule = coordinate_lstm(2, 1, features="raw")
    params = rule.init(KEYS[0])
    lft, l2o = (evaluate(make(rule), params, num_steps=1, at=(1,)) for make in (learners.lft, learners.l2o))
    assert metrics._evaluate.compiled() == before + 1
    jax.tree.map(np.testing.assert_array_equal, lft, l2o)


@pytest.mark.parametrize("at", [(), (0,), (1, STEPS + 1), (-1,)])
def test_steps_outside_the_run_are_refused(at):
    with pytest.raises(ValueError, match=f"at must hold steps from 1 to num_steps = {STEPS}"):
        evaluate(at=at)


# ---- Tuning ----


def test_tuning_reports_all_settings_and_picks_the_best():
    judged = family(loss=AttackLoss(target=0), epsilon=0.2)
    losses = (AttackLoss("hinge"), AttackLoss("cross_entropy"))
    grid = tuple(
        baselines.Setting({"step": step, "decay": 0.0, "final": 1.0}, loss) for step in (0.01, 0.8) for loss in losses
    )
    tuned = evaluation.tune(PGD._replace(grid=grid), judged, KEYS, num_steps=STEPS, batch_size=2)
    assert [setting for setting, _ in tuned.scores] == list(grid)
    for setting, score in tuned.scores:
        # The losses of the grid take the target of the family.
        loss = dataclasses.replace(setting.support_loss, target=0)
        again = evaluate(params=setting.params, family=judged.with_recipe(loss=loss), at=(STEPS,))
        np.testing.assert_allclose(score, np.mean(again["asr"]), rtol=1e-6)
    scores = [score for _, score in tuned.scores]
    assert len(set(scores)) > 1
    assert tuned.setting == grid[int(np.argmax(scores))]


@pytest.mark.standard_promotion
def test_under_a_penalty_settings_are_chosen_by_the_loss():
    """The larger step has the higher success rate and, with this penalty, the higher loss."""
    penalized = dataclasses.replace(FAMILY, constraint=Constraint("l1", penalty=1.0))
    grid = tuple(baselines.Setting({"learning_rate": r, "decay": 0.0}, FAMILY.recipe.loss) for r in (1e-3, 1.0))
    tuned = evaluation.tune(
        baselines.make_baselines("l1")["sgd"]._replace(grid=grid), penalized, KEYS, num_steps=STEPS, batch_size=2
    )
    learner = baselines.make_baselines("l1")["sgd"].learner
    metrics = [evaluate(learner, s.params, penalized, at=(STEPS,)) for s in grid]
    assert np.mean(metrics[1]["asr"]) > np.mean(metrics[0]["asr"])
    np.testing.assert_allclose([m for _, m in tuned.scores], [-np.mean(m["loss"]) for m in metrics], rtol=1e-5)
    assert tuned.setting == grid[0]


# ---- Numbers ----


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_the_interval_is_the_normal_one(values):
    mean, width = evaluation.mean_interval(np.asarray(values))
    expected = sum(values) / len(values)
    variance = sum((value - expected) ** 2 for value in values) / (len(values) - 1)
    np.testing.assert_allclose(mean, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(width, 1.96 * math.sqrt(variance / len(values)), rtol=1e-6, atol=1e-12)
    assert evaluation.mean_interval(np.asarray(values[:1])) == (values[0], math.inf)


def test_the_interval_covers_the_mean_nineteen_times_in_twenty():
    samples = np.random.default_rng(0).normal(0.3, 2.0, size=(2000, 60))
    covered = [abs(mean - 0.3) <= width for mean, width in map(evaluation.mean_interval, samples)]
    assert 0.93 < np.mean(covered) < 0.965


@pytest.mark.parametrize(("target", "expected"), [(0.05, 1), (0.3, 2), (0.35, 4), (0.5, None)])
def test_steps_to_reach(target, expected):
    assert evaluation.steps_to_reach([0.1, 0.3, 0.2, 0.4], target) == expected


@pytest.mark.parametrize(
    ("asr", "baseline", "ceiling", "expected"),
    [(0.5, 0.4, 0.6, 0.5), (0.3, 0.4, 0.6, -0.5), (0.7, 0.4, 0.6, 1.5), (0.5, 0.6, 0.6, None), (0.5, 0.7, 0.6, None)],
)
def test_gap_closed(asr, baseline, ceiling, expected):
    assert evaluation.gap_closed(asr, baseline, ceiling) == (expected and pytest.approx(expected))


# ---- The full-data oracle ----


def full_data(families=(FAMILY,), judge=FAMILY, **options):
    options = {"num_steps": 20, "batch_size": 20, "steps": (0.1,), **options}
    return evaluation.full_data_uap(families, judge, KEYS[0], **options)


def predicted(theta, rows=slice(None)):
    """The classes of the perturbed images."""
    images = np.clip(IMAGES[rows] + np.asarray(theta), 0, 1) - 0.5
    return (images.reshape(len(images), -1) @ WEIGHTS).argmax(1)


def asr_of(theta, target=None):
    found = predicted(theta)
    return np.mean(found != LABELS) if target is None else np.mean(found[np.not_equal(LABELS, target)] == target)


@pytest.mark.parametrize("targeted", [False, True])
def test_the_full_data_perturbation_is_the_best_of_its_runs(targeted):
    theta, records = full_data(targeted=targeted)
    runs = [("cross_entropy", None), ("hinge", None)] + [("cross_entropy", t) for t in range(3 * targeted)]
    assert [(record["loss"], record["target"]) for record in records] == runs
    assert np.abs(theta).max() <= 0.1 * (1 + 1e-6)
    np.testing.assert_allclose(asr_of(theta), max(record["asr"] for record in records), rtol=1e-6)
    assert asr_of(theta) > 0.3
    assert asr_of(0 * theta) == 0


def test_the_full_data_perturbation_uses_the_kappa_of_its_judge(monkeypatch):
    tried = []

    def run(families, theta, key, step, loss, *options):
        tried.append((loss.kind, loss.kappa))
        return theta

    monkeypatch.setattr(metrics, "_full_data_run", run)
    full_data(judge=family(loss=AttackLoss("hinge", kappa=4.0)))
    assert tried == [("cross_entropy", 4.0), ("hinge", 4.0)]


def test_the_full_data_perturbation_uses_the_target_of_its_judge():
    judge = family(loss=AttackLoss(target=1), epsilon=0.2)
    theta, records = full_data([judge], judge, targeted=True)
    assert {record["target"] for record in records} == {1}
    np.testing.assert_allclose(asr_of(theta, target=1), max(record["asr"] for record in records), rtol=1e-6)
    assert asr_of(theta, target=1) > 0.3


def test_a_larger_penalty_gives_a_smaller_full_data_perturbation():
    sizes = []
    for penalty in (1e-6, 100.0):
        penalized = family(epsilon=None, constraint=Constraint("l2", penalty=penalty))
        sizes.append(np.abs(full_data([penalized], penalized)[0]).max())
    assert sizes[1] < sizes[0] / 2


def test_several_victims_are_attacked_at_once():
    """A second victim whose logits are -3 times those of the first."""
    opposite = dataclasses.replace(FAMILY, logits_fn=jax.tree_util.Partial(linear, jnp.asarray(-3 * WEIGHTS)))
    theta, _ = full_data([FAMILY, opposite])
    assert asr_of(theta) < asr_of(full_data()[0]) - 0.1


def test_the_judges_images_are_spread_evenly():
    order = np.argsort(LABELS, kind="stable")
    judge = uap_family(IMAGES[order], LABELS[order], FAMILY.logits_fn, ways=2, query_shots=4, epsilon=0.1)
    theta, records = full_data(judge=judge, num_judged=20, num_steps=10)
    rows = order[np.linspace(0, 59, 20).astype(int)]
    expected = np.mean(predicted(theta, rows) != LABELS[rows])
    np.testing.assert_allclose(max(record["asr"] for record in records), expected, rtol=1e-6)
    assert set(LABELS[rows]) == {0, 1, 2}
