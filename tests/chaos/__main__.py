"""Kills a small meta-training run at random moments, resumes it and compares its numbers: `make chaos`.

The counts go into a JSON file; the exit code is 1 if a run did not go on with the same numbers.
"""

import argparse
import contextlib
import functools
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.quick import XLA_FLAGS


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", default="", help="JSON file for the counts; none if empty")
    given = parser.parse_args(arguments)
    # Before JAX is imported. Numbers do not matter, time does: programs are compiled in a fraction of it.
    os.environ.update(JAX_PLATFORMS="cpu", OPENBLAS_NUM_THREADS="1", XLA_FLAGS=XLA_FLAGS)
    from tests.chaos import harness

    gc.collect()
    gc.freeze()  # or each fork would look through all that has been imported
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        chaos = harness.Chaos(Path(folder), given.seed, functools.partial(print, flush=True))
        chaos.reference()
        with contextlib.suppress(KeyboardInterrupt):
            chaos.until(given.kills)
        report = chaos.report()
    report["seconds"] = round(time.perf_counter() - began, 1)
    for phase, counts in report["by_phase"].items():
        print(f"{phase:12} {counts['tried']:5d} kills {counts['survived']:5d} survived")
    print(
        f"{report['kills']['tried']} kills, {report['kills']['survived']} survived, {report['runs']['completed']} runs"
    )
    print(f"{report['cpu_seconds']:.0f} s of CPU, {len(report['findings'])} findings")
    if given.output:
        from lft_jax.cli import provenance

        provenance.write_json(given.output, {**report, "provenance": provenance.describe([given.seed])})
    return 1 if report["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
