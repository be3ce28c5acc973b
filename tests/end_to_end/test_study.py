"""The programs one after the other on real digits, with the smallest settings."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import attack, evaluate, meta_train, train_victim
from lft_jax.data import load_source
from lft_jax.victims import clean_accuracy, load_victim

pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with a trained victim and a meta-trained rule."""
    folder = tmp_path_factory.mktemp("study")
    with jax.numpy_dtype_promotion("standard"):
        train_victim.train(train_victim.Config(source="digits", epochs=3, output=str(folder / "victim")))
        meta_train.meta_train(_flags(folder, meta_steps=2))
    return folder


def _flags(folder, **changes):
    has_no_rule = changes.get("learner") in ("maml", "sign_maml", "reptile", "meta_sgd")
    rule = {} if has_no_rule else {"rule": "coordinate_lstm", "hidden": 3}
    settings = {
        "victims": (str(folder / "victim"),),
        "workdir": str(folder / "lft"),
        **rule,
        "num_steps": 2,
        "checkpoint_every": 1,
        "validation_tasks": 2,
    }
    return meta_train.Config(**{**settings, **changes})


def test_meta_training_writes_a_run(study):
    lines = [json.loads(line) for line in (study / "lft" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(0 <= line["validation_asr"] <= 1 for line in lines)
    assert list((study / "lft" / "tensorboard").glob("events.*"))


def test_finished_run_is_not_repeated_and_other_configurations_are_refused(study):
    before = (study / "lft" / "metrics.jsonl").read_text()
    card = study / "lft" / "rule.json"
    made = json.loads(card.read_text())
    card.write_text(json.dumps({**made, "commit": "abc"}))
    meta_train.meta_train(_flags(study, meta_steps=2))
    assert (study / "lft" / "metrics.jsonl").read_text() == before
    assert json.loads(card.read_text())["commit"] == "abc"
    with pytest.raises(ValueError, match=r"another configuration.*hidden: 3 stored, 4 given"):
        meta_train.meta_train(_flags(study, meta_steps=2, hidden=4))


def test_pes_run_after_imitation_is_resumed_and_loaded(study):
    windows = {"meta_gradient": "pes", "es_window": 1, "es_pairs": 2, "imitation_steps": 1, "base_update": "none"}
    flags = _flags(study, workdir=str(study / "pes"), meta_steps=5, validation_tasks=0, **windows)
    state = meta_train.meta_train(flags)
    assert jax.tree.leaves(state.particles[0].carried)[0].shape[:4] == (1, 2, 2, 1)  # families, pairs, signs, tasks
    lines = [json.loads(line) for line in (study / "pes" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in lines)
    shutil.rmtree(study / "pes" / "checkpoints" / "5")  # as if it had stopped after the first of two windows
    shutil.rmtree(study / "pes" / "particles" / "5")
    with pytest.warns(UserWarning, match="checkpoint of meta-step 4; 1 later meta-steps are run again"):
        resumed = meta_train.meta_train(flags)
    _, learned = meta_train.load_learned(flags.workdir)
    for found in (resumed.params, learned.params[0]):
        jax.tree.map(np.testing.assert_array_equal, found, state.params)


@pytest.mark.parametrize("learner", meta_train.CONGRUOUS)
def test_initializations_are_stored_and_loaded(study, learner):
    flags = _flags(study, learner=learner, workdir=str(study / learner), meta_steps=1, validation_tasks=0)
    state = meta_train.meta_train(flags)
    stored, learned = meta_train.load_learned(flags.workdir)
    assert stored.learner == learned.learner.name == learner
    jax.tree.map(np.testing.assert_array_equal, learned.params, [state.params])


def test_evaluate_writes_results_table_and_figures(study):
    flags = evaluate.Config(
        learned=(str(study / "lft"),),
        victims=(str(study / "victim"),),
        output=str(study / "results.json"),
        at=(1, 2),
        num_tasks=3,
        num_validation=2,
        methods=("pgd",),
        oracle_steps=3,
        shots=2,
    )
    results = evaluate.evaluate(flags)
    assert json.loads((study / "results.json").read_text()) == json.loads(json.dumps(results))
    methods = [row["method"] for row in results["rows"]]
    augmented = ["pgd, augmented", "transfer, fine-tuned, augmented"]
    assert methods == ["pgd", "pgd (untuned)", "transfer", "transfer, fine-tuned", *augmented, "lft", "oracle"]
    assert results["tasks"]["epsilon"] == {"digits": 0.25}
    assert (results["tasks"]["shots"], results["meta_training"][0]["shots"]) == (2, 1)
    assert results["rows"][-2]["queries"] == [20, 40]  # two images per class, ten classes, per step
    row = results["rows"][-2]
    assert row["seen_victim"] and row["linf"] <= 0.25 + 1e-6 and len(row["task_asr"]) == 3
    assert np.isclose(row["asr"][-1], np.mean(row["task_asr"]), atol=1e-4)
    table = (study / "results.md").read_text()
    assert all(f"| {method} |" in table for method in methods)
    for name in ("results.png", "results_victim.png"):
        assert (study / name).stat().st_size > 10_000


def test_attack_with_a_meta_trained_rule(study):
    flags = attack.Config(
        victim=str(study / "victim"),
        output=str(study / "uap"),
        optimizer=str(study / "lft" / "rule.safetensors"),
        steps=3,
    )
    results = attack.attack(flags)
    theta, test = np.load(study / "uap.npy"), load_source("digits", "test")
    assert theta.shape == (8, 8, 1) and np.abs(theta).max() <= 0.25 + 1e-6
    assert (study / "uap.png").stat().st_size > 5_000
    victim = load_victim(study / "victim")
    clean = clean_accuracy(victim.logits_fn, test.images, test.labels)
    perturbed = np.clip(test.images / np.float32(255) + theta, 0, 1).astype(np.float32)
    attacked = clean_accuracy(victim.logits_fn, perturbed, test.labels)
    # Images that only the perturbation makes correct count for the accuracy, not for the ASR.
    assert results["test_asr"] * clean >= clean - attacked - 1e-6


def test_unknown_optimizers_and_too_many_shots_are_refused(study):
    settings = {"victim": str(study / "victim"), "output": str(study / "x")}
    with pytest.raises(ValueError, match=r"optimizer: unknown name 'momentun_pgd'\. Did you mean 'momentum_pgd'"):
        attack.attack(attack.Config(**settings, optimizer="momentun_pgd"))
    with pytest.raises(ValueError, match=r"shots: expected at most \d+, the images of the smallest class, got 1000"):
        attack.attack(attack.Config(**settings, optimizer="pgd", shots=1000))
