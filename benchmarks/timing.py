"""How a speed is measured: alternately, in one process, on a quiet machine."""

import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_LOAD = 0.2  # cores that others may use


def load_of_others(seconds: float = 2.0) -> float | None:
    """Cores that other processes kept busy while this one slept; None where /proc does not tell."""
    before = _busy_seconds()
    if before is None:
        return None
    own, began = time.process_time(), time.monotonic()
    time.sleep(seconds)
    return max(0.0, (_busy_seconds() - before - (time.process_time() - own)) / (time.monotonic() - began))


def require_quiet() -> float | None:
    """The load of other processes, in cores; raises a RuntimeError if it is above `MAX_LOAD`."""
    load = load_of_others()
    if load is not None and load > MAX_LOAD:
        raise RuntimeError(f"other processes keep {load:.2f} cores busy; a benchmark needs at most {MAX_LOAD}.")
    return load


def alternate(contestants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Runs all contestants in turn, `repeats` times after a warm-up.

    Args:
      contestants: by name, functions that return when their work is done (`block_until_ready`).
      repeats: at least 5 for a result.

    Returns:
      For each, `seconds` (median), `all` (each run), and `first`, the warm-up with its compilation.
    """
    first = {name: _seconds(run) for name, run in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            times[name].append(_seconds(run))
    return {
        name: {"seconds": statistics.median(values), "all": values, "first": first[name]}
        for name, values in times.items()
    }


def peak_memory() -> float:
    """Most memory that this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _seconds(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _busy_seconds():
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, path.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
