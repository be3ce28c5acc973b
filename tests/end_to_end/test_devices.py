"""Meta-training gives the same numbers on one device, on four devices, and in two processes, up to rounding."""

import os
import socket
import time

import jax
import numpy as np
import pytest

from experiments import meta_train, train_victim
from tests.programs import Program

pytestmark = pytest.mark.standard_promotion

STEPS, EVERY = 48, 6
TOLERANCE = {"rtol": 2e-3, "atol": 2e-5}  # Adam amplifies rounding errors of tiny gradients
TIMEOUT = 240


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    folder = tmp_path_factory.mktemp("victim")
    with jax.numpy_dtype_promotion("standard"):
        train_victim.train(train_victim.Config(source="digits", epochs=3, output=str(folder / "victim")))
    return folder / "victim"


def launch(victim, workdir, *, virtual_devices=1, **flags):
    """Starts a process that meta-trains on a number of virtual devices."""
    settings = {
        "victims": victim,
        "workdir": workdir,
        "rule": "coordinate_lstm",
        "hidden": 3,
        "num_steps": 2,
        "tasks_per_family": 4,
        "query_shots": 1,
        "meta_steps": STEPS,
        "checkpoint_every": EVERY,
        "validation_tasks": 0,
        **flags,
    }
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={virtual_devices}"
    cache = str(victim.parent)  # all processes share one compilation cache
    arguments = (f"--{k}={v}" for k, v in settings.items())
    return Program("experiments.meta_train", *arguments, XLA_FLAGS=xla, XDG_CACHE_HOME=cache)


def finish(*processes):
    ended = [process.wait(TIMEOUT) for process in processes]
    assert not any(process.exit_code for process in ended), [process.stderr for process in ended]


def launch_two(victim, workdir, **flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        launch(victim, workdir, coordinator=address, num_processes=2, process_id=number, **flags) for number in range(2)
    ]


def weights(workdir):
    _, learned = meta_train.load_learned(str(workdir))
    return learned.params[0]


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), weights(a), weights(b))


@pytest.fixture(scope="module")
def one_device(victim, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish(launch(victim, workdir))
    return workdir


def test_four_devices_match_one_and_a_run_resumes_on_one(victim, one_device, tmp_path):
    finish(launch(victim, tmp_path / "four", virtual_devices=4))
    assert_same(tmp_path / "four", one_device)
    # The schedule depends on the number of meta-steps, so the run is killed instead of having fewer.
    stopped = launch(victim, tmp_path / "moved", virtual_devices=4)
    stop_at_checkpoint(stopped, tmp_path / "moved")
    finish(launch(victim, tmp_path / "moved", devices=1))
    assert_same(tmp_path / "moved", one_device)


def test_two_processes_match_one_and_resume_after_one_is_killed(victim, one_device, tmp_path):
    first, second = launch_two(victim, tmp_path / "run")
    stop_at_checkpoint(first, tmp_path / "run")
    assert second.wait(TIMEOUT).exit_code != 0  # it ends instead of waiting for the killed one
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < STEPS
    finish(*launch_two(victim, tmp_path / "run"))
    assert_same(tmp_path / "run", one_device)


def stop_at_checkpoint(process, workdir):
    """Kills a process as soon as it has written its second checkpoint."""
    deadline = time.monotonic() + TIMEOUT
    while not (workdir / "checkpoints" / str(2 * EVERY)).exists():
        assert process.exit_code is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait(TIMEOUT)
