"""Meta-training runs on disk: `train` writes checkpoints and metrics and resumes exactly, `load_run` reads a run."""

import contextlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm
from jaxtyping import PRNGKeyArray

from lft_jax import base
from lft_jax._files import write_bytes
from lft_jax._reading import parse_json, read_object
from lft_jax.base import PyTree
from lft_jax.meta import _lock, checkpoints
from lft_jax.meta.trainer import MetaState, MetaTrainer


class MetaTrainingDiverged(RuntimeError):
    """Too many meta-gradients in a row were not finite."""


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
    progress: bool = True,
) -> MetaState:
    """Meta-trains in `workdir`, resuming from its last checkpoint if there is one.

    A resumed run gives the same numbers as an uninterrupted one, since its complete state is in the checkpoint. Writes
    `config.json`, `checkpoints/`, `metrics.jsonl` (one line per meta-step) and TensorBoard event files. Under
    `jax.distributed` every process must call this with the same workdir on shared storage; the first one writes.

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
      progress: whether to show a progress bar.

    Returns:
      The state after `num_meta_steps` meta-steps.

    Raises:
      ValueError: for a workdir that another run uses, with another configuration, or with damaged metrics or a damaged
        last checkpoint, and for numbers below 1.
      PermissionError: for a workdir that cannot be written.
      MetaTrainingDiverged: see `max_skipped_in_a_row`.

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
        _claim(workdir, config, upgrade, write=first)
        state = trainer.init(key)
        state = _latest(workdir, like=state) or state
        start = int(state.step)
        metrics_path = workdir / "metrics.jsonl" if first else Path(os.devnull)
        if first:
            _keep_before(metrics_path, start)
        lines = stack.enter_context(open(metrics_path, "a", encoding="utf-8"))
        options = {"logdir": str(workdir / "tensorboard"), "purge_step": start, "write_to_disk": first}
        board = stack.enter_context(tensorboardX.SummaryWriter(**options))
        options = {"desc": "meta-training", "unit": "step", "disable": not (progress and first)}
        bar = stack.enter_context(tqdm.tqdm(total=num_meta_steps, initial=start, **options))
        for step in range(start, num_meta_steps):
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
            lines.write(json.dumps(record) + "\n")
            for name, value in record.items():
                if name != "step" and np.ndim(value) == 0:
                    board.add_scalar(name, value, step)
            if due:
                lines.flush()  # so that the metrics of all meta-steps before a checkpoint are on disk
                _save(workdir, state)
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.4f}", skipped=record["skipped"], refresh=False)
    return state


def load_run(workdir: str | os.PathLike[str], like: Callable[[dict[str, Any]], MetaState]) -> tuple[MetaState, dict]:
    """Loads the last checkpoint of a run.

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
    if jax.process_index() > 0:
        return
    for folder in (workdir / "checkpoints", workdir / "particles"):
        for step in _steps(folder)[:-2]:
            shutil.rmtree(folder / str(step))


def _latest(workdir, like):
    """The state of the last checkpoint, or None if there is none."""
    steps = _steps(workdir / "checkpoints")
    if not steps:
        return None
    last, *older = reversed(steps)
    try:
        return _load(workdir, last, like)
    except ValueError as error:
        for step in older:
            with contextlib.suppress(ValueError):
                _load(workdir, step, like)
                advice = f"Checkpoint {step} is good; to go on from it, delete {workdir / 'checkpoints' / str(last)}."
                break
        else:
            advice = "No older checkpoint can be read; to begin again, choose another workdir."
        reason = "is damaged, or of another rule or meta-optimizer"
        raise ValueError(f"workdir: checkpoint {last} of {workdir} {reason}. {advice} {error}") from error


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


def _keep_before(path, step):
    """Removes the lines of meta-steps that will be run again, and a last line that a crash left incomplete.

    Warns of lines that it removes. Raises a ValueError for a damaged line elsewhere.
    """
    if not path.exists():
        return
    lines, kept, again = path.read_bytes().splitlines(keepends=True), [], 0
    for number, line in enumerate(lines, 1):
        try:
            before = int(parse_json(line)["step"]) < step
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if line.endswith(b"\n"):
                raise ValueError(
                    f"workdir: line {number} of {path} is damaged: {line[:60]!r}. Correct or delete the line, or move "
                    f"the file elsewhere; the run goes on from its checkpoint of meta-step {step} in any case."
                ) from error
            warnings.warn(f"{path}: the last line is incomplete and is removed: {line[:60]!r}.", stacklevel=3)
            continue
        again += not before
        if before:
            kept.append(line.rstrip(b"\n") + b"\n")
    if again:
        done = f"the run goes on from its checkpoint of meta-step {step}"
        warnings.warn(f"{path}: {done}; {again} later meta-steps are run again, and their lines removed.", stacklevel=3)
    if kept != lines:
        write_bytes(path, b"".join(kept))
