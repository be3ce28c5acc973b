"""What a process holds, and how fast it grows."""

import ctypes
import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.stats

MIB = 2**20


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [  # of which two are read
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def sample() -> dict[str, float]:
    """What this process holds after a garbage collection.

    Returns:
      - "rss": resident memory in MiB;
      - "heap": MiB that are allocated in the C heap, or NaN where the allocator does not tell. The rest of the resident
        memory is programs, mapped files, and pages that were freed and are kept by the allocator;
      - "arrays": MiB of all live arrays of JAX;
      - "programs": compiled programs that XLA holds;
      - "descriptors": open files, sockets and pipes;
      - "threads": of the process, those of XLA included.
    """
    gc.collect()
    return {
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB,
        "heap": _heap(),
        "arrays": sum(array.nbytes for array in jax.live_arrays()) / MIB,
        "programs": len(jax.devices()[0].client.live_executables()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def _heap():
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # another C library than glibc, or one before 2.33
        return float("nan")
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return (found.uordblks + found.hblkhd) / MIB


def slope(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The slope of a line through points, by least squares, with its 95% interval.

    The interval is that of simple regression with independent, normal errors; samples of one process are neither, so it
    is a little too narrow.

    Args:
      x: at least 3 numbers, not all the same.
      y: as many numbers.

    Returns:
      "slope", and "low" and "high", the ends of the interval.
    """
    if len(x) < 3:
        raise ValueError(f"x: a slope with an interval needs at least 3 points, got {len(x)}.")
    if np.ptp(y) == 0:
        return {"slope": 0.0, "low": 0.0, "high": 0.0}
    line = scipy.stats.linregress(np.asarray(x, float), np.asarray(y, float))
    half = scipy.stats.t.ppf(0.975, len(x) - 2) * line.stderr
    return {"slope": line.slope, "low": line.slope - half, "high": line.slope + half}


def slopes(attacks: Sequence[int], samples: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """For each quantity, its first, last, lowest and highest value, and its slope per 1,000 attacks."""
    found = {}
    for name in samples[0]:
        values = [one[name] for one in samples]
        if not np.all(np.isfinite(values)):
            continue
        line = {key: round(1000 * value, 3) for key, value in slope(attacks, values).items()}
        ends = {"first": values[0], "last": values[-1], "lowest": min(values), "highest": max(values)}
        found[name] = {key: round(value, 3) for key, value in ends.items()} | {"per_1000_attacks": line}
    return found
