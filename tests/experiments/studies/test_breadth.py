"""A rule outside its meta-training: victims with other sizes and class counts, and one small measurement."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.studies import breadth

VICTIMS = Path(breadth.__file__).parents[2] / "victims"
VICTIM = str(VICTIMS / "digits_small_cnn_1000")


def test_case_with_larger_images_and_fewer_classes():
    family = breadth.make_family(breadth.Case("digits", side=24, classes=3, factor=0.5), VICTIM, "test", None)
    assert family.images.shape[1:] == (24, 24, 1)
    assert set(np.asarray(family.labels).tolist()) == {0, 1, 2}
    assert float(family.constraint.epsilon) == pytest.approx(0.5 * breadth.RADII["digits"])
    assert family.logits_fn(family.images[:5]).shape == (5, 3)
    assert np.mean(np.argmax(family.logits_fn(family.images), 1) == family.labels) > 0.9


@pytest.mark.standard_promotion
def test_results_have_a_row_per_case(tmp_path, monkeypatch):
    monkeypatch.setattr(breadth, "CASES", (breadth.Case("digits", classes=2, num_steps=2),))
    monkeypatch.setattr(breadth.evaluation, "tune", lambda baseline, *args, **kwargs: Tuned(baseline.grid[0]))
    output = tmp_path / "breadth.json"
    breadth.measure(breadth.Config(num_tasks=2, num_validation=1, victims=str(VICTIMS), output=str(output)))
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["victim"], row["image_shape"], row["classes"]) == ("digits_small_cnn_1000", [8, 8, 1], 2)
    assert list(row["methods"]) == ["pgd (untuned)", "pgd", "the rule's base update, augmented", "spatial-linf"]
    assert all(0 <= method["asr"] <= 1 for method in row["methods"].values())
    assert row["methods"]["pgd"]["difference_to_tuned_pgd"] == [0, 0]


class Tuned:
    """The result of a tuning that was skipped."""

    def __init__(self, setting):
        self.setting = setting
