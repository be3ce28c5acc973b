"""The run that is killed: `experiments.meta_train` with a tiny rule, on quadratic tasks.

Everything in it is as in a real run, except that there are no victims to read from disk and that provenance is a
constant.
"""

import ctypes
import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np

from experiments import meta_train
from lft_jax.meta import checkpoints, run
from lft_jax.tasks.quadratic import quadratic_family

#: The run: nine meta-steps, with a checkpoint after every second one and after the last.
STEPS, EVERY = 9, 2
FLAGS = {
    "victims": ("none",),
    "num_steps": 2,
    "tasks_per_family": 2,
    "meta_steps": STEPS,
    "checkpoint_every": EVERY,
    "validation_tasks": 0,
}
#: What is learned: an update rule, which is stored as a file too, or an initialization, which takes less time to trace.
LEARNERS = {
    "lft": {"rule": "coordinate_lstm", "features": ("raw",), "hidden": 3, "layers": 1, "base_update": "none"},
    "maml": {},
}
RULE = ("rule.safetensors", "rule.json")
#: Seconds after which a process counts as hanging.
HANGS = 300
#: What Python announces to audit hooks before it does it: moments at which a process can be killed.
OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "fcntl.flock"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a process is ended.

    Attributes:
      means: "time", "operation" or "sigterm"; "none" for not at all.
      phase: phase in which a timer is started, by its beginning (time, sigterm).
      number: number of the phase of that name, or of the file operation, from 1.
      delay: seconds after which the timer ends the process.
    """

    means: str
    phase: str = ""
    number: int = 0
    delay: float = 0.0


class Reporter:
    """Tells the parent process what the run does, counts file operations, and ends the process."""

    def __init__(self, pipe: int, plan: Plan):
        self.pipe, self.plan, self.counts, self.operations = pipe, plan, {}, 0
        sys.addaudithook(self._hook)

    def __call__(self, phase: str, **more) -> None:
        """Says that a phase begins."""
        said = {"phase": phase, "at": time.perf_counter(), "operations": self.operations, **more}
        os.write(self.pipe, (json.dumps(said) + "\n").encode())
        self.counts[phase] = self.counts.get(phase, 0) + 1
        if self.plan.means in ("time", "sigterm") and (phase, self.counts[phase]) == (
            self.plan.phase,
            self.plan.number,
        ):
            start_timer(self.plan.delay, signal.SIGKILL if self.plan.means == "time" else signal.SIGTERM)

    def _hook(self, event, arguments):
        """Called before each operation. Opening a file counts if it is for writing."""
        if event in OPERATIONS and (event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            self.operations += 1
            if self.plan.means == "operation" and self.operations == self.plan.number:
                os.kill(os.getpid(), signal.SIGKILL)


class _Event(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_byte * 48),
    )


def start_timer(seconds: float, number: int) -> None:
    """Has the system send a signal to this process, which does not wait for Python: `timer_create` of POSIX."""
    library, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    event = _Event(signal=number)
    when = (ctypes.c_long * 4)(0, 0, int(seconds), max(1, int(seconds % 1 * 1e9)))  # no second time
    if library.timer_create(1, ctypes.byref(event), ctypes.byref(timer)) or library.timer_settime(
        timer, 0, ctypes.byref(when), None
    ):
        raise OSError(ctypes.get_errno(), "no timer")


def process(learner: str, workdir: Path, cache: Path | None, pipe: int, log: Path, plan: Plan) -> None:
    """What a forked process does; it never returns."""
    signal.alarm(HANGS)
    code = 1
    with log.open("a", buffering=1) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        try:
            warnings.simplefilter("always")
            jax.config.update("jax_compilation_cache_dir", None if cache is None else str(cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
            say = Reporter(pipe, plan)
            state = _meta_train(learner, workdir, say)
            say("end", **described(workdir, state))
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def _meta_train(name, workdir, say):
    """The run, which says when a phase begins."""
    say("start-up")
    family = quadratic_family(np.linspace(0.5, 2, 3, dtype=np.float32), support=2, query=2)
    make_trainer, save_tree = meta_train.trainer_of, checkpoints.save_tree
    compiled = False

    def trainer_of(flags, learner):
        trainer = make_trainer(flags, learner)

        def step(state):
            nonlocal compiled
            say("step" if compiled else "compilation", step=int(state.step))
            found = jax.block_until_ready(trainer.step(state))
            compiled = True
            say("step", step=int(state.step) + 1)
            return found

        return trainer._replace(step=step)

    def save(path, tree):
        say("save", step=int(Path(path).name))
        save_tree(path, tree)
        say("saved", step=int(Path(path).name))

    meta_train.families_of = lambda flags, split: [family]
    meta_train.trainer_of = trainer_of
    meta_train.provenance.describe = lambda seeds: {"seeds": list(seeds)}
    checkpoints.save_tree = save
    return meta_train.meta_train(meta_train.Config(workdir=str(workdir), learner=name, **FLAGS, **LEARNERS[name]))


def described(workdir: Path, state) -> dict:
    """Digests of all that must be equal, and the files that a run leaves."""
    stored, _ = run.load_run(workdir, lambda config: state)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    found = [path for path in workdir.glob("*") if path.name != "tensorboard"]
    files = sorted(path.relative_to(workdir).as_posix() for path in (*found, *workdir.glob("checkpoints/*")))
    digests = {
        "state": _digest(*map(_bytes, jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))))),
        "checkpoint": _digest(*map(_bytes, jax.tree.leaves(stored._replace(key=jax.random.key_data(stored.key))))),
        "metrics.jsonl": _digest(json.dumps(lines).encode()),
        **{name: _digest((workdir / name).read_bytes()) for name in files if name in ("config.json", *RULE)},
    }
    return {"digests": digests, "files": files}


def _bytes(leaf):
    return f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes()


def _digest(*parts):
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:16]
