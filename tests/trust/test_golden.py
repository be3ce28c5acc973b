"""The same seed has the same numbers; other precisions and versions have them within tolerances."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.trust import golden

ROOT = Path(__file__).parents[2]
STORED = json.loads((ROOT / "tests" / "trust" / "golden.json").read_text(encoding="utf-8"))
#: Relative, of each list of numbers, between versions of Python and JAX, and between single and double precision.
VERSIONS, PRECISIONS = {"float32": 1e-4, "float64": 1e-9}, 1e-3


def assert_close(found, expected, tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    if isinstance(found, dict):
        for name in found:
            assert_close(found[name], expected[name], tolerance)
    else:
        size = np.max(np.abs(np.hstack([np.ravel(x) for x in jax.tree.leaves(expected)])))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size), found, expected)


@pytest.fixture(scope="module")
def single():
    return golden.values(np.float32)


def test_single_precision_is_that_of_all_versions(single):
    assert_close(single, STORED["float32"], VERSIONS["float32"])


@pytest.mark.slow
def test_double_precision_is_that_of_all_versions(x64):
    assert_close(golden.values(np.float64), STORED["float64"], VERSIONS["float64"])


@pytest.mark.parametrize("part", ["fixed", "shipped"])
def test_single_and_double_precision_agree(part):
    assert_close(STORED["float32"][part], STORED["float64"][part], PRECISIONS)


@pytest.mark.slow
def test_the_same_seed_has_the_same_numbers_in_another_process(single, tmp_path):
    command = [sys.executable, "-m", "tests.trust.golden", "--single", f"--output={tmp_path / 'found.json'}"]
    subprocess.run(command, cwd=ROOT, check=True)
    assert json.loads((tmp_path / "found.json").read_text()) == {"float32": json.loads(json.dumps(single))}
