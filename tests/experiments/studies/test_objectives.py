"""The study of outer losses: a run at a small size, its summary and its page."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.report.objectives import objectives_section
from experiments.studies import objectives


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_small_study_resumes_to_the_same_results(tmp_path):
    flags = objectives.Config(
        models=("digits_small_cnn_1000",),
        victims=("victims/mnist_small_cnn_0", "victims/mnist_lenet_4"),
        seeds=1,
        meta_steps=2,
        steps=2,
        draws=2,
        queries=50,
        workdir=str(tmp_path / "runs"),
        output=str(tmp_path / "found.json"),
    )
    whole = objectives.measure(flags)
    assert {(row["learner"], len(row["draw_asr"])) for row in whole["rows"]} == {
        ("lft", 2),
        ("l2o", 2),
        ("untrained", 2),
    }
    kept = json.loads((tmp_path / "found.json").read_text())
    kept["rows"] = kept["rows"][:1]
    (tmp_path / "found.json").write_text(json.dumps(kept))
    assert objectives.measure(flags)["rows"] == whole["rows"]
    with pytest.raises(ValueError, match=r"output: .* has results of"):
        objectives.measure(dataclasses.replace(flags, meta_steps=3))


ROWS = [
    {"model": "toy", "learner": name, "seed": seed, "draw_asr": asr}
    for name, seeds in {
        "lft": ([0.6, 0.8], [0.5, 0.7]),
        "l2o": ([0.5, 0.7], [0.5, 0.7]),
        "untrained": ([0.1, 0.4], [0.3, 0.4]),
    }.items()
    for seed, asr in enumerate(seeds)
]


def test_differences_are_paired_by_draw_and_averaged_over_seeds():
    found = objectives.summary(ROWS, "toy")
    np.testing.assert_allclose(found["lft"]["seed_asr"], [0.7, 0.6])
    np.testing.assert_allclose(found["lft"]["asr"], 0.65)
    # Draw 0: 0.55 and 0.2; draw 1: 0.75 and 0.4. The differences of both are 0.35.
    np.testing.assert_allclose(
        [found["lft minus untrained"][name] for name in ("asr", "interval")], [0.35, 0], atol=1e-9
    )
    np.testing.assert_allclose(found["lft minus l2o"]["seed_asr"], [0.1, 0], atol=1e-9)


def test_the_page_has_a_row_for_each_model():
    flags = {"seeds": 2, "meta_steps": 3, "victims": ["victims/a", "victims/b"], "draws": 2, "images": 10, "steps": 20}
    results = {"flags": flags, "rows": ROWS, "models": [objectives.summary(ROWS, "toy")]}
    results["provenance"] = {
        "command": "python -m experiments.studies.objectives",
        "commit": "abc",
        "device": "1 x cpu",
    }
    text = objectives_section(results, "results/public/objectives.json", "../objectives")
    assert "| `toy` | 65.0 ± 127.1 (70.0, 60.0) | 60.0 ± 127.1 (60.0, 60.0) |" in text
    assert "| +35.0 ± 0.0 (+45.0, +25.0) |" in text and "`a`, `b`." in text
