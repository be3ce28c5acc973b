"""Runs targets on damaged inputs, within limits of time and memory, and says what came out."""

import os
import random
import re
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from pathlib import Path

from tests.fuzz import more_targets
from tests.fuzz.targets import TARGETS

#: Seconds of processor time, bytes of address space above what is in use, and of resident memory, of one input.
SECONDS, ADDRESSES, RESIDENT = 10, 2**32, 2**28
ACCEPTED, REFUSED = "accepted", "refused"
#: All others are findings.
FINE = (ACCEPTED, REFUSED)
OUTCOMES = (*FINE, "undocumented", "hang", "memory", "crash", "escape")


class Hang(BaseException):
    """Too much time; a BaseException, since readers turn others into documented ones."""


def one(name, number, seed=0, limit=True):
    """The outcome of input `number` of a target, and what was said of it.

    Args:
      name: of the target.
      number: of the input, which is a function of the seed, the name and the number.
      seed: see `number`.
      limit: whether to limit the address space.
    """
    target = TARGETS[name]
    base, folder = Path.cwd(), Path(tempfile.mkdtemp())
    signal.signal(signal.SIGPROF, _stop)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    (folder / "input").mkdir()
    try:
        os.chdir(folder)
        if limit:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES, hard))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome, said = _outcome(target, random.Random(f"{seed}/{name}/{number}"), folder / "input")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        os.chdir(base)
        there = sorted(path.name for path in folder.iterdir())
        shutil.rmtree(folder, ignore_errors=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if there != ["input"]:  # a file beside the folder, such as `mutations.Trap.path`
        return "escape", str(there)
    if outcome in FINE and grown > RESIDENT:
        return "memory", f"{grown} bytes more; {said}"
    return outcome, said


def warm_up(names):
    """One input of each target without limits: threads and caches of JAX and others are made in the first."""
    for name in sorted(names):
        one(name, 0, limit=False)


def _outcome(target, source, folder):
    try:
        target.run(source, folder)
    except Hang:
        return "hang", ""
    except MemoryError as error:
        return "memory", _where(error)
    except target.documented as error:
        if re.search(target.says, str(error), re.DOTALL):
            return REFUSED, ""
        return "undocumented", f"does not name the argument: {_where(error)}"
    except Exception as error:
        return "undocumented", _where(error)
    return ACCEPTED, ""


def _where(error):
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:200]} ({Path(frame.filename).name}, line {frame.lineno})"


def _stop(number, frame):
    raise Hang


__all__ = ["FINE", "OUTCOMES", "TARGETS", "more_targets", "one", "warm_up"]
