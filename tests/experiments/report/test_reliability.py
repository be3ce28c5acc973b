"""Tables of what `make trust` merged: numbers of each part, and parts that are missing or failed."""

import copy
import re

import pytest

from experiments.report.reliability import PARTS, reliability_section

ORIGIN = {
    "state": "passed",
    "exit_code": 0,
    "command": "python -m x.__main__",
    "commit": "ab",
    "device": "cpu",
    "date": "2026-01-02",
}
END = "| `python -m x` | ab | 2026-01-02 |"
LINE = {"slope": 1.26, "low": -0.5, "high": 3.0}
ENDS = {"first": 700.0, "last": 1701.25, "lowest": 690.0, "highest": 1710.0, "per_1000_attacks": LINE}
RESULTS = {
    "kills": {
        "kills": {"tried": 1300, "survived": 1299},
        "by_phase": {"save": {"tried": 4, "survived": 3}},
        "bit_equal": True,
        "most_meta_steps_lost": 2,
        "checkpoint_every": 3,
    },
    "properties": {
        "properties": {"balls": {"cases": 200, "failures": 0}, "rates": {"cases": 1000, "failures": 1}},
        "failures": 1,
    },
    "gradients": {
        "cells": 2468,
        "worst": {"error": 2.5e-7},
        "tolerance": 1e-5,
        "failures": 0,
        "refused": {"a": 3, "b": 4},
        "by": {"rule": {"lstm": {"cells": 11, "worst": 2.5e-7}}},
    },
    "fuzz": {
        "inputs": 60,
        "targets": {
            "npy": {"accepted": 1, "refused": 9, "hang": 0, "crash": 1},
            "card": {"accepted": 20, "refused": 29, "hang": 0, "crash": 0},
        },
    },
    "soak": {
        "attacks": 1000,
        "meta_steps": 40,
        "seconds": 1800.0,
        "warm_up_attacks": 300,
        "quantities": {"rss": ENDS, "threads": {**ENDS, "first": 20.0}},
    },
}


@pytest.fixture
def results():
    parts = {name: {**ORIGIN, "results": found} for name, found in RESULTS.items()}
    return copy.deepcopy({"passed": True, "parts": parts})


@pytest.mark.parametrize(
    "line",
    [
        "| runs that are killed | 1,300 kills | 1,299 survived; the numbers of an uninterrupted run, bit for bit; at "
        f"most 2 meta-steps lost of a checkpoint every 3 {END}",
        "| save | 4 | 3 |",
        "| properties | 2 properties, 1,200 cases | 1 failed " + END,
        "| rates | 1,000 | 1 failed |",
        "| meta-gradients | 2,468 cells | worst error 2.5e-07, relative; 0 above 1e-05 " + END,
        "| rule | `lstm` | 11 | 2.5e-07 |",
        "| damaged and hostile files | 60 inputs | 38 refused as documented, 21 harmless, 1 others " + END,
        "| `npy` | 1 | 9 | 0 | 1 |",
        "| load | 1,000 attacks, 40 meta-steps, 30 minutes | memory +1.3 (-0.5 to +3.0) MiB in 1,000 attacks " + END,
        "| resident memory, MiB | 700 | 1,701.2 | 690 | 1,710 | +1.3 (-0.5 to +3.0) |",
        "| threads | 20 | 1,701.2 | 690 | 1,710 | +1.3 (-0.5 to +3.0) |",
    ],
)
def test_the_numbers_of_each_part_are_there(results, line):
    assert line in reliability_section(results, "results/reliability.json").splitlines()


def test_tables_have_as_many_cells_as_their_heads(results):
    text = reliability_section(results, "results/reliability.json")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert re.findall(r"^#+ ", text, re.MULTILINE) == ["### "] * len(PARTS)


def test_missing_and_failed_parts_are_shown(results):
    results["parts"]["soak"] = {"state": "missing", "exit_code": None}
    results["parts"]["fuzz"]["state"] = "failed"
    del results["parts"]["kills"]
    text = reliability_section(results, "results/reliability.json")
    assert "| load | | **missing** | | | |" in text and "Measured: load" not in text
    assert "| runs that are killed | | **missing** | | | |" in text
    assert "| 60 inputs | **failed**: 38 refused" in text and "Measured: damaged" in text
