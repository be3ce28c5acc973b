"""Kills runs at random moments and has them resumed: what `make chaos` does.

One process imports everything and starts no thread and no backend of JAX; each run is a fork of it. A run is killed,
started again, killed, and so on until it is complete; then it is compared, bit for bit, with one that was not killed.
"""

import collections
import dataclasses
import json
import os
import shutil
import signal
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.chaos import target
from tests.chaos.target import EVERY, STEPS, Plan

#: Phases in which a process can die. After "saved" old checkpoints are deleted: that is still a save.
PHASES = ("start-up", "compilation", "step", "save", "end")
_PHASE_OF = {"saved": "save"}
#: Shares of the runs by their compilation cache: none, a new one for each run, one that all share.
CACHES = {"none": 0.1, "new": 0.3, "shared": 0.6}
#: Shares of the learners.
LEARNERS = {"lft": 0.25, "maml": 0.75}
#: Shares of the ways to end a process, and of the phases in which a timer is started.
MEANS = {"time": 0.65, "operation": 0.3, "sigterm": 0.05}
WEIGHTS = {"start-up": 0.25, "compilation": 0.3, "step": 0.15, "save": 0.3}
#: Saves that a process makes at most before it is ended: most of its time goes into what precedes them.
SAVES = 2


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended: its wait status as an exit code, negative for a signal, and what it said."""

    code: int
    events: list[dict]
    cpu_seconds: float

    @property
    def phase(self) -> str:
        """The phase in which it ended."""
        name = self.events[-1]["phase"] if self.events else "start-up"
        return _PHASE_OF.get(name, name)

    def first(self, name: str) -> dict | None:
        """The first thing it said of this kind."""
        return next((event for event in self.events if event["phase"] == name), None)

    @property
    def saved(self) -> int:
        """The last meta-step of which it has said that it is saved; 0 for none."""
        return max((event["step"] for event in self.events if event["phase"] == "saved"), default=0)


def launch(learner: str, workdir: Path, cache: Path | None, log: Path, plan: Plan) -> Outcome:
    """Forks a process, and waits until it has ended."""
    assert threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1  # a fork has no other threads
    receive, send = os.pipe()
    number = os.fork()
    if number == 0:
        os.close(receive)
        target.process(learner, workdir, cache, send, log, plan)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        lines = pipe.read().splitlines(keepends=True)
    _, status, usage = os.wait4(number, 0)
    events = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return Outcome(os.waitstatus_to_exitcode(status), events, usage.ru_utime + usage.ru_stime)


class Chaos:
    """Counts, and what they need.

    Attributes:
      kills: kills by phase and means.
      survived: those of them after which the run was completed with the same numbers.
      runs: completed runs by their learner and compilation cache.
      findings: what must not happen.
    """

    def __init__(self, folder: Path, seed: int, say: Callable[[str], object] = print):
        self.folder, self.rng, self.say = folder, np.random.default_rng(seed), say
        self.kills, self.survived = collections.Counter(), collections.Counter()
        self.terminated = collections.Counter()
        self.runs = collections.Counter()
        self.lost, self.cpu_seconds, self.processes = [], 0.0, 0
        self.findings: list[str] = []
        self.expected: dict[str, dict] = {}
        self.operations: dict[str, tuple[int, int]] = {}
        self.durations: dict[tuple[str, bool, str], list[float]] = collections.defaultdict(list)

    def reference(self) -> None:
        """Runs it without a kill, for the numbers to compare with, the time of phases and the number of operations."""
        shared, damaged = self.folder / "shared", self.folder / "damaged"
        for learner in target.LEARNERS:
            for cache in (None, shared, shared, damaged):
                if cache == damaged:
                    shutil.copytree(shared, damaged, dirs_exist_ok=True)
                    for path in damaged.glob("*-cache"):
                        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                name = f"{learner}-{self.processes}"
                outcome = self._launch(learner, self.folder / name, cache, Plan("none"), name)
                if outcome.code:
                    raise RuntimeError(f"the run itself fails, {name}: {self._end_of_log(name)}")
                found = {key: outcome.events[-1][key] for key in ("digests", "files")}
                if found != self.expected.setdefault(learner, found):
                    self.findings.append(f"numbers depend on the compilation cache: {name}, {cache}")
            self.operations[learner] = outcome.first("compilation")["operations"], outcome.events[-1]["operations"]

    def until(self, kills: int) -> None:
        """Kills until there are so many kills, and completes the last run. Ctrl-C ends it before."""
        while self.kills.total() < kills:
            self._run(kills)

    def _launch(self, learner, workdir, cache, plan, name):
        outcome = launch(learner, workdir, cache, self.folder / f"{name}.log", plan)
        self.processes += 1
        self.cpu_seconds += outcome.cpu_seconds
        kind = learner, cache is not None and cache.name == "shared"
        for event, after in zip(outcome.events, outcome.events[1:], strict=False):
            self.durations[*kind, event["phase"]].append(after["at"] - event["at"])
        return outcome

    def _plan(self, learner: str, shared: bool, left: int) -> Plan:
        """How to end the next process, which has so many meta-steps left."""
        means = self.rng.choice(list(MEANS), p=list(MEANS.values()))
        saves = min(SAVES, -(-left // EVERY))
        if means == "operation":
            first, last = self.operations[learner]
            return Plan(
                "operation", number=int(self.rng.integers(1, first + (last - first) * saves * EVERY / STEPS + 1))
            )
        phase = str(self.rng.choice(list(WEIGHTS), p=list(WEIGHTS.values())))
        most = max(1, {"step": 2 * EVERY * saves - 1, "save": saves}.get(phase, 1))
        typical = statistics.median(self.durations[learner, shared, phase][-50:])
        return Plan(str(means), phase, int(self.rng.integers(1, most + 1)), float(self.rng.uniform(0, 1.1 * typical)))

    def _run(self, kills: int) -> None:
        """One run, killed until it is complete, or until there are enough kills."""
        kind = str(self.rng.choice(list(CACHES), p=list(CACHES.values())))
        learner = str(self.rng.choice(list(LEARNERS), p=list(LEARNERS.values())))
        name = f"{self.runs.total() + len(self.findings):03d}"
        workdir = self.folder / name
        cache = {"none": None, "new": self.folder / f"{name}-cache", "shared": self.folder / "shared"}[kind]
        saved, done, here = 0, 0, collections.Counter()
        while True:
            enough = self.kills.total() + here.total() >= kills
            plan = Plan("none") if enough else self._plan(learner, kind == "shared", STEPS - saved)
            outcome = self._launch(learner, workdir, cache, plan, name)
            trouble = self._checked(self.expected[learner], outcome, plan, saved)
            begun = outcome.first("compilation")
            if begun and done:
                self.lost.append(done - begun["step"])
            if trouble:
                self.kills.update(here)
                self.findings.append(f"run {name}, {plan}: {trouble}; log: {self._end_of_log(name)}")
                self.say(self.findings[-1])
                return
            steps = [event["step"] for event in outcome.events if event["phase"] == "step"]
            done = max([saved, outcome.saved, *steps])
            saved = max(saved, outcome.saved)
            if outcome.code == -signal.SIGKILL:
                here[outcome.phase, plan.means] += 1
            elif outcome.code in (target.run.STOPPED, -signal.SIGTERM):
                self.terminated[outcome.phase] += 1
            else:
                break
        self.kills.update(here)
        self.survived.update(here)
        self.runs[learner, kind] += 1
        self.say(f"{self.kills.total()} kills, {self.runs.total()} runs")
        for path in (workdir, self.folder / f"{name}-cache"):
            shutil.rmtree(path, ignore_errors=True)

    def _checked(self, expected: dict, outcome: Outcome, plan: Plan, saved: int) -> str:
        """What is wrong with how a process ended, if anything is."""
        begun = outcome.first("compilation")
        if begun and begun["step"] < saved:
            return f"it goes on from meta-step {begun['step']}, though {saved} was saved"
        if outcome.code == 0:
            found = outcome.events[-1]
            different = [k for k, v in expected["digests"].items() if found["digests"].get(k) != v]
            if different:
                return f"{', '.join(different)} differ from those of the run that was not killed"
            if extra := sorted(set(found["files"]) ^ set(expected["files"])):
                return f"left or missing files: {', '.join(extra)}"
            return ""
        if outcome.code == -signal.SIGKILL and plan.means in ("time", "operation"):
            return ""
        if outcome.code == target.run.STOPPED and plan.means == "sigterm":
            steps = [event["step"] for event in outcome.events if event["phase"] == "step"]
            return "" if max(steps, default=0) <= max(saved, outcome.saved) else "SIGTERM lost a meta-step"
        last = outcome.phase == "end" or outcome.saved == STEPS
        if outcome.code == -signal.SIGTERM and plan.means == "sigterm" and (outcome.phase == "start-up" or last):
            return ""  # before or after the run
        return f"exit code {outcome.code} in the phase {outcome.phase}"

    def _end_of_log(self, name):
        path = self.folder / f"{name}.log"
        return path.read_text()[-1500:] if path.exists() else ""

    def report(self) -> dict[str, Any]:
        """The counts."""
        logs = "".join(path.read_text(errors="replace") for path in self.folder.glob("[0-9]*.log"))
        phases = {
            phase: {
                "tried": sum(count for (of, _), count in self.kills.items() if of == phase),
                "survived": sum(count for (of, _), count in self.survived.items() if of == phase),
            }
            for phase in PHASES
        }
        return {
            "kills": {"tried": self.kills.total(), "survived": self.survived.total()},
            "by_phase": phases,
            "by_means": {
                name: sum(count for (_, of), count in self.kills.items() if of == name)
                for name in ("time", "operation")
            },
            "sigterm": {"stopped": self.terminated.total(), "by_phase": dict(self.terminated)},
            "runs": {
                "completed": self.runs.total(),
                "by_learner": {of: sum(n for (name, _), n in self.runs.items() if name == of) for of in LEARNERS},
                "by_cache": {of: sum(n for (_, name), n in self.runs.items() if name == of) for of in CACHES},
            },
            "processes": self.processes,
            "meta_steps": STEPS,
            "checkpoint_every": EVERY,
            "most_meta_steps_lost": max(self.lost, default=0),
            "compared": sorted(self.expected["lft"]["digests"]),
            "bit_equal": not self.findings,
            "damaged_cache_entries": logs.count("Error reading persistent compilation cache entry"),
            "findings": self.findings,
            "cpu_seconds": round(self.cpu_seconds, 1),
        }
