"""The measures of a soak, and a short form of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.soak import __main__ as soak
from tests.soak import measure


def test_the_slope_and_its_interval_are_those_of_textbooks():
    x, y = np.asarray([1.0, 2, 3, 5]), np.asarray([2.0, 2.5, 4, 5])
    design = np.stack([np.ones(4), x], 1)
    solution, (squares,), *_ = np.linalg.lstsq(design, y, rcond=None)
    error = np.sqrt(squares / 2 * np.linalg.inv(design.T @ design)[1, 1])
    found = measure.slope(x, y)
    half = 4.302653 * error  # the 97.5% quantile of Student's t with 2 degrees of freedom
    np.testing.assert_allclose(list(found.values()), [solution[1], solution[1] - half, solution[1] + half], rtol=1e-6)
    assert measure.slope([1, 2, 3], [4, 4, 4]) == {"slope": 0, "low": 0, "high": 0}
    with pytest.raises(ValueError, match="at least 3 points, got 2"):
        measure.slope([1, 2], [1, 2])


def test_the_interval_covers_the_slope_that_made_the_points():
    rng, x = np.random.default_rng(0), np.arange(20)
    found = [measure.slope(x, 0.5 * x + rng.normal(size=20)) for _ in range(1000)]
    assert 0.93 < np.mean([one["low"] < 0.5 < one["high"] for one in found]) < 0.97


def test_a_sample_sees_arrays_files_and_programs(tmp_path):
    before = measure.sample()
    array = jnp.zeros(2**18) + 1
    with open(tmp_path / "file", "w"):
        during = measure.sample()
    assert during["arrays"] == pytest.approx(before["arrays"] + 1, abs=1e-6)  # MiB
    assert during["descriptors"] == before["descriptors"] + 1
    assert during["programs"] > before["programs"] and during["rss"] > 100 and during["threads"] >= 1
    del array
    after = measure.sample()
    assert after["arrays"] == pytest.approx(before["arrays"], abs=1e-6)
    assert after["descriptors"] == before["descriptors"]


def quantities(**slopes):
    samples = [{name: 20.0 for name in soak.LIMITS} for _ in range(5)]
    for name, slope in slopes.items():
        for number, one in enumerate(samples):
            one[name] += slope * number / 100 + (-1) ** number * 1e-3
    return measure.slopes(range(0, 50, 10), samples)


def test_what_grows_is_a_finding():
    assert soak.findings(quantities()) == [] == soak.findings(quantities(rss=20, programs=-500))
    assert soak.findings(quantities(rss=100)) == ["rss grows by at least 99.9 in 1,000 attacks, more than 50.0"]
    assert len(soak.findings(quantities(descriptors=5, threads=5))) == 2
    assert soak.findings(quantities(models=1e4)) == ["420 deleted models are in memory, more than 40"]


@pytest.mark.slow
@pytest.mark.standard_promotion  # Adam of optax
def test_a_short_soak(tmp_path, capfd):
    """All but the slopes, which have no warm-up here."""
    soak.main(["--attacks=40", "--minutes=0", "--warm_up=0", f"--output={tmp_path / 'soak.json'}"])
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["attacks"] == 40 and found["meta_steps"] == 2 and len(found["series"]["attacks"]) == 4
    assert found["quantities"]["models"]["highest"] <= soak.LIMITS["models"]
    assert found["quantities"]["descriptors"]["last"] <= found["quantities"]["descriptors"]["first"] + 2
    assert "40 attacks and 2 meta-steps" in capfd.readouterr().out
