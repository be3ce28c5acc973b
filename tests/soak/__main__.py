"""Attacks many models and meta-trains in one process, and measures what it holds: `make soak`.

Models come and go: closures and objects that need programs of their own, modules that share programs, host models.
Beside them a meta-training run is resumed and saved again and again. After a warm-up, memory, compiled programs, file
descriptors, threads, and models that were deleted and are still in memory, are counted every few attacks. The slopes go
into a JSON file; the exit code is 1 if something grows without bound.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.quick import XLA_FLAGS

#: Attacks between samples, evaluations, restarts of the meta-training, and new victims of it.
SAMPLED, EVALUATED, TRAINED, RENEWED = 10, 20, 25, 200
#: On a machine that is too slow, the soak ends after so many times `--minutes`, with fewer attacks.
LATEST = 1.5
#: Highest lower ends of the slopes' intervals per 1,000 attacks; "models" is the highest number of them.
LIMITS = {"rss": 50.0, "arrays": 0.5, "programs": 50.0, "descriptors": 1.0, "threads": 1.0, "models": 40}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--attacks", type=int, default=1000, help="number of attacks")
    parser.add_argument("--minutes", type=float, default=30.0, help="over which the attacks are spread")
    parser.add_argument("--warm_up", type=float, default=0.3, help="share of the attacks before the first sample")
    parser.add_argument("--seed", type=int, default=0, help="of models and images")
    parser.add_argument("--output", default="", help="JSON file for the slopes; none if empty")
    given = parser.parse_args(arguments)
    # Before JAX is imported. Numbers do not matter, time does.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
    from lft_jax.cli import provenance
    from tests.soak import measure, work

    began, cpu = time.perf_counter(), time.process_time()
    origin, attacks, samples, report = provenance.describe([given.seed]), [], [], {"findings": ["no samples"]}
    with tempfile.TemporaryDirectory() as folder:
        soak = work.Soak(Path(folder), given.seed)
        latest = began + 60 * given.minutes * LATEST if given.minutes else float("inf")
        while soak.number < given.attacks and time.perf_counter() < latest:
            time.sleep(max(0, began + 60 * given.minutes * soak.number / given.attacks - time.perf_counter()))
            soak.attack()
            for every, do in ((RENEWED, soak.renew), (TRAINED, soak.train), (EVALUATED, soak.evaluate)):
                if soak.number % every == 0:
                    do()
            if soak.number % SAMPLED or soak.number < given.warm_up * given.attacks:
                continue
            samples.append(measure.sample() | {"models": soak.alive()})
            attacks.append(soak.number)
            print(soak.number, *(f"{name} {value:.6g}" for name, value in samples[-1].items()), flush=True)
            if len(samples) < 3:
                continue
            report = {
                "attacks": soak.number,
                "attacks_asked": given.attacks,
                "meta_steps": soak.meta_steps,  # and as many checkpoints
                "seconds": round(time.perf_counter() - began, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "warm_up_attacks": attacks[0],
                "quantities": (quantities := measure.slopes(attacks, samples)),
                "findings": findings(quantities),
                "series": {"attacks": attacks} | {n: [round(one[n], 3) for one in samples] for n in samples[0]},
                "provenance": origin,
            }
            if given.output:  # of a soak that is killed too
                provenance.write_json(given.output, report)
    for name, found in report.get("quantities", {}).items():
        line = found["per_1000_attacks"]
        print(
            f"{name:12} {found['first']:9.1f} to {found['last']:9.1f}; {line['slope']:+8.2f} per 1,000 attacks", end=""
        )
        print(f" ({line['low']:+.2f} to {line['high']:+.2f})")
    seconds = time.perf_counter() - began
    print(f"{soak.number} attacks and {soak.meta_steps} meta-steps in {seconds:.0f} s,", *report["findings"])
    return 1 if report["findings"] else 0


def findings(quantities):
    """What grows without bound, in words."""
    found = []
    for name, limit in LIMITS.items():
        if name == "models":
            if quantities[name]["highest"] > limit:
                found.append(f"{quantities[name]['highest']:.0f} deleted models are in memory, more than {limit}")
        elif (low := quantities[name]["per_1000_attacks"]["low"]) > limit:
            found.append(f"{name} grows by at least {low:.1f} in 1,000 attacks, more than {limit}")
    return found


if __name__ == "__main__":
    sys.exit(main())
