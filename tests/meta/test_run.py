"""Runs on disk: exact resume, files, and errors."""

import collections
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lft_jax import Stages
from lft_jax.evaluation import baselines
from lft_jax.meta import learners, run
from lft_jax.meta.checkpoints import save_tree
from lft_jax.meta.evolution import PersistentEvolutionStrategies
from lft_jax.meta.imitation import Imitation
from lft_jax.meta.run import MetaTrainingDiverged, MetaTrainingStopped, load_run, stop_on_sigterm
from lft_jax.meta.trainer import init_state, meta_trainer
from lft_jax.optimizers.rules import coordinate_lstm
from lft_jax.tasks.quadratic import quadratic_family
from lft_jax.tasks.uap import uap_family

KEY = jax.random.key(4)
CONFIG = {"rule": "small", "epsilon": 0.3, "ways": (2, 3)}
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
RNG = np.random.default_rng(0)
WEIGHTS = jnp.asarray(RNG.normal(size=(16, 3)).astype(np.float32))
IMAGES, LABELS = RNG.uniform(size=(30, 4, 4, 1)).astype(np.float32), np.arange(30) % 3


def rule(hidden=3):
    return coordinate_lstm(hidden, 1, features="raw")


@pytest.fixture(scope="module")
def trainer():
    def linear(images):
        return images.reshape(len(images), -1) @ WEIGHTS

    family = uap_family(IMAGES, LABELS, linear, ways=2, query_shots=2, epsilon=0.3)
    learner = learners.lft(rule())
    return meta_trainer(learner, [family], num_steps=2, tasks_per_family=2, meta_optimizer=OPTIMIZER)


def train(trainer, workdir, num_meta_steps, **options):
    options = {"config": CONFIG, "checkpoint_every": 2, "progress": False, **options}
    return run.train(trainer, KEY, workdir, num_meta_steps=num_meta_steps, **options)


def diverging(trainer, first_bad):
    """A trainer that reports meta-gradients that are not finite from the given step on, counted as by optax."""

    def step(state):
        after, metrics = trainer.step(state)
        bad = max(0, int(after.step) - first_bad)
        return after, {**metrics, "skipped": jnp.int32(bad), "skipped_in_a_row": jnp.int32(bad)}

    return trainer._replace(step=step)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(workdir):
    """The lines of the metrics without their times."""
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in lines(workdir)]


def saved(workdir):
    """What is in the folder of the checkpoints."""
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def like(hidden=3):
    return lambda config: init_state(learners.lft(rule(hidden)), (), OPTIMIZER, jax.random.key(0))


def assert_same(a, b):
    leaves = [jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))) for state in (a, b)]
    for x, y in zip(*leaves, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """An uninterrupted run of six meta-steps: its folder and its state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(trainer, workdir, 6)


@pytest.fixture
def begun(trainer, tmp_path):
    train(trainer, tmp_path, 3)
    return tmp_path


# ---- Resuming ----


def test_a_resumed_run_is_the_uninterrupted_one(trainer, whole, begun):
    assert [entry["step"] for entry in lines(begun)] == [0, 1, 2]
    resumed = train(trainer, begun, 6)
    assert_same(resumed, whole[1])
    assert timeless(begun) == timeless(whole[0])
    assert [entry["step"] for entry in lines(begun)] == list(range(6))
    assert_same(train(trainer, begun, 6), resumed)  # nothing left to do
    assert len(lines(begun)) == 6


def test_a_crash_between_checkpoints_loses_and_repeats_nothing(trainer, whole, tmp_path):
    calls = []

    def crash(state):
        calls.append(state)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return trainer.step(state)

    with pytest.raises(KeyboardInterrupt):
        train(trainer._replace(step=crash), tmp_path, 6)
    assert [entry["step"] for entry in lines(tmp_path)] == [0, 1, 2]  # and the last checkpoint is that of step 2
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # a line cut short
    with pytest.warns(UserWarning) as warned:
        assert_same(train(trainer, tmp_path, 6), whole[1])
    incomplete, again = (str(warning.message) for warning in warned)
    assert 'metrics.jsonl: the last line is incomplete and is removed: b\'{"step": 3, "lo\'' in incomplete
    assert "goes on from its checkpoint of meta-step 2; 1 later meta-steps are run again" in again
    assert [entry["step"] for entry in lines(tmp_path)] == list(range(6))


def test_a_crash_after_the_last_checkpoint_leaves_no_older_ones(trainer, begun):
    last_two = saved(begun)
    shutil.copytree(begun / "checkpoints" / last_two[0], begun / "checkpoints" / "1")  # not yet deleted
    train(trainer, begun, 3)
    assert saved(begun) == last_two == ["2", "3"]


def test_metrics_are_on_disk_before_the_checkpoint_that_follows_them(trainer, tmp_path):
    seen = []

    def step(state):
        saved = [int(path.name) for path in tmp_path.glob("checkpoints/*")]
        seen.append((max(saved, default=0), len(lines(tmp_path))))
        return trainer.step(state)

    train(trainer._replace(step=step), tmp_path, 5)
    assert [saved for saved, _ in seen] == [0, 0, 2, 2, 4]
    assert all(written >= saved for saved, written in seen)


def test_a_run_is_loaded_with_its_configuration(whole):
    state, config = load_run(whole[0], like())
    assert_same(state, whole[1])
    assert config == {**CONFIG, "ways": [2, 3]}


# ---- Runs of several windows or stages ----


def test_a_run_resumed_within_an_episode_is_the_uninterrupted_one(trainer, tmp_path):
    """With particles of families of two shapes, after a meta-step of imitation, which does not change them."""
    families = [quadratic_family(np.ones(n, np.float32), support=2, query=2) for n in (2, 3, 2)]
    pgd = learners.fixed("pgd", baselines.projected_gradient)
    settings = {"step": jnp.float32(0.1), "decay": jnp.float32(0.5)}
    learner = dataclasses.replace(pgd, init=lambda key, families: settings)
    windows = meta_trainer(
        learner,
        families,
        num_steps=4,
        tasks_per_family=1,
        meta_optimizer=OPTIMIZER,
        meta_gradient=PersistentEvolutionStrategies(2, 2),
        stages=Stages(imitation=Imitation(optax.sgd(0.1), 1)),
    )
    state, states = windows.init(KEY), []
    for _ in range(6):
        state, _ = windows.step(state)
        states.append(state)
    for stop in (3, 4):  # after the second window of an episode, and after the first of the next
        train(windows, tmp_path / str(stop), stop)
        assert_same(train(windows, tmp_path / str(stop), 6), states[-1])
        assert sorted(path.name for path in (tmp_path / str(stop) / "particles").iterdir()) == ["4", "6"]
    found, _ = load_run(tmp_path / "4", lambda config: init_state(learner, (), OPTIMIZER, KEY))
    assert_same(found, states[-1]._replace(particles=()))
    assert [bool(np.any(state.particles[0].change["step"])) for state in states[:2]] == [False, True]


def test_a_run_stored_without_particles_and_with_an_old_configuration_is_resumed(trainer, whole, begun):
    state = load_run(begun, like())[0]
    old = collections.namedtuple("MetaState", "params optimizer_state key step")
    save_tree(begun / "checkpoints" / "3", old(*state[:2], jax.random.key_data(state.key), state.step))
    (begun / "config.json").write_text(json.dumps({"old_rule": "small", "epsilon": 0.3, "ways": [2, 3]}))

    def upgrade(stored, curriculum=()):
        present = {"rule": stored["old_rule"], "curriculum": curriculum, **stored}
        return {name: value for name, value in present.items() if name != "old_rule"}

    with pytest.raises(ValueError, match=r"another configuration \(curriculum: \[2\] stored, \[2, 3\] given"):
        options = {"config": {**CONFIG, "curriculum": (2, 3)}, "upgrade": functools.partial(upgrade, curriculum=(2,))}
        train(trainer, begun, 6, **options)
    assert_same(train(trainer, begun, 6, config={**CONFIG, "curriculum": ()}, upgrade=upgrade), whole[1])


def test_what_is_written(whole):
    workdir, state = whole
    assert {"step", "loss", "family_loss", "final_loss", "grad_norm", "skipped", "seconds"} <= lines(workdir)[0].keys()
    assert [path.stat().st_size > 0 for path in workdir.glob("tensorboard/events.out.tfevents.*")] == [True]
    assert "tensorflow" not in sys.modules
    assert sorted(path.name for path in workdir.glob("checkpoints/*")) == ["4", "6"]
    assert int(state.step) == 6


def test_validation_is_written_at_checkpoints(trainer, tmp_path):
    state = train(trainer, tmp_path, 3, validate=lambda params: {"size": float(optax.tree.norm(params))})
    sizes = [entry.get("size") for entry in lines(tmp_path)]
    assert [size is not None for size in sizes] == [False, True, True]
    np.testing.assert_allclose(sizes[-1], optax.tree.norm(state.params), rtol=1e-6)


# ---- Stopping ----


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(trainer, whole, tmp_path):
    asked = iter([False, False, False, True, True])
    validated = {"validate": lambda params: {"size": float(optax.tree.norm(params))}}
    with pytest.raises(MetaTrainingStopped, match=rf"stopped after meta-step 3, which is saved in {tmp_path};") as stop:
        train(trainer, tmp_path, 6, stop=lambda: next(asked), **validated)
    assert (stop.value.code, stop.value.step, stop.value.workdir) == (143, 3, tmp_path)
    assert saved(tmp_path) == ["2", "3"]
    assert not (tmp_path / "run.lock").exists()
    with pytest.raises(MetaTrainingStopped, match="stopped after meta-step 3"):  # at once
        train(trainer, tmp_path, 6, stop=lambda: next(asked), **validated)
    assert_same(train(trainer, tmp_path, 6, **validated), whole[1])
    # The checkpoint that no schedule has asked for has no validation either.
    assert ["size" in entry for entry in lines(tmp_path)] == [False, True] * 3


def test_a_run_that_is_asked_to_stop_before_its_first_step(trainer, whole, tmp_path):
    with pytest.raises(MetaTrainingStopped, match="stopped after meta-step 0"):
        train(trainer, tmp_path, 6, stop=lambda: True)
    assert not (tmp_path / "checkpoints").exists()
    assert_same(train(trainer, tmp_path, 6), whole[1])


def test_a_run_is_complete_before_it_is_asked_again(trainer, whole, tmp_path):
    calls = []
    assert_same(train(trainer, tmp_path, 6, stop=lambda: calls.append(0)), whole[1])
    assert len(calls) == 6


def test_sigterm_stops_a_run(trainer, whole, tmp_path):
    def step(state):
        if int(state.step) == 2:
            signal.raise_signal(signal.SIGTERM)
        return trainer.step(state)

    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(MetaTrainingStopped, match="after meta-step 3"), stop_on_sigterm() as stop:
        train(trainer._replace(step=step), tmp_path, 6, stop=stop)
    assert signal.getsignal(signal.SIGTERM) is former
    assert_same(train(trainer, tmp_path, 6), whole[1])


def test_a_second_sigterm_has_its_former_effect():
    came = []
    former = signal.signal(signal.SIGTERM, lambda *_: came.append(0))
    try:
        with stop_on_sigterm() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop() and not came
            signal.raise_signal(signal.SIGTERM)
            assert came
    finally:
        signal.signal(signal.SIGTERM, former)


def test_sigterm_is_noted_in_the_main_thread_only():
    found = []

    def elsewhere():
        with pytest.raises(ValueError, match="main thread"), stop_on_sigterm():
            pass
        found.append(0)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found


# ---- Diverging ----


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(trainer, tmp_path):
    with pytest.raises(MetaTrainingDiverged, match=r"^3 meta-gradients in a row, up to step 5, .*checkpoints"):
        train(diverging(trainer, first_bad=3), tmp_path, 20, max_skipped_in_a_row=3)
    state, _ = load_run(tmp_path, like())
    assert int(state.step) == 4
    assert [entry["step"] for entry in lines(tmp_path)] == [0, 1, 2, 3, 4]


def test_nan_meta_gradients_stop_a_run(tmp_path):
    def broken(images):
        return images.reshape(len(images), -1) @ WEIGHTS * jnp.nan

    family = uap_family(IMAGES, LABELS, broken, ways=2, query_shots=2, epsilon=0.3)
    learner = learners.lft(rule())
    trainer = meta_trainer(learner, [family], num_steps=1, tasks_per_family=1, meta_optimizer=OPTIMIZER)
    with pytest.raises(MetaTrainingDiverged, match="4 meta-gradients in a row"):
        train(trainer, tmp_path, 9, max_skipped_in_a_row=4)
    state, _ = load_run(tmp_path, like())
    jax.tree.map(np.testing.assert_array_equal, state.params, trainer.init(KEY).params)


# ---- Errors ----


def test_another_configuration_is_refused_by_name(trainer, begun):
    other = {**CONFIG, "epsilon": 0.4, "extra": 1}
    with pytest.raises(ValueError, match=r"another configuration \(epsilon: 0.3 stored, 0.4 given, extra: None"):
        train(trainer, begun, 6, config=other)
    assert len(lines(begun)) == 3


def test_a_folder_that_cannot_be_written_is_refused(trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"workdir: .*run cannot be written"):
        train(trainer, tmp_path / "file" / "run", 2)


def truncate(folder):
    """Cuts every file of a checkpoint in half."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(trainer, whole, begun):
    truncate(begun / "checkpoints" / "3")
    damaged = (
        rf"workdir: checkpoint 3 of {begun} is damaged and is %s; that of meta-step 2 is used instead\. path: .*/3"
    )
    with pytest.warns(UserWarning, match=damaged % "left out"):
        state, _ = load_run(begun, like())
    assert int(state.step) == 2
    assert saved(begun) == ["2", "3"]  # as it was
    with pytest.warns(UserWarning) as warned:
        assert_same(train(trainer, begun, 6), whole[1])
    first, second = (str(warning.message) for warning in warned)
    assert re.match(damaged % r"renamed to 3\.damaged", first)
    assert "goes on from its checkpoint of meta-step 2; 1 later meta-steps are run again" in second
    assert timeless(begun) == timeless(whole[0])
    assert saved(begun) == ["3.damaged", "4", "6"]


def test_a_run_with_no_good_checkpoint_is_refused(trainer, begun):
    for step in (2, 3):
        truncate(begun / "checkpoints" / str(step))
    for use in (lambda: train(trainer, begun, 6), lambda: load_run(begun, like())):
        with pytest.raises(
            ValueError, match=r"checkpoint 3 of .* is damaged, or .* no older one can be read; .* another"
        ):
            use()
    assert len(lines(begun)) == 3
    assert saved(begun) == ["2", "3"]


@pytest.mark.parametrize("damage", [b"\x00\xff\x00", b"[1, 2]", b'{"loss": 1.0}', b""])
def test_metrics_damaged_before_the_last_line_are_refused(trainer, whole, begun, damage):
    path = begun / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    damaged = first + damage + b"\n" + third
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"workdir: line 2 of {path} is damaged: b'.*Correct or delete the line"):
        train(trainer, begun, 6)
    assert path.read_bytes() == damaged
    path.write_bytes(first + second + third.rstrip(b"\n"))  # whole, but for the end of the line
    assert_same(train(trainer, begun, 6), whole[1])
    assert [entry["step"] for entry in lines(begun)] == list(range(6))


def test_metrics_are_kept_if_they_cannot_be_replaced(trainer, begun, monkeypatch):
    path = begun / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"st')
    before = path.read_bytes()

    def crash(*names):
        raise OSError("no more space")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no more space"), pytest.warns(UserWarning, match="incomplete"):
        train(trainer, begun, 6)
    assert path.read_bytes() == before


def test_a_second_run_in_a_workdir_is_refused(trainer, whole, tmp_path):
    refusals = []

    def step(state):
        with pytest.raises(
            ValueError, match=rf"workdir: {tmp_path} is in use by process {os.getpid()} on host"
        ) as refusal:
            train(trainer, tmp_path, 6)
        refusals.append(refusal)
        return trainer.step(state)

    assert_same(train(trainer._replace(step=step), tmp_path, 6), whole[1])
    assert len(refusals) == 6
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_run_that_fails_releases_its_workdir(trainer, whole, tmp_path, error):
    def fail(state):
        raise error

    with pytest.raises(error):
        train(trainer._replace(step=fail), tmp_path, 6)
    assert not (tmp_path / "run.lock").exists()
    assert_same(train(trainer, tmp_path, 6), whole[1])


def test_the_checkpoint_of_another_rule_is_refused(whole):
    with pytest.raises(ValueError, match=r"workdir: checkpoint 6 of .* of another rule"):
        load_run(whole[0], like(hidden=4))


def test_a_folder_without_a_run_is_refused(trainer, tmp_path):
    with pytest.raises(ValueError, match=r"workdir: .* holds no run"):
        load_run(tmp_path, like())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=r"workdir: .* holds no checkpoint yet"):
        load_run(tmp_path, like())
    (tmp_path / "config.json").write_text('{"rule"')
    for use in (lambda: load_run(tmp_path, like()), lambda: train(trainer, tmp_path, 2)):
        with pytest.raises(ValueError, match=r"workdir: .*config.json is damaged"):
            use()


@pytest.mark.parametrize("name", ["num_meta_steps", "checkpoint_every"])
def test_numbers_below_one_are_refused(trainer, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        train(trainer, tmp_path / "run", **{"num_meta_steps": 3, name: 0})
    assert not (tmp_path / "run").exists()
