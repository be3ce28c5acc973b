"""The comparison table on a linear victim of 4x4 images."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax import Augmentation, WaveSearch, evaluation, learners, oracles
from lft_jax.evaluation import comparison, metrics
from lft_jax.evaluation.baselines import Setting, make_baselines
from lft_jax.evaluation.comparison import Learned, Protocol, Target, compare
from lft_jax.optimizers.rules import MomentumUpdate, coordinate_lstm
from lft_jax.tasks.perturbation import AttackLoss
from lft_jax.tasks.recipe import AttackRecipe
from lft_jax.tasks.uap import uap_family

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(16, 3)).astype(np.float32)
#: As many validation as test tasks, measured after one step: then tuning and the test share compiled programs.
SETTINGS = Protocol(
    num_steps=2, at=(2,), num_tasks=4, num_validation=4, methods=("uap_sgd",), oracle_steps=15, batch_size=2, seed=7
)
OPTIONS = {"num_steps": 2, "at": (2,), "batch_size": 2}
RULE = coordinate_lstm(2, 1, features=("momentum", "spread"), base_update=MomentumUpdate(0.3))
LOSS, SETTING = AttackLoss("cross_entropy"), {"step": 0.3, "decay": 0.5, "final": 1.0}
SEEDS = [RULE.init(jax.random.key(seed)) for seed in (0, 1)]


def linear(weights, images):
    return (images - 0.5).reshape(len(images), -1) @ weights


def family(weights=WEIGHTS):
    images = RNG.uniform(0.2, 0.8, size=(40, 4, 4, 1)).astype(np.float32)
    labels = ((images - 0.5).reshape(40, -1) @ WEIGHTS).argmax(1)
    labels[::10] = (labels[::10] + 1) % 3
    victim = jax.tree_util.Partial(linear, jnp.asarray(weights))
    recipe = AttackRecipe(augmentation=Augmentation(shift=0.25))
    return uap_family(images, labels, victim, ways=2, shots=2, query_shots=3, epsilon=0.1, recipe=recipe)


TARGET = Target("toy", "linear", False, *(family() for _ in range(3)))


@pytest.fixture(scope="module")
def compared():
    """Rows by method, perturbations, reported lines, and the baselines, with small grids."""
    table = {
        name: baseline._replace(
            grid=(
                Setting({**baseline.default.params, "step": 0.05}, AttackLoss("hinge")),
                Setting({**baseline.default.params, "step": 0.7}, AttackLoss("cross_entropy")),
            )
        )
        for name, baseline in make_baselines("linf").items()
        if name in ("pgd", "uap_sgd")
    }
    lines, learned = [], {"lft": Learned(learners.lft(RULE), SEEDS)}
    # Another victim of the same shape, for the transfer.
    transfer = [family(WEIGHTS + RNG.normal(scale=0.3, size=(16, 3)).astype(np.float32))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison.baselines, "make_baselines", lambda norm: table)
        rows, pictures = compare(TARGET, learned, SETTINGS, transfer_from=transfer, report=lines.append)
    return {row["method"]: row for row in rows}, pictures, lines, table


def keys():
    """The test and validation tasks of the protocol's seed."""
    test, validation, _, _ = jax.random.split(jax.random.key(SETTINGS.seed), 4)
    return jax.random.split(test, SETTINGS.num_tasks), jax.random.split(validation, SETTINGS.num_validation)


def test_every_method_has_a_row(compared):
    rows, pictures, lines, _ = compared
    best = rows["transfer, fine-tuned"]["by"]
    assert best in ("pgd", "uap_sgd")
    run = ["pgd", "pgd (untuned)", "uap_sgd", "uap_sgd (untuned)", "transfer, fine-tuned"]
    run += [f"{best}, augmented", "transfer, fine-tuned, augmented", "lft"]
    assert list(rows) == [*run[:4], "transfer", *run[4:], "oracle"]
    assert [line.rsplit(" ", 1)[0] for line in lines] == [f"toy/linear: {name}" for name in run]
    assert pictures.keys() == {"lft", "oracle"}
    for picture in pictures.values():
        assert picture.shape == (4, 4, 1)
        assert np.abs(picture).max() <= 0.1 * (1 + 1e-6)
    for row in rows.values():
        assert (row["source"], row["victim"], row["seen_victim"], row["at"]) == ("toy", "linear", False, [2])
        assert len(row["asr"]) == len(row["asr_interval"]) == 1
        assert len(row["task_asr"]) == 4
        np.testing.assert_allclose(row["asr"][-1], np.mean(row["task_asr"]), atol=1e-4)


def test_augmented_baselines_run_on_the_tasks_of_the_learned_methods(monkeypatch):
    """Plain ones run without augmentation."""
    table = {"pgd": make_baselines("linf")["pgd"]._replace(grid=(Setting(SETTING, LOSS),))}
    monkeypatch.setattr(comparison.baselines, "make_baselines", lambda norm: table)
    pgd, plain = table["pgd"].learner, {"augmentation": None, "loss": LOSS}
    learned = {"learned": Learned(pgd, [SETTING], lambda family: family.with_recipe(**plain))}
    rows, _ = compare(TARGET, learned, dataclasses.replace(SETTINGS, methods=("pgd",)))
    rows = {row["method"]: row for row in rows}

    def asr(augmentation):
        family = TARGET.test.with_recipe(loss=LOSS, augmentation=augmentation)
        return np.asarray(evaluation.evaluate(pgd, SETTING, family, keys()[0], **OPTIONS)["asr"])[:, -1]

    row = rows["pgd, augmented"]
    np.testing.assert_allclose(row["task_asr"], asr(TARGET.test.recipe.augmentation), atol=1e-4)
    assert (row["settings_tried"], row["setting"]) == (1, {**SETTING, **dataclasses.asdict(LOSS)})
    np.testing.assert_allclose(rows["pgd"]["task_asr"], asr(None), atol=1e-4)
    np.testing.assert_array_equal(rows["learned"]["task_asr"], rows["pgd"]["task_asr"])  # it changes its tasks


def test_rows_survive_json(compared):
    rows = compared[0]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_learned_rows_are_means_over_seeds_and_paired_with_tuned_pgd(compared):
    rows, _, _, table = compared
    setting = rows["pgd"]["setting"]
    tuned = next(s for s in table["pgd"].grid if s.params["step"] == setting["step"])
    assert setting == {**tuned.params, "kind": tuned.support_loss.kind, "kappa": 0.0, "beta": 12.0, "target": None}
    judged = metrics.minimising(TARGET.test.with_recipe(augmentation=None), tuned.support_loss)
    pgd = np.float64(evaluation.evaluate(table["pgd"].learner, tuned.params, judged, keys()[0], **OPTIONS)["asr"])
    seeds = [evaluation.evaluate(learners.lft(RULE), p, TARGET.test, keys()[0], **OPTIONS) for p in SEEDS]
    lft = np.mean([np.float64(metrics["asr"]) for metrics in seeds], axis=0)
    row = rows["lft"]
    np.testing.assert_allclose(row["asr"], lft.mean(0), rtol=1e-6)
    np.testing.assert_allclose(row["task_asr"], lft[:, -1], atol=1e-4)
    np.testing.assert_allclose(row["asr_interval"], 1.96 * lft.std(0, ddof=1) / 2, rtol=1e-5)
    np.testing.assert_allclose(row["seed_asr"], [np.mean(m["asr"][:, -1]) for m in seeds], rtol=1e-6)
    assert (row["seeds"], rows["pgd"]["seeds"]) == (2, 1)
    difference = lft[:, -1] - pgd[:, -1]
    expected = [difference.mean(), 1.96 * difference.std(ddof=1) / 2]
    np.testing.assert_allclose(row["difference_to_tuned_pgd"], expected, rtol=1e-5, atol=1e-7)
    for name in ("l1", "l2", "linf", "clean_accuracy"):
        np.testing.assert_allclose(row[name], np.mean([m[name][:, -1] for m in seeds]), rtol=1e-5)


def test_baselines_are_tuned_on_validation_tasks(compared):
    rows, _, _, table = compared
    plain = TARGET.validation.with_recipe(augmentation=None)
    best = rows["transfer, fine-tuned"]["by"]
    tried = {name: (baseline, plain) for name, baseline in table.items()}
    for name, (baseline, family) in {**tried, f"{best}, augmented": (table[best], TARGET.validation)}.items():
        tuned = evaluation.tune(baseline, family, keys()[1], num_steps=2, batch_size=2)
        assert rows[name]["setting"]["step"] == tuned.setting.params["step"]
        assert rows[name]["settings_tried"] == 2
    for name, baseline in table.items():
        assert rows[f"{name} (untuned)"]["setting"]["step"] == baseline.default.params["step"]


def test_fixed_perturbations_are_not_fine_tuned(compared):
    rows, pictures, _, _ = compared
    metrics = evaluation.evaluate_fixed(jnp.asarray(pictures["oracle"]), TARGET.test, keys()[0], batch_size=2)
    np.testing.assert_allclose(rows["oracle"]["asr"], [np.mean(metrics["asr"])], rtol=1e-6)
    assert len(rows["oracle"]["runs"]) == 4
    assert rows["transfer"]["victims"] == 1


def made_up(curves, tasks=7):
    """Runs of one seed with about these mean ASR curves, as `compare` collects them."""
    noise = np.random.default_rng(1).uniform(-0.05, 0.05, size=(tasks, 3))
    names = ("clean_accuracy", "loss", "l1", "l2", "linf")
    return {
        name: ([{"asr": np.float32(curve + noise), **dict.fromkeys(names, np.ones((tasks, 3), np.float32))}], {})
        for name, curve in curves.items()
    }


@pytest.mark.parametrize("methods", [("pgd", "adam"), ("adam",), ()])
def test_gaps_and_steps_are_those_of_the_curves(methods):
    """The gap starts at the best baseline; steps are counted until the last value of tuned PGD."""
    curves = {
        "pgd": [0.2, 0.3, 0.5],
        "adam": [0.1, 0.2, 0.3],
        "pgd, augmented": [0.3, 0.4, 0.7],
        "lft": [0.3, 0.55, 0.6],
        "oracle": [0.8] * 3,
    }
    target, protocol = Target("toy", "made up", True, None, None, None), Protocol(5, (1, 2, 5), methods=methods)
    rows = {row["method"]: row for row in comparison._rows(target, made_up(curves), protocol)}
    steps = {name: row["steps_to_tuned_pgd"] for name, row in rows.items()}
    assert steps == {"pgd": 5, "adam": None, "pgd, augmented": 5, "lft": 2, "oracle": 1}
    gaps = {name: row["gap_closed"] for name, row in rows.items()}
    assert gaps == pytest.approx(
        {"pgd": 0, "adam": -2 / 3, "pgd, augmented": 2 / 3, "lft": 1 / 3, "oracle": 1}, abs=1e-6
    )
    assert gaps["pgd"] == 0
    gaps = {name: row["gap_closed_augmented"] for name, row in rows.items()}
    assert gaps == pytest.approx({"pgd": -2, "adam": -4, "pgd, augmented": 0, "lft": -1, "oracle": 1}, abs=1e-6)
    assert rows["pgd"]["difference_to_tuned_pgd"] == [0, 0]
    np.testing.assert_allclose(rows["lft"]["difference_to_tuned_pgd"], [0.1, 0], atol=1e-6)
    json.dumps(list(rows.values()), allow_nan=False)


def test_baselines_are_run_as_published():
    """Without augmentation, subspaces, directions per image, and a search; its queries become directions."""
    for antithetic, more in ((True, 3), (False, 5)):  # 25 evaluations in 5 steps
        plain = oracles.ZerothOrder(3, 0.1, antithetic=antithetic)
        estimator = dataclasses.replace(plain, resolution=2, basis="dct", per_example=True)
        ours = [dataclasses.replace(f.with_recipe(search=WaveSearch(10, 14)), estimator=estimator) for f in TARGET[3:]]
        target = TARGET._replace(train=ours[0], validation=ours[1], test=ours[2])
        for family in comparison._as_published(target, 5)[3:]:
            assert (family.recipe.augmentation, family.recipe.search) == (None, None)
            assert family.estimator == dataclasses.replace(plain, num_directions=3 + more)


def test_transfer_rows_count_as_baselines_and_one_task_has_no_interval():
    curves = {"pgd": [0.2] * 3, "transfer, fine-tuned": [0.6] * 3, "oracle": [0.6] * 3}
    target, protocol = Target("toy", "made up", True, None, None, None), Protocol(5, (1, 2, 5), num_tasks=1)
    rows = comparison._rows(target, made_up(curves, tasks=1), protocol)
    assert [row["gap_closed"] for row in rows] == [None] * 3
    assert [row["asr_interval"] for row in rows] == [[None] * 3] * 3
    assert rows[1]["difference_to_tuned_pgd"][1] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"num_tasks": 0}, "num_tasks must be at least 1"),
        ({"num_validation": 0}, "num_validation must be at least 1"),
        ({"oracle_steps": 0}, "oracle_steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"at": ()}, "at must ascend from at least 1 to num_steps = 20"),
        ({"at": (0, 20)}, "at must ascend"),
        ({"at": (5, 1, 20)}, "at must ascend"),
        ({"at": (1, 1, 20)}, "at must ascend"),
        ({"at": (1, 10)}, "at must ascend"),
        ({"methods": ("pdg",)}, "methods: unknown name 'pdg'. Did you mean 'pgd'"),
    ],
)
def test_bad_protocols_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**options)
