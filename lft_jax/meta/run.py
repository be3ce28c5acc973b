"""A meta-training run on disk: checkpoints, exact resume, metrics files, progress, and when to give up."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm

from lft_jax import base
from lft_jax.meta import checkpoints
from lft_jax.meta.trainer import MetaState, MetaTrainer

PyTree = Any


class MetaTrainingDiverged(RuntimeError):
    """Too many meta-gradients in a row were not finite."""


def meta_train(
    trainer: MetaTrainer,
    key: jax.Array,
    workdir: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    absent: Mapping[str, Any] | None = None,
    num_meta_steps: int,
    checkpoint_every: int = 100,
    max_skipped_in_a_row: int = 20,
    validate: Callable[[PyTree], Mapping[str, float]] | None = None,
    progress: bool = True,
) -> MetaState:
    """Meta-trains in `workdir`, resuming from its last checkpoint if there is one.

    A resumed run gives the same numbers as an uninterrupted one: all that it depends on is in the checkpoint.
    Writes `config.json`, `checkpoints/`, `metrics.jsonl` (a line a meta-step) and TensorBoard event files. Under
    `jax.distributed` every process calls it with one workdir on storage that they share; the first one writes.

    Args:
      trainer: from `lft_jax.meta_trainer`.
      key: seed of the run.
      workdir: folder of the run; created.
      config: JSON-serialisable description of the run; must be what the workdir was begun with.
      absent: what a key of `config` meant before there was one, for workdirs begun without it.
      num_meta_steps: in all, those before a resume included.
      checkpoint_every: meta-steps between checkpoints (and validations).
      max_skipped_in_a_row: so many meta-gradients in a row that are not finite stop the run.
      validate: `params -> {name: number}`, written beside the metrics.
      progress: show a progress bar with the time left.

    Raises:
      ValueError: for a workdir that holds another configuration, and numbers below 1.
      PermissionError: for a workdir that cannot be written.
      MetaTrainingDiverged: see `max_skipped_in_a_row`.
    """
    for name, value in (("num_meta_steps", num_meta_steps), ("checkpoint_every", checkpoint_every)):
        base.check_at_least(name, value, 1)
    workdir = Path(workdir)
    first = jax.process_index() == 0
    _claim(workdir, config, absent or {}, write=first)
    state = trainer.init(key)
    state = _latest(workdir, like=state) or state
    start = int(state.step)
    metrics_path = workdir / "metrics.jsonl" if first else Path(os.devnull)
    if first:
        _keep_before(metrics_path, start)
    options = {"logdir": str(workdir / "tensorboard"), "purge_step": start, "write_to_disk": first}
    hidden = not (progress and first)
    with (
        open(metrics_path, "a", encoding="utf-8") as lines,
        tensorboardX.SummaryWriter(**options) as board,
        tqdm.tqdm(total=num_meta_steps, initial=start, desc="meta-training", unit="step", disable=hidden) as bar,
    ):
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
                lines.flush()  # the lines up to a checkpoint are on disk before it is
                _save(workdir, state)
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.4f}", skipped=record["skipped"], refresh=False)
    return state


def load_run(workdir: str | os.PathLike[str], like: Callable[[dict[str, Any]], MetaState]) -> tuple[MetaState, dict]:
    """The last state of a run and its configuration.

    Args:
      workdir: folder of the run.
      like: `config -> MetaState` of the structure that the checkpoint should have.

    Raises:
      ValueError: if there is no run or no checkpoint, or it is of another structure.
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
    """The steps that there is something of in the folder, ascending."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def _apart(state):
    """A state as it is stored: without its particles, which only resuming needs, and these."""
    fields = state._replace(key=jax.random.key_data(state.key))._asdict()
    return fields, fields.pop("particles")


def _save(workdir, state):
    """Writes a checkpoint, whole or not at all, and drops all but the last two."""
    step, (fields, particles) = str(int(state.step)), _apart(state)
    if particles:  # before the checkpoint, which is none without them
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
    fields, particles = _apart(like)
    try:
        state = MetaState(**checkpoints.load_tree(workdir / "checkpoints" / str(steps[-1]), fields))
        if particles:
            state = state._replace(particles=checkpoints.load_tree(workdir / "particles" / str(steps[-1]), particles))
    except ValueError as error:
        raise ValueError(
            f"workdir: checkpoint {steps[-1]} of {workdir} is damaged, or of another rule or meta-optimizer ({error})"
        ) from error
    return state._replace(key=jax.random.wrap_key_data(state.key, impl=jax.random.key_impl(like.key)))


def _read_config(workdir):
    """The configuration of the run there, or None if there is none."""
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"workdir: {path} is damaged ({error}).") from error


def _claim(workdir, config, absent, write):
    """Writes the configuration, if it is for this process to do, or checks that the one there is the same."""
    config, absent = json.loads(json.dumps([config, dict(absent)]))  # as they read back
    found = _read_config(workdir)
    if found is not None:
        found = {**absent, **found}
        different = sorted(k for k in found.keys() | config.keys() if found.get(k) != config.get(k))
        if different:
            changes = ", ".join(f"{k}: {found.get(k)!r} there, {config.get(k)!r} asked for" for k in different)
            raise ValueError(f"workdir: {workdir} holds a run of another configuration ({changes}).")
        return
    if not write:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise PermissionError(f"workdir: {workdir} cannot be written ({error}); choose another.") from error


def _keep_before(path, step):
    """Drops the lines of meta-steps that will be run again (and a last line cut short by a crash)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] < step:
            kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")
