"""What a run writes after each meta-step: `metrics.jsonl`, and scalars for TensorBoard."""

import contextlib
import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]
from tensorboardX.record_writer import RecordWriter

from lft_jax._files import write_bytes
from lft_jax._reading import parse_json


class Log:
    """The files, open. They are written by the thread that calls, so that it learns of a full disk.

    tensorboardX's own `SummaryWriter` writes in a thread. If that fails, its queue fills up and the run waits forever.
    """

    def __init__(self, workdir: Path, start: int):
        """Opens the files.

        Args:
          workdir: folder of the run.
          start: meta-steps done; lines of later ones are removed.

        Raises:
          OSError: if a file cannot be written.
          ValueError: if a line before the last is damaged.

        Warns:
          UserWarning: for lines that are removed.
        """
        self.path = workdir / "metrics.jsonl"
        _keep_before(self.path, start)
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            self._lines = stack.enter_context(_closing(self.path.open("a", encoding="utf-8")))
            # With the number of the process, since two may begin in one second.
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
            self._events = stack.enter_context(_closing(RecordWriter(str(folder / name))))
            self._add(start, file_version="brain.Event:2")
            self._add(
                start, session_log=SessionLog(status=SessionLog.START)
            )  # hides what TensorBoard has from there on
            self._stack = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stack.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a line, and the numbers in it to TensorBoard."""
        self._lines.write(json.dumps(record) + "\n")
        numbers = {name: value for name, value in record.items() if name != "step" and np.ndim(value) == 0}
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in numbers.items()]
        self._add(record["step"], summary=Summary(value=values))

    def flush(self) -> None:
        """Brings all lines to the disk.

        Raises:
          FileNotFoundError: if the file that is open is not that in the folder any more.
        """
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._events.flush()
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._lines.fileno()), os.stat(self.path)):
                return
        raise FileNotFoundError(errno.ENOENT, "the folder or its metrics.jsonl was moved or deleted during the run")

    def _add(self, step, **content):
        self._events.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())


@contextlib.contextmanager
def _closing(file):
    """Closes a file, whose writer has been told already if the disk is full."""
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


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
            warnings.warn(f"{path}: the last line is incomplete and is removed: {line[:60]!r}.", stacklevel=4)
            continue
        again += not before
        if before:
            kept.append(line.rstrip(b"\n") + b"\n")
    if again:
        done = f"the run goes on from its checkpoint of meta-step {step}"
        warnings.warn(f"{path}: {done}; {again} later meta-steps are run again, and their lines removed.", stacklevel=4)
    if kept != lines:
        write_bytes(path, b"".join(kept))
