"""Meta-training runs on disk: `train` writes checkpoints and metrics and resumes exactly, `load_run` reads a run."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jaxtyping import PRNGKeyArray

from lft_jax import base
from lft_jax._files import remove_directory, write_bytes
from lft_jax._reading import read_object
from lft_jax.base import PyTree
from lft_jax.meta import _lock, checkpoints
from lft_jax.meta._log import Log
from lft_jax.meta.trainer import MetaState, MetaTrainer

#: Exit code of a process that `MetaTrainingStopped` ends: 128 + SIGTERM, as shells report it.
STOPPED = 143
#: Checkpoints that are kept.
KEPT = 2


class MetaTrainingDiverged(RuntimeError):
    """Too many meta-gradients in a row were not finite."""


class MetaTrainingStopped(SystemExit):
    """The run was asked to stop, and has saved a checkpoint: the same call goes on.

    Not caught, it ends the process with exit code 143.

    Attributes:
      workdir: folder of the run.
      step: meta-steps done.
    """

    def __init__(self, workdir: Path, step: int):
        super().__init__(STOPPED)
        self.workdir, self.step = workdir, step

    def __str__(self):
        return f"stopped after meta-step {self.step}, which is saved in {self.workdir}; the same command goes on"


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Takes note of SIGTERM in a `with` block, where it would end the process: makes the `stop` of `train`.

    Only the first one is noted: a second one has its former effect, which usually is to end the process at once. Only
    the main thread can use it. Under `jax.distributed`, use it after `jax.distributed.initialize`.

    Yields:
      A function that says whether SIGTERM has come.

    Raises:
      ValueError: outside of the main thread.

    Examples:
      >>> with stop_on_sigterm() as stop:
      ...     before = stop()
      ...     os.kill(os.getpid(), signal.SIGTERM)
      ...     before, stop()
      (False, True)
    """
    came = threading.Event()

    def note(number, frame):
        came.set()
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)

    former = signal.signal(signal.SIGTERM, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)


def train(
    trainer: MetaTrainer,
    key: PRNGKeyArray,
    workdir: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    upgrade: Callable[[dict], dict] = lambda config: config,
    num_meta_steps: int,
    checkpoint_every: int = 100,
    max_skipped_in_a_row: int = 20,
    validate: Callable[[PyTree], Mapping[str, float]] | None = None,
    stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> MetaState:
    """Meta-trains in `workdir`, resuming from its last checkpoint if there is one.

    A resumed run gives the same numbers as an uninterrupted one, since its complete state is in the checkpoint. Writes
    `config.json`, `checkpoints/`, `metrics.jsonl` (one line per meta-step) and TensorBoard event files. Under
    `jax.distributed` every process must call this with the same workdir on shared storage; the first one writes.

    A process that is killed, at whatever moment, loses the meta-steps since the last checkpoint, which are run again.
    The last two checkpoints are kept. If the last one is damaged, the one before it is used, with a warning, and the
    damaged one is renamed to `STEP.damaged`.

    During a run the file `run.lock` in the workdir names its host and process, and a second run there is refused. A
    file that a killed process has left is taken over on the same host, with a warning; on another one, delete it.

    Args:
      trainer: from `lft_jax.meta_trainer`.
      key: PRNG key of the run.
      workdir: directory of the run, which is created if necessary.
      config: JSON-serializable description of the run. It must equal the configuration stored in the workdir, if any.
      upgrade: turns a stored configuration into its present form, before it is compared.
      num_meta_steps: total number of meta-steps, including those before a resume.
      checkpoint_every: number of meta-steps between checkpoints (and validations).
      max_skipped_in_a_row: number of consecutive meta-gradients that are not finite after which the run stops.
      validate: `params -> {name: number}`, called at every checkpoint; the result is added to the metrics.
      stop: asked before each meta-step whether to stop; None for never. `stop_on_sigterm` makes one. Under
        `jax.distributed` all processes need one, and all stop if one of them says so.
      progress: whether to show a progress bar.

    Returns:
      The state after `num_meta_steps` meta-steps.

    Raises:
      ValueError: for a workdir that another run uses, with another configuration, or with damaged metrics or no
        checkpoint that can be read, and for numbers below 1.
      PermissionError: for a workdir that cannot be written.
      OSError: if writing fails during the run, as on a full disk, or the workdir is moved or deleted. The last good
        checkpoint stays, and is named.
      MetaTrainingDiverged: see `max_skipped_in_a_row`.
      MetaTrainingStopped: if `stop` says so; the last meta-step is saved.

    Warns:
      UserWarning: of a damaged checkpoint, of lines of `metrics.jsonl` that are removed since their meta-steps are run
        again, and of the `run.lock` of a process that has ended.

    Examples:
      >>> import tempfile
      >>> metrics = {"loss": 0.5, "skipped": 0, "skipped_in_a_row": 0}  # of a trainer that only counts
      >>> state = MetaState({"x": np.ones(2)}, {"m": np.ones(2)}, jax.random.key(0), np.int32(0))
      >>> trainer = MetaTrainer(lambda key: state, lambda s: (s._replace(step=s.step + 1), metrics))
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     options = {"config": {"seed": 0}, "progress": False}
      ...     after = train(trainer, jax.random.key(0), workdir, num_meta_steps=3, **options)
      ...     loaded, config = load_run(workdir, like=lambda config: state)
      >>> int(after.step), int(loaded.step), config
      (3, 3, {'seed': 0})
    """
    for name, value in (("num_meta_steps", num_meta_steps), ("checkpoint_every", checkpoint_every)):
        base.check_at_least(name, value, 1)
    workdir = Path(workdir)
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(_lock.held(workdir))
            _remove_leftovers(workdir)
        _claim(workdir, config, upgrade, write=first)
        state = trainer.init(key)
        state = _latest(workdir, like=state, rename=first) or state
        if first:
            with _writing(workdir):
                _remove_old(workdir)  # of a process that was killed after its last checkpoint
        start = saved = int(state.step)
        with _writing(workdir):
            log = stack.enter_context(Log(workdir, start)) if first else None
        options = {"desc": "meta-training", "unit": "step", "disable": not (progress and first)}
        bar = stack.enter_context(tqdm.tqdm(total=num_meta_steps, initial=start, **options))

        def save():
            with _writing(workdir):
                if log is not None:
                    log.flush()  # so that the metrics of all meta-steps before a checkpoint are on disk
                _save(workdir, state)

        for step in range(start, num_meta_steps):
            if _asked_to_stop(stop):
                if saved < step:
                    save()
                raise MetaTrainingStopped(workdir, step)
            began = time.perf_counter()
            state, metrics = trainer.step(state)
            record = {name: np.asarray(value).tolist() for name, value in metrics.items()}
            record = {"step": step, **record, "seconds": time.perf_counter() - began}
            if record["skipped_in_a_row"] >= max_skipped_in_a_row:
                raise MetaTrainingDiverged(
                    f"{record['skipped_in_a_row']} meta-gradients in a row, up to step {step}, were not finite; "
                    f"the last good checkpoint is in {workdir / 'checkpoints'}. Try a lower meta learning rate, "
                    "fewer fine-tuning steps, or a smaller output_scale."
                )
            due = step + 1 == num_meta_steps or (step + 1) % checkpoint_every == 0
            if due and validate is not None:
                record |= validate(state.params)
            if log is not None:
                with _writing(workdir):
                    log.write(record)
            if due:
                save()
                saved = step + 1
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.4f}", skipped=record["skipped"], refresh=False)
    return state


def _asked_to_stop(stop):
    """Whether `stop` says so in any process."""
    if stop is None:
        return False
    asked = bool(stop())
    return bool(np.any(multihost_utils.process_allgather(np.asarray(asked)))) if jax.process_count() > 1 else asked


@contextlib.contextmanager
def _writing(workdir):
    """Adds to an OSError which folder could not be written, and from where the run will go on."""
    try:
        yield
    except OSError as error:
        steps = _steps(workdir / "checkpoints")
        kept = f"the last good checkpoint is that of meta-step {steps[-1]}" if steps else "there is no checkpoint in it"
        # With the number of the error Python makes the type that belongs to it.
        raise OSError(
            error.errno, f"workdir: {workdir} could not be written; {kept}, and the same call goes on. {error}"
        ) from error


def load_run(workdir: str | os.PathLike[str], like: Callable[[dict[str, Any]], MetaState]) -> tuple[MetaState, dict]:
    """Loads the last checkpoint of a run.

    If it is damaged, the one before it is used, with a warning.

    Args:
      workdir: directory of the run.
      like: `config -> MetaState` with the structure and shapes of the checkpoint, such as that of `init_state`.

    Returns:
      The state and the stored configuration. See `train` for an example.

    Raises:
      ValueError: if there is no run or no checkpoint, or if it is damaged or has another structure.
    """
    workdir = Path(workdir)
    config = _read_config(workdir)
    if config is None:
        raise ValueError(f"workdir: {workdir} holds no run (no config.json); make one with experiments.meta_train.")
    state = _latest(workdir, like=like(config))
    if state is None:
        raise ValueError(f"workdir: {workdir} holds no checkpoint yet.")
    return state, config


def _steps(folder):
    """The meta-steps of the checkpoints in a folder, ascending."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in found if path.name.isascii() and path.name.isdigit())


def _split(state):
    """The parts of a state that are stored separately: all fields except the particles, and the particles.

    Particles are needed only to resume, so `load_run` also takes a `like` without them.
    """
    fields = state._replace(key=jax.random.key_data(state.key))._asdict()
    return fields, fields.pop("particles")


def _save(workdir, state):
    """Writes a checkpoint atomically, and deletes all except the last two."""
    step, (fields, particles) = str(int(state.step)), _split(state)
    if particles:  # first, since a checkpoint without them could not be resumed from
        checkpoints.save_tree(workdir / "particles" / step, particles)
    checkpoints.save_tree(workdir / "checkpoints" / step, fields)
    if jax.process_index() == 0:
        _remove_old(workdir)


def _remove_old(workdir):
    """Deletes all checkpoints except the last two."""
    kept = _steps(workdir / "checkpoints")[-KEPT:]
    for folder in (workdir / "checkpoints", workdir / "particles"):
        for step in _steps(folder):
            if step not in kept:  # nor are particles whose checkpoint a crash has prevented
                remove_directory(folder / str(step))


def _remove_leftovers(workdir):
    """Deletes what processes that were killed have left of files and folders that they were writing or deleting."""
    found = [*workdir.glob(".*.partial")]
    for folder in (workdir / "checkpoints", workdir / "particles"):
        found += [path for suffix in ("partial", "replaced", "removed") for path in folder.glob(f"*.{suffix}")]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _latest(workdir, like, *, rename=False):
    """The state of the last checkpoint that can be read, or None if there is no checkpoint.

    Warns of later ones that are damaged, and renames them if asked to.
    """
    folder, damaged = workdir / "checkpoints", []
    for step in reversed(_steps(folder)):
        try:
            state = _load(workdir, step, like)
        except ValueError as error:
            damaged.append((step, error))
            continue
        for bad, error in damaged:
            done = f"renamed to {bad}.damaged" if rename else "left out"
            used = f"is {done}; that of meta-step {step} is used instead"
            warnings.warn(f"workdir: checkpoint {bad} of {workdir} is damaged and {used}. {error}", stacklevel=3)
            if rename:
                aside = folder / f"{bad}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                with _writing(workdir):
                    os.replace(folder / str(bad), aside)
        return state
    if damaged:
        last, error = damaged[0]
        raise ValueError(
            f"workdir: checkpoint {last} of {workdir} is damaged, or of another rule or meta-optimizer, and no older "
            f"one can be read; to begin again, choose another workdir. {error}"
        ) from error
    return None


def _load(workdir, step, like):
    """The state of a checkpoint."""
    fields, particles = _split(like)
    state = MetaState(**checkpoints.load_tree(workdir / "checkpoints" / str(step), fields))
    if particles:
        state = state._replace(particles=checkpoints.load_tree(workdir / "particles" / str(step), particles))
    return state._replace(key=jax.random.wrap_key_data(state.key, impl=jax.random.key_impl(like.key)))


def _read_config(workdir):
    """The configuration stored in the workdir, or None if there is none."""
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"workdir: {path} is damaged ({error}); restore it, or choose another workdir.") from error


def _claim(workdir, config, upgrade, write):
    """Checks that the stored configuration is `config`. If there is none, stores it, unless `write` is False."""
    config, stored = _as_stored(config), _read_config(workdir)
    if stored is not None:
        stored = _as_stored(upgrade(stored))
        different = sorted(k for k in stored.keys() | config.keys() if stored.get(k) != config.get(k))
        if different:
            changes = ", ".join(f"{k}: {stored.get(k)!r} stored, {config.get(k)!r} given" for k in different)
            raise ValueError(f"workdir: {workdir} holds a run of another configuration ({changes}).")
    elif write:
        write_bytes(workdir / "config.json", f"{json.dumps(config, indent=1)}\n".encode())


def _as_stored(config):
    """The configuration as it is read from JSON: tuples become lists."""
    return json.loads(json.dumps(config))
