"""Properties in full: 200 cases of each, where `make test` has a few.

    python -m tests.trust.properties --output=results/properties.json

The tests are those of this folder that are marked by `for_all`. Cases are counted when they have held.
"""

import argparse
import os
import sys
import time
from pathlib import Path

CASES = 200  # the least of each property, with each of its parameters


class _Outcomes:
    """A plugin of pytest that runs tests of properties alone, and keeps those that fail."""

    def __init__(self):
        self.names, self.failed = [], []

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if hasattr(item.function, "hypothesis")]
        self.names = list(dict.fromkeys(item.function.__name__ for item in items))

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.trust.properties", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=CASES, help="of each property, with each of its parameters")
    parser.add_argument("--output", default="", help="JSON file for the counts; none if empty")
    given = parser.parse_args(arguments)
    os.environ["LFT_TRUST_CASES"] = str(given.cases)  # before the tests are imported
    import pytest

    began, outcomes = time.perf_counter(), _Outcomes()
    pytest.main(["-q", "-n", "0", "--durations=10", str(Path(__file__).parent)], plugins=[outcomes])
    from tests.trust.cases import HELD

    found = {}
    for name in outcomes.names:
        counts = [count for (held, _), count in HELD.items() if held == name]
        failures = sum(f"::{name}" in test for test in outcomes.failed)
        found[name.removeprefix("test_").replace("_", " ")] = {
            "cases": sum(counts),
            "variants": len(counts),
            "least": min(counts, default=0),
            "failures": failures,
        }
    total = sum(entry["cases"] for entry in found.values())
    short = [name for name, entry in found.items() if entry["least"] < given.cases]
    print(f"{len(found)} properties, {total} cases held, {len(outcomes.failed)} failures; too few cases of {short}")
    if given.output:
        from lft_jax.cli import provenance

        content = {
            "cases": total,
            "failures": len(outcomes.failed),
            "least": min((entry["least"] for entry in found.values()), default=0),
            "properties": found,
            "failed": outcomes.failed,
            "seconds": round(time.perf_counter() - began, 1),
            "provenance": provenance.describe([]),
        }
        provenance.write_json(given.output, content)
    return 1 if outcomes.failed or short or not found else 0


if __name__ == "__main__":
    sys.exit(main())
