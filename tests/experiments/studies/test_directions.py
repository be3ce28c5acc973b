"""Numbers of directions per step: equal total queries, and a small measurement with its table."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import common
from experiments.report import render
from experiments.studies import directions
from lft_jax.data import load_source
from lft_jax.evaluation import baselines, comparison, metrics

VICTIM = str(Path(directions.__file__).parents[2] / "victims" / "digits_small_cnn_1000")
SEARCHING = common.TaskConfig(num_directions=6, per_example=True, resolution=4, waves=160)


def test_num_steps_follows_from_directions_without_remainder():
    family = common.make_target(VICTIM, False, SEARCHING).test
    plain = {count: comparison.as_published(family, count) for count in (1, 5, 20)}
    assert {count: directions.num_steps(of, 400) for count, of in plain.items()} == {1: 200, 5: 40, 20: 10}
    assert directions.num_steps(family, 400) == 20  # 160 for the start, then 12 per step
    with pytest.raises(ValueError, match="evaluations: 401"):
        directions.num_steps(plain[5], 401)
    with pytest.raises(ValueError, match="evaluations: 160"):
        directions.num_steps(family, 160)
    of = plain[5]
    assert (of.recipe.search, of.recipe.augmentation, of.estimator.per_example, of.estimator.resolution) == (
        None,
        None,
        False,
        None,
    )


@pytest.mark.standard_promotion
def test_all_methods_make_equal_queries(tmp_path, monkeypatch):
    tuned = []

    def first(baseline, family, keys, **options):
        tuned.append((family, keys, options["num_steps"]))
        return metrics.Tuned(baseline.grid[0], [])

    monkeypatch.setattr(directions.evaluation, "tune", first)
    output = tmp_path / "directions.json"
    flags = directions.Config(
        victims=(VICTIM,),
        methods=("sgd",),
        directions=(2,),
        evaluations=164,
        num_tasks=2,
        num_validation=1,
        output=str(output),
    )
    directions.measure(flags)
    results = json.loads(output.read_text())
    rows = results["rows"]
    assert [(row["method"], row["directions"], row["steps"]) for row in rows] == [
        ("sgd", 2, 41),
        ("sgd, augmented", 2, 1),
        ("lft", 2, 1),
    ]
    assert {row["queries"] for row in rows} == {1640.0}  # 164 evaluations of ten support images
    assert rows[0]["settings_tried"] == len(baselines.make_baselines("linf")["sgd"].grid)
    assert all(0 <= row["asr"] <= 1 and not row["seen_victim"] and row["epsilon"] == 0.25 for row in rows)
    # Tuned on validation images with the steps of the test: as published, then with the tasks of the learned rule.
    validation = load_source("digits", "validation").images
    assert [steps for _, _, steps in tuned] == [41, 1]
    for published, (family, keys, _) in zip((True, False), tuned, strict=True):
        assert len(keys) == 1 and np.array_equal(family.images, validation)
        assert (family.recipe.search is None, family.recipe.augmentation is None) == (published, published)

    document = tmp_path / "results.md"
    document.write_text("<!-- results -->\n<!-- end of results -->\n")
    results["provenance"]["command"] = "python -m experiments.studies.directions"
    output.write_text(json.dumps(results))
    render.render(render.Config(results=(str(output),), document=str(document)))
    cell = f"{100 * rows[-1]['asr']:.1f} ± {100 * rows[-1]['interval']:.1f} (1)"
    assert f"| `digits_small_cnn_1000` | lft | {cell} |\n" in document.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learned": "uap-linf"}, "learned: uap-linf was meta-trained on exact gradients"),
        ({"methods": ("newton",)}, "methods"),
        ({"directions": (5, 0)}, "directions must be"),
        ({"num_tasks": 1}, "num_tasks must be"),
        ({"directions": (5, 25)}, "evaluations: 400 minus 160 for the start is not a positive multiple of 50"),
    ],
)
def test_invalid_flags_are_refused_before_tuning(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(directions.evaluation, "tune", None)  # fails if anything is tuned
    with pytest.raises(ValueError, match=message):
        directions.measure(directions.Config(victims=(VICTIM,), output=str(tmp_path / "x.json"), **changes))
