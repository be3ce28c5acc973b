"""Runs on a disk that is full, read-only or gone, and what processes that were killed have left."""

import errno
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lft_jax import _files
from lft_jax.meta import _lock, checkpoints, run
from lft_jax.meta.run import load_run
from lft_jax.meta.trainer import MetaState, MetaTrainer

STEPS, EVERY = 6, 2


def init(key):
    return MetaState({"x": np.linspace(0, 1, 5, dtype=np.float32)}, {"m": np.ones(5, np.float32)}, key, np.int32(0))


def step(state):
    """A meta-step that is no fixed point, without JAX."""
    x = np.float32(1.5) * state.params["x"] * (1 - state.params["x"]) + state.optimizer_state["m"] / 10
    moment = state.optimizer_state["m"] * np.float32(0.9) + x / 10
    metrics = {
        "loss": np.float32(x.sum()),
        "family_loss": x[:2],
        "skipped": np.int32(0),
        "skipped_in_a_row": np.int32(0),
    }
    return state._replace(params={"x": x}, optimizer_state={"m": moment}, step=state.step + np.int32(1)), metrics


def train(workdir, before=lambda number: None):
    """A run that calls a function before each meta-step."""

    def watched(state):
        before(int(state.step))
        return step(state)

    options = {"config": {"seed": 0}, "num_meta_steps": STEPS, "checkpoint_every": EVERY, "progress": False}
    return run.train(MetaTrainer(init, watched), jax.random.key(0), workdir, **options)


def at(number, function, *arguments):
    """Calls a function before one meta-step."""
    return lambda found: function(*arguments) if found == number else None


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has disturbed: its folder and its parameters."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(workdir).params["x"]


def assert_resumes(workdir, whole):
    np.testing.assert_array_equal(train(workdir).params["x"], whole[1])
    assert losses(workdir) == losses(whole[0])
    assert files(workdir) == files(whole[0])


def files(workdir):
    found = [path for path in workdir.glob("*") if path.name != "tensorboard"]
    return sorted(path.relative_to(workdir).as_posix() for path in (*found, *workdir.glob("checkpoints/*")))


def assert_good(workdir, number):
    """The last checkpoint is that of a meta-step, and it is whole."""
    state, _ = load_run(workdir, lambda config: init(jax.random.key(0)))
    assert int(state.step) == number
    expected = init(jax.random.key(0))
    for _ in range(number):
        expected, _ = step(expected)
    np.testing.assert_array_equal(state.params["x"], expected.params["x"])


# ---- Full ----


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place):
    with pytest.raises(OSError, match="No space"), open(place / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1000))


@pytest.mark.parametrize("number", [0, 2, 3, 5])
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(small_disk, whole, number):
    kept = f"the last good checkpoint is that of meta-step {number - number % EVERY}" if number > 1 else "no checkpoint"
    message = (
        rf"workdir: {small_disk}/run could not be written; .*{kept}.* the same call goes on.*No space left on device"
    )
    with pytest.raises(OSError, match=message) as full:
        train(small_disk / "run", at(number, fill, small_disk))
    assert full.value.errno == errno.ENOSPC
    if number > 1:
        assert_good(small_disk / "run", number - number % EVERY)
    (small_disk / "filler").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lines that are removed, if some were written
        assert_resumes(small_disk / "run", whole)


def test_a_disk_that_is_full_from_the_start(small_disk):
    fill(small_disk)
    with pytest.raises(OSError, match=rf"workdir: {small_disk}/run c.*No space left"):
        train(small_disk / "run")


def test_a_save_that_fails_in_the_middle(tmp_path, whole, monkeypatch):
    """As on a full disk, wherever a file system may not be mounted; what tensorstore says then."""
    save = ocp.Checkpointer.save

    def fail(self, directory, *arguments, **options):
        save(self, directory, *arguments, **options)
        if "/4.partial/" in str(directory):
            os.unlink(directory / "_METADATA")
            raise ValueError("RESOURCE_EXHAUSTED: Error writing \"x/0\" in OCDBT database [os_error_code='28']")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(
        OSError, match=r"last good checkpoint is that of meta-step 2.*No space left on device: .*/4"
    ) as full:
        train(tmp_path)
    assert full.value.errno == errno.ENOSPC
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2"]
    assert_good(tmp_path, 2)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="2 later meta-steps are run again"):
        assert_resumes(tmp_path, whole)


@pytest.fixture
def small_files():
    """No file may be larger than the limit that is set: writing more is an error, as on a full disk."""
    former, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
    signal.signal(signal.SIGXFSZ, handler)


def test_events_that_cannot_be_written_end_a_run_and_do_not_hold_it(tmp_path, whole, small_files):
    """The thread of tensorboardX's own writer would die, and the run wait for it forever."""
    with pytest.raises(OSError, match=r"could not be written.*File too large"):
        train(tmp_path, at(4, small_files, 50))
    small_files(resource.RLIM_INFINITY)
    assert_good(tmp_path, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lines that are removed, if some were written
        assert_resumes(tmp_path, whole)


def test_a_lock_that_cannot_be_written_is_no_lock(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(PermissionError, match=rf"workdir: {tmp_path} cannot be written .*No space"),
        _lock.held(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


# ---- Read-only, or gone ----


def test_a_folder_that_may_only_be_read(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(PermissionError, match=rf"workdir: {small_disk}/run cannot be written .*Read-only file system"):
        train(small_disk / "run")


def test_a_folder_that_is_deleted_is_not_made_again(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"workdir: {tmp_path}/run could not be .* moved or deleted during the run"
    ):
        train(tmp_path / "run", at(3, shutil.rmtree, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_moved_goes_on_at_its_new_place(tmp_path, whole):
    with pytest.raises(FileNotFoundError, match="moved or deleted during the run"):
        train(tmp_path / "run", at(3, os.rename, tmp_path / "run", tmp_path / "new"))
    assert not (tmp_path / "run").exists()
    assert_good(tmp_path / "new", 2)
    with pytest.warns(UserWarning, match=r"run again|taken over"):
        assert_resumes(tmp_path / "new", whole)


# ---- What is left ----


def test_what_killed_processes_have_left_is_deleted(tmp_path, whole):
    train(tmp_path)
    for name in ("checkpoints/5.partial/tree", "checkpoints/3.removed", "particles/4.replaced", ".rule.partial"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(b"x")
    (tmp_path / ".metrics.jsonl.77.partial").write_bytes(b"x")
    train(tmp_path)
    (tmp_path / "particles").rmdir()  # empty
    assert files(tmp_path) == files(whole[0])


def test_particles_without_a_checkpoint_replace_none_with_one(tmp_path):
    """A process that is killed after the particles of 5 and before its checkpoint, stopped by hand, say."""
    for number in (2, 4):
        run._save(tmp_path, init(jax.random.key(0))._replace(step=np.int32(number), particles=(np.ones(2),)))
    checkpoints.save_tree(tmp_path / "particles" / "5", (np.ones(2),))
    run._save(tmp_path, init(jax.random.key(0))._replace(step=np.int32(6), particles=(np.ones(2),)))
    for folder in ("checkpoints", "particles"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["4", "6"]


def test_half_a_deleted_checkpoint_is_none(tmp_path, monkeypatch):
    checkpoints.save_tree(tmp_path / "2", {"x": np.ones(2)})

    def killed(path, **options):
        if os.path.isdir(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        _files.remove_directory(tmp_path / "2")
    assert [path.name for path in tmp_path.iterdir()] == ["2.removed"]


# ---- TensorBoard ----


def events(path):
    """The events of a file: length, checksum, event, checksum."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def test_events_are_those_of_the_metrics_and_a_resumed_run_hides_what_it_repeats(tmp_path):
    def interrupt(number):
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, interrupt)
    (first,) = (tmp_path / "tensorboard").iterdir()
    with pytest.warns(UserWarning, match="1 later meta-steps are run again"):
        train(tmp_path)
    # In the same second and process both have one name; other processes have another one.
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert first in files and first.name.endswith(f".{os.getpid()}")
    begun, session, *steps = events(files[-1])
    assert (begun.file_version, session.session_log.status, session.step) == ("brain.Event:2", SessionLog.START, 2)
    assert [event.step for event in steps] == [2, 3, 4, 5]
    values = [{value.tag: value.simple_value for value in event.summary.value} for event in steps]
    assert [found["loss"] for found in values] == [np.float32(loss) for loss in losses(tmp_path)[2:]]
    assert set(values[0]) == {"loss", "skipped", "skipped_in_a_row", "seconds"}
