"""The lock on the folder of a run."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import pytest

from lft_jax.meta import _lock

HERE = socket.gethostname()


def leave(workdir, host=HERE, process=12345):
    """Leaves the file of a run that did not release its lock."""
    workdir.mkdir(exist_ok=True)
    (workdir / "run.lock").write_text(json.dumps({"host": host, "process": process, "started": "2026-01-02T03:04:05"}))


@pytest.fixture
def ended():
    """The process id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_file_names_its_holder_and_is_deleted(tmp_path):
    with _lock.held(tmp_path / "new" / "run"):
        found = json.loads((tmp_path / "new" / "run" / "run.lock").read_text())
        assert (found["host"], found["process"]) == (HERE, os.getpid())
        assert found["started"].endswith("+00:00")
    assert not list((tmp_path / "new" / "run").iterdir())


def test_a_second_holder_is_refused_until_the_first_ends(tmp_path):
    with _lock.held(tmp_path):
        before = (tmp_path / "run.lock").read_bytes()
        message = rf"workdir: .* in use by process {os.getpid()} on host {HERE}, started .* delete .*run\.lock"
        with pytest.raises(ValueError, match=message), _lock.held(tmp_path):
            pass
        assert (tmp_path / "run.lock").read_bytes() == before
    with pytest.raises(KeyError), _lock.held(tmp_path):
        raise KeyError
    with _lock.held(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = "import pathlib, sys, time; from lft_jax.meta import _lock\nwith _lock.held(pathlib.Path(sys.argv[1])):\n"
    process = subprocess.Popen([sys.executable, "-c", code + "    time.sleep(600)", tmp_path])
    try:
        path, deadline = tmp_path / "run.lock", time.monotonic() + 60
        while not (path.exists() and path.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on"), _lock.held(tmp_path):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    message = rf"run\.lock was left by process {process.pid} .* taken over"
    with pytest.warns(UserWarning, match=message), _lock.held(tmp_path):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert not path.exists()


def test_another_process_of_the_same_number_does_not_hold_it(tmp_path):
    leave(tmp_path, process=os.getppid())  # alive, but without the lock
    with pytest.warns(UserWarning, match="taken over"), _lock.held(tmp_path):
        pass


def test_the_lock_of_another_host_is_refused(tmp_path):
    leave(tmp_path, "elsewhere", 77)
    message = r"in use by process 77 on host elsewhere, started 2026-01-02T03:04:05\. .* delete .*run\.lock"
    with pytest.raises(ValueError, match=message), _lock.held(tmp_path):
        pass
    (tmp_path / "run.lock").unlink()
    with _lock.held(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", '{"host": "elsewh', "[1]", "\0\0"])
def test_a_file_that_names_nobody_is_no_lock(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    with _lock.held(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, ended):
    def unsupported(*arguments):
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    leave(tmp_path, process=os.getppid())
    with pytest.raises(ValueError, match=f"in use by process {os.getppid()}"), _lock.held(tmp_path):
        pass
    leave(tmp_path, process=ended)
    with pytest.warns(UserWarning, match=f"left by process {ended}"), _lock.held(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["process"] == os.getpid()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(PermissionError, match=r"workdir: .*run cannot be written"),
        _lock.held(tmp_path / "file" / "run"),
    ):
        pass


def test_one_of_many_holds_it(tmp_path):
    """Threads take and release it as fast as they can; an `flock` also keeps threads of one process apart."""
    inside, most = [], []

    def contend():
        taken = 0
        while taken < 20:
            with contextlib.suppress(ValueError), _lock.held(tmp_path):
                inside.append(None)
                most.append(len(inside))
                taken += 1
                inside.pop()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=contend) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1] * 80
    assert not list(tmp_path.iterdir())
