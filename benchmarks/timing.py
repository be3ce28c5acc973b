"""Timing of programs: alternately, in one process, on a machine without other load."""

import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_LOAD = 0.2  # cores that other processes may use


def load_of_others(seconds: float = 2.0) -> float | None:
    """Mean number of cores that other processes use while this one sleeps; None without /proc."""
    before = _busy_seconds()
    if before is None:
        return None
    own, began = time.process_time(), time.monotonic()
    time.sleep(seconds)
    return max(0.0, (_busy_seconds() - before - (time.process_time() - own)) / (time.monotonic() - began))


def require_quiet() -> float | None:
    """Returns the load of other processes, in cores; raises a RuntimeError if it is above `MAX_LOAD`."""
    load = load_of_others()
    if load is not None and load > MAX_LOAD:
        raise RuntimeError(f"other processes use {load:.2f} cores; benchmarks need at most {MAX_LOAD}.")
    return load


def alternate(contestants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Times all contestants in turn, `repeats` times after a warm-up.

    Args:
      contestants: `{name: function}`. The functions return when their work is done (`block_until_ready`).
      repeats: number of timed runs; results need at least 5.

    Returns:
      For each name, `seconds` (median), `all` (each run) and `first` (the warm-up, with compilation).
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
    """Peak memory of this process, in MiB."""
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
