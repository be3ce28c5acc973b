"""Exit codes of a console script, and the one line that it says with them.

Exit codes: 0 success; 1 unexpected error, with a traceback; 2 wrong usage; 3 the run ended early and what it had found
is written; 130 Ctrl-C and 143 SIGTERM, before there was anything to write, or where the same command goes on.
"""

import contextlib
import signal
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags

from lft_jax.cli import config

PACKAGE = Path(__file__).parents[1]
WRONG_USAGE, ENDED_EARLY, INTERRUPTED, TERMINATED = 2, 3, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is dealt with as Ctrl-C is."""

    def __init__(self):
        super().__init__("SIGTERM")


class EndedEarly(Exception):
    """An error, Ctrl-C or SIGTERM ended the run; what it had found is written. The cause says why.

    Attributes:
      code: exit code.
    """

    code = ENDED_EARLY


class Kept(EndedEarly):
    """Ctrl-C or SIGTERM ended the run; the same command goes on."""

    def __init__(self, message: str, cause: KeyboardInterrupt):
        super().__init__(message)
        self.code = _code(cause)


class LimitExceeded(EndedEarly):
    """The run is complete, and what it measured is above a limit that was given."""


def main(config_type: type, run: Callable[[Any], Any]) -> None:
    """As `config.main`, with the exit codes above, and warnings as one line each.

    Args:
      config_type: as of `config.main`.
      run: the program. ValueError, TypeError, OSError and ModuleNotFoundError are wrong usage.
    """
    warnings.formatwarning = _warning_line

    def coded(flags):
        try:
            with sigterm_as_interrupt():
                run(flags)
        except EndedEarly as error:
            _exit(error.code, str(error))
        except KeyboardInterrupt as stop:
            _exit(_code(stop), "interrupted; nothing was written")
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
            _exit(WRONG_USAGE, described(error))

    try:
        config.main(config_type, coded)
    except SystemExit as stop:
        if isinstance(stop.code, str):  # a list with invalid entries
            _exit(WRONG_USAGE, stop.code)
        if stop.code == 1:  # absl's: after a message about a flag or an argument, else after --help
            wrong = isinstance(stop.__context__, flags.Error | app.UsageError)
            raise SystemExit(WRONG_USAGE if wrong else 0) from stop
        raise


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raises `Terminated` where the first SIGTERM comes. A second one ends the process at once."""

    def terminate(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    former = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)


def _code(stop):
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def described(error: BaseException) -> str:
    """One line: the kind of an error, what it says, and where the user's own code raised it, if it did."""
    said = f"{type(error).__name__}: {error}".rstrip(": ").replace("\n", " ")
    frames = traceback.extract_tb(error.__traceback__)
    ours = [number for number, frame in enumerate(frames) if _is_of(frame.filename, PACKAGE)]
    theirs = [frame for frame in frames[ours[0] if ours else 0 :] if _is_users(frame.filename)]
    return f"{said} ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else said


def _is_users(file):
    installed = "site-packages" in file or _is_of(file, sysconfig.get_path("stdlib"))
    return not (file.startswith("<") or installed or _is_of(file, PACKAGE))


def _is_of(file, folder):
    return Path(folder) in Path(file).parents


def _exit(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)


def _warning_line(message, category, filename, lineno, line=None):
    del filename, lineno, line
    return f"{'warning' if category is UserWarning else category.__name__}: {message}\n"
