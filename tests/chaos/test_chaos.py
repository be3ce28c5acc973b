"""A short form of `make chaos`, and other programs that are killed. They run in processes of their own, which fork."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_runs_that_are_killed_go_on_with_the_same_numbers(tmp_path):
    found = run("tests.chaos", "--kills=20", "--seed=1", f"--output={tmp_path / 'chaos.json'}")
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads((tmp_path / "chaos.json").read_text())
    assert report["kills"]["tried"] >= 20 and report["kills"]["survived"] == report["kills"]["tried"]
    assert report["bit_equal"] and report["most_meta_steps_lost"] <= report["checkpoint_every"]
    assert sum(phase["tried"] > 0 for phase in report["by_phase"].values()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "study", "audit"])
def test_programs_that_are_killed_go_on_with_the_same_results(name):
    found = run("tests.chaos.programs", name)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_results_of_make_chaos():
    report = json.loads((ROOT / "results" / "chaos.json").read_text())
    assert report["kills"]["survived"] == report["kills"]["tried"] >= 300
    assert report["bit_equal"] and not report["findings"]
    assert all(report["by_phase"][phase]["tried"] >= 20 for phase in ("start-up", "compilation", "step", "save"))
