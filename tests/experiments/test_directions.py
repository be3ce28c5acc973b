"""Directions a step: equal queries whatever their number, and a small measurement with its table."""

import json
from pathlib import Path

import pytest

from experiments import common, directions, render
from lft_jax import baselines, evaluation

VICTIM = str(Path(directions.__file__).parents[1] / "victims" / "digits_small_cnn_1000")
SEARCHING = common.TaskConfig(num_directions=6, per_example=True, resolution=4, waves=160)


def test_steps_follow_from_directions_and_nothing_is_left_over():
    family = common.make_target(VICTIM, False, SEARCHING).test
    plain = {count: directions.as_published(family, count) for count in (1, 5, 20)}
    assert {count: directions.num_steps(of, 400) for count, of in plain.items()} == {1: 200, 5: 40, 20: 10}
    assert directions.num_steps(family, 400) == 20  # 160 for a start, then 12 a step
    with pytest.raises(ValueError, match="evaluations: 401"):
        directions.num_steps(plain[5], 401)
    with pytest.raises(ValueError, match="evaluations: 160"):
        directions.num_steps(family, 160)
    of = plain[5]
    assert (of.waves, of.augmentation, of.estimator.per_example, of.estimator.resolution) == (None, None, False, None)


@pytest.mark.standard_promotion
def test_every_method_makes_as_many_queries_with_every_number(tmp_path, monkeypatch):
    def first(baseline, family, keys, **options):
        return evaluation.Tuned(baseline.grid[0], [])

    monkeypatch.setattr(directions.evaluation, "tune", first)
    output = tmp_path / "directions.json"
    directions.measure(
        directions.Config(
            victims=(VICTIM,),
            methods=("sgd",),
            directions=(1, 2),
            evaluations=164,
            num_tasks=2,
            num_validation=1,
            output=str(output),
        )
    )
    results = json.loads(output.read_text())
    rows = results["rows"]
    assert [(row["method"], row["directions"], row["steps"]) for row in rows] == [
        ("sgd", 1, 82),
        ("sgd", 2, 41),
        ("lft", 1, 2),
        ("lft", 2, 1),
    ]
    assert {row["queries"] for row in rows} == {1640.0}  # of ten support images
    assert rows[0]["settings_tried"] == len(baselines.make_baselines("linf")["sgd"].grid)
    assert all(0 <= row["asr"] <= 1 for row in rows)

    document = tmp_path / "results.md"
    document.write_text("<!-- results -->\n<!-- end of results -->\n")
    results["provenance"]["command"] = "python -m experiments.directions"
    output.write_text(json.dumps(results))
    render.render(render.Config(results=(str(output),), document=str(document)))
    assert "| `digits_small_cnn_1000` | lft |" in document.read_text()


def test_a_rule_for_exact_gradients_and_an_unknown_method_are_refused(tmp_path):
    with pytest.raises(ValueError, match="learned: uap-linf was meta-trained on exact gradients"):
        directions.measure(directions.Config(learned="uap-linf", output=str(tmp_path / "x.json")))
    with pytest.raises(ValueError, match="methods"):
        directions.measure(directions.Config(methods=("newton",), output=str(tmp_path / "x.json")))
