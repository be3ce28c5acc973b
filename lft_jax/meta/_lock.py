"""A lock on the folder of a run, so that only one run at a time writes there."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Generator
from pathlib import Path

from lft_jax._reading import parse_json

#: Characters that are read of the file.
LONGEST = 10_000


@contextlib.contextmanager
def held(workdir: Path) -> Generator[None, None, None]:
    """Holds the lock of `workdir` during a `with` block. The folder is created if necessary.

    The lock is an `flock` on the file `run.lock`, which names the process that holds it. The system releases an `flock`
    when the process ends, however it ends. A file that is left then is taken over, with a warning, on the same host. On
    another host it is refused, since some shared file systems do not pass an `flock` on to other hosts.

    Raises:
      ValueError: if another run holds the lock.
      PermissionError: if the folder cannot be written.
    """
    path = workdir / "run.lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file, free = _open(path)
    except OSError as error:
        raise _unwritable(workdir, error) from error
    with file:
        holder, here = _read(file), socket.gethostname()
        if free is None:  # a file system without locks
            free = not holder or not _is_alive(holder["process"])
        who = "process {process} on host {host}, started {started}".format(**holder) if holder else "another process"
        if not free or (holder and holder["host"] != here):
            raise ValueError(
                f"workdir: {workdir} is in use by {who}. Choose another workdir, or wait. If that process has ended, "
                f"delete {path}."
            )
        if holder:
            warnings.warn(f"workdir: {path} was left by {who}, which has ended; it is taken over.", stacklevel=4)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            try:
                os.ftruncate(file.fileno(), 0)
                says = json.dumps({"host": here, "process": os.getpid(), "started": now}) + "\n"
                os.pwrite(file.fileno(), says.encode(), 0)
            except OSError as error:  # as of a full disk
                raise _unwritable(workdir, error) from error
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is locked: afterwards it may be the file of another run


def _unwritable(workdir, error):
    return PermissionError(f"workdir: {workdir} cannot be written ({error}); choose another.")


def _open(path):
    """The file, and whether it could be locked: None on a file system without locks."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return file, False
        except OSError:
            return file, None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file, True
        file.close()  # its holder deleted it between `open` and `flock`


def _read(file):
    """What the file says of its holder: host, process, started. None if it says nothing."""
    try:
        holder = parse_json(file.read(LONGEST))
        return {"host": str(holder["host"]), "process": int(holder["process"]), "started": str(holder["started"])}
    except (ValueError, TypeError, KeyError, OverflowError):  # empty, or cut short
        return None


def _is_alive(process):
    try:
        os.kill(process, 0)
    except PermissionError:  # of another user
        return True
    except OSError:
        return False
    return True
