"""The studies on real images: their runs and victims, and a whole study with the smallest settings."""

import dataclasses
import json
import os
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

from experiments import evaluate, meta_train, train_victim
from experiments.studies import study, victims
from lft_jax.data import load_source
from lft_jax.evaluation import comparison
from lft_jax.meta import learners
from lft_jax.optimizers.rules import coordinate_lstm
from lft_jax.tasks import uap_family
from lft_jax.victims import clean_accuracy, load_victim

TINY = {
    "digits": (
        victims.Recipe("train", "small_cnn", 0, 1),
        victims.Recipe("train", "small_cnn", 1, 1),
        victims.Recipe("unseen", "small_cnn", 1000, 1),
    )
}


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_run_of_a_study_is_valid(name):
    chosen = study.STUDIES[name]
    for run in chosen.runs:
        meta_train.check(
            meta_train.Config(victims=("victim",), workdir="runs", learner=run.learner, **chosen.settings(run))
        )


@pytest.mark.parametrize("source", ["mnist", "cifar10"])
def test_ten_victims_per_source_some_with_an_unseen_architecture(source):
    recipes = victims.RECIPES[source]
    by_role = {role: [r for r in recipes if r.role == role] for role in victims.ROLES}
    assert len(by_role["train"]) + len(by_role["validation"]) == 8
    assert len(by_role["unseen"]) == 2
    assert len({r.architecture for r in recipes}) == 3
    seen = {r.architecture for r in recipes if r.role != "unseen"}
    assert {r.architecture for r in by_role["unseen"]} - seen
    assert len({(r.architecture, r.seed) for r in recipes}) == 10
    assert not {r.seed for r in by_role["unseen"]} & {r.seed for r in recipes if r.role != "unseen"}


@pytest.mark.parametrize("source", ["mnist", "cifar10"])
def test_more_unseen_victims_have_seeds_that_those_for_training_lack(source):
    by_role = {role: {r.seed for r in victims.MORE[source] if r.role == role} for role in victims.ROLES}
    assert by_role == {"train": {*by_role["train"]}, "validation": set(), "unseen": {1000}}
    assert 1000 not in by_role["train"]


def test_studies_do_not_use_more_victims():
    for source in victims.RECIPES:
        used = {path for role in victims.ROLES for path in victims.paths(source, role)}
        assert not used & {path for role in victims.ROLES for path in victims.paths(source, role, more=True)}


@pytest.mark.standard_promotion
def test_victims_are_trained_once_and_a_study_compares_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(victims, "RECIPES", TINY)
    flags = victims.Config(sources=("digits",), folder=str(tmp_path / "victims"))
    victims.train_missing(flags)
    monkeypatch.setattr(train_victim, "train", lambda flags: pytest.fail("trained again"))
    victims.train_missing(flags)
    assert len(victims.paths("digits", "train", flags.folder)) == 2

    meta = {
        "rule": "coordinate_lstm",
        "num_steps": 2,
        "meta_steps": 1,
        "validation_tasks": 0,
        "num_directions": 3,
        "augment": False,
    }
    protocol = {"at": (1, 2), "num_tasks": 2, "num_validation": 2, "methods": ("sgd",), "oracle_steps": 2}
    learned = (study.Run("lft", ("digits",), {"hidden": 2}), study.Run("maml", ("digits",)))
    tiny = study.Study(learned, meta, protocol, {"base_step": 0.3})
    monkeypatch.setattr(study, "STUDIES", {"tiny": tiny, "again": dataclasses.replace(tiny, of="tiny")})
    output = tmp_path / "results.json"
    given = study.Config(
        study="tiny",
        seeds=2,
        only=("lft/digits",),
        attacked=("digits",),
        victims=flags.folder,
        workdir=str(tmp_path / "runs"),
        output=str(output),
    )
    study.study(given)
    rows = {row["method"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows["lft"]["seeds"] == 2
    assert not rows["lft"]["seen_victim"]
    # Three directions with central differences, on ten support images.
    assert rows["lft"]["queries"] == rows["sgd"]["queries"] == [60, 120]
    assert "maml" not in rows
    made = json.loads((tmp_path / "runs/tiny/lft_digits_0/config.json").read_text())
    assert (made["hidden"], made["base_step"]) == (2, 0.3)
    one = study._unseen("digits_small_cnn_1000", flags.folder)
    assert one == study._unseen("digits", flags.folder) == victims.paths("digits", "unseen", flags.folder)
    with pytest.raises(ValueError, match=r"attacked: unknown name 'digit'. Did you mean 'digits'"):
        study.study(dataclasses.replace(given, attacked=("digit",)))
    study.study(dataclasses.replace(given, attacked=(), output=str(tmp_path / "none.json")))
    assert not (tmp_path / "none.json").exists()
    study.study(dataclasses.replace(given, study="again", attacked=()))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]
    with pytest.raises(ValueError, match="only: tiny has no run lft/mnist; its runs are lft/digits, maml/digits"):
        study.study(study.Config(study="tiny", only=("lft/mnist",)))


def test_sources_without_victims_are_refused():
    with pytest.raises(ValueError, match="sources: there are no victims of 'svhn'"):
        victims.train_missing(victims.Config(sources=("svhn",)))


@pytest.fixture
def runs(monkeypatch):
    """Makes runs for `evaluate` from flags, with victims that are named after their source."""

    def load(path):
        return types.SimpleNamespace(card={"source": path})

    monkeypatch.setattr(evaluate, "load_victim", load)

    def make(*changes):
        learner = learners.lft(coordinate_lstm(2))
        return [
            (meta_train.Config(workdir=f"{number}", **c), comparison.Learned(learner, [number]))
            for number, c in enumerate(changes)
        ]

    return make


def test_runs_that_differ_in_seed_are_one_method(runs):
    (method,) = evaluate._methods(runs({"victims": ("a",), "seed": 0}, {"victims": ("a",), "seed": 1}), "b").items()
    assert (method[0], method[1].params) == ("lft", [0, 1])


def test_runs_on_different_sources_are_different_methods(runs):
    methods = evaluate._methods(
        runs({"victims": ("a",)}, {"victims": ("a", "b")}, {"victims": ("a",), "learner": "maml"}), "b"
    )
    assert list(methods) == [
        "lft (a)",
        "lft (a + b)",
    ]  # maml (a) is left out, since its initialization has another shape


def test_a_run_may_have_been_meta_trained_on_a_public_model_too(runs, monkeypatch):
    made = runs({"victims": ("a", "public/efficientnet_lite2")}, {"victims": ("b",)})
    assert list(evaluate._methods(made, "a")) == ["lft (a + imagenet_sample)", "lft (b)"]
    monkeypatch.setattr(evaluate.common, "family_of", lambda path, *_: path)
    assert evaluate._transfer_families(made, "a", None, types.SimpleNamespace(data_dir=None)) == ["a"]


def test_runs_with_different_settings_are_refused(runs):
    with pytest.raises(ValueError, match="learned: runs of lft may differ only in their seed, not in hidden"):
        evaluate._methods(runs({"victims": ("a",)}, {"victims": ("a",), "hidden": 3}), "a")


def test_runs_may_divide_the_same_queries_differently(runs):
    """A search of 160 evaluations with 6 directions per step, or 10 directions: both make 400 evaluations in 20 steps.

    Each run is evaluated as it was meta-trained. Runs with another total may not be compared.
    """
    (searching, _), (estimating, _), (dearer, _), (exact, _) = made = runs(
        {"victims": ("b",), "num_directions": 6, "waves": 160},
        {"victims": ("b",), "learner": "maml", "num_directions": 10},
        {"victims": ("b",), "num_directions": 11},
        {"victims": ("b",), "waves": 400},
    )
    key = evaluate._comparison_key(searching, 20)
    assert evaluate._comparison_key(estimating, 20) == key
    assert key not in [evaluate._comparison_key(*of) for of in ((estimating, 10), (dearer, 20), (exact, 20))]
    images = jnp.zeros((2, 4, 4, 1))
    tasks = uap_family(images, [0, 0], lambda x: x[:, 0, :2, 0], ways=1, query_shots=1, epsilon=0.1)
    searched, estimated = (method.tasks(tasks) for method in evaluate._methods(made[:2], "b").values())
    assert (searched.recipe.search.evaluations, searched.estimator.num_directions) == (160, 6)
    assert (estimated.recipe.search, estimated.estimator.num_directions) == (None, 10)


@pytest.mark.parametrize("change", [{"num_directions": 11}, {"num_directions": 10, "smoothing": 0.1}])
def test_runs_with_different_tasks_or_evaluations_are_refused(runs, change, monkeypatch):
    made = runs({"victims": ("b",), "num_directions": 6, "waves": 160}, {"victims": ("b",), **change})
    monkeypatch.setattr(meta_train, "load_learned", lambda workdir: made[int(workdir)])
    with pytest.raises(ValueError, match="learned: 1 was meta-trained on other tasks, or with another number of eval"):
        evaluate.evaluate(evaluate.Config(learned=("0", "1"), victims=("b",), output="none.json"))


def test_stored_victims_match_their_recipes():
    folder = pathlib.Path(victims.__file__).parents[2] / "victims"
    planned = {}
    for more, table in enumerate((victims.RECIPES, victims.MORE)):
        for source, recipes in table.items():
            of_source = {victims.path_of(str(folder), source, r): r for r in recipes}
            found = [p for role in victims.ROLES for p in victims.paths(source, role, str(folder), more=bool(more))]
            assert sorted(of_source) == sorted(found) and len(of_source) == len(recipes)
            assert not planned.keys() & of_source.keys()
            planned |= of_source
    stored = [str(card.parent) for card in folder.glob("*/card.json")]
    assert set(stored) == planned.keys()
    for path in stored:
        victim, recipe = load_victim(path), planned[path]
        made = tuple(victim.card[name] for name in ("architecture", "seed", "epochs"))
        assert made == (recipe.architecture, recipe.seed, recipe.epochs)
        assert ("adversarial_training" in victim.card) == recipe.adversarial
        images = jax.ShapeDtypeStruct((1, *victim.card["image_shape"]), jnp.float32)
        assert jax.eval_shape(victim.logits_fn, images).shape == (1, 10)


@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR is not set")
def test_accuracy_of_a_stored_victim_matches_its_card():
    victim = load_victim(pathlib.Path(victims.__file__).parents[2] / "victims" / "mnist_small_cnn_0")
    test = load_source("mnist", "test")
    found = clean_accuracy(victim.logits_fn, test.images, test.labels)
    assert abs(found - victim.card["test_accuracy"]) < 1e-3  # rounding differs between machines
