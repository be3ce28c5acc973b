import json

import numpy as np
import pytest

from experiments.report import sections
from experiments.studies import classification

METHODS = {"sgd", "adam", "lft"}


@pytest.mark.standard_promotion
def test_every_method_is_evaluated_on_its_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(classification, "_SCANNED", 2)
    monkeypatch.setattr(classification, "_MOST_IMAGES", 20)  # equal for validation and test, which then share a program
    flags = classification.Config(
        output=str(tmp_path / "few.json"),
        congruous="digits:4:linear",
        incongruous=("digits:4:linear", "digits:5:linear"),
        ways=3,
        initializations=("maml", "joint"),
        shots=(1,),
        seeds=(0, 1),
        num_steps=2,
        meta_steps=2,
        rule_meta_steps=2,
        tasks=1,
        num_tasks=4,
        validation_tasks=4,
    )
    found = classification.classify(flags)
    results = json.loads((tmp_path / "few.json").read_text())
    assert results["rows"] == json.loads(json.dumps(found["rows"]))
    kinds = dict.fromkeys((row["part"], row["case"]) for row in results["rows"])
    of = {kind: {row["method"]: row for row in results["rows"] if (row["part"], row["case"]) == kind} for kind in kinds}
    assert list(kinds) == [
        ("congruous", "digits:4:linear"),
        ("incongruous", "digits:4:linear"),
        ("incongruous", "digits:5:linear"),
    ]
    for (part, _), rows in of.items():
        assert rows.keys() == METHODS | ({"maml", "joint"} if part == "congruous" else set())
        for method, row in rows.items():
            assert len(row["accuracy"]) == flags.num_steps
            assert all(0 <= x <= 1 for x in row["accuracy"])
            assert len(row["seed_accuracy"]) == (1 if method in ("sgd", "adam") else 2)
            np.testing.assert_allclose(np.mean(row["seed_accuracy"]), row["accuracy"][-1], atol=1e-6)
            expected = row["accuracy"][-1] - rows["sgd"]["accuracy"][-1]
            np.testing.assert_allclose(row["difference_to_sgd"][0], expected, atol=1e-6)
    section = sections.classification_section(results, "results/few.json", "../results/few")
    lft = of["incongruous", "digits:5:linear"]["lft"]
    assert section.count("| lft | ") == 3
    assert f"| lft | {100 * lft['accuracy'][0]:.1f} ± {100 * lft['accuracy_interval'][0]:.1f} | " in section
    assert "one LFT meta-trained on all 2 kinds of tasks together; `digits:5:linear`:" in section
    assert (tmp_path / "few.png").stat().st_size > 10_000


def test_splits_share_no_images_and_have_equal_class_counts():
    train, validation, test, familiar = classification.make_families("digits:8:linear", 1, classification.Config())
    assert [len(family.counts) for family in (train, validation, test, familiar)] == [5, 5, 5, 5]
    images = [{image.tobytes() for image in np.asarray(family.images)} for family in (train, validation, test)]
    np.testing.assert_array_equal(familiar.images, train.images)
    assert not images[0] & images[1] and not images[1] & images[2] and not images[0] & images[2]


@pytest.mark.parametrize("case", ["digits", "digits:8", "digits:eight:linear", "digits:8:mlp:3:4", "digits:8:mlp:-3"])
def test_invalid_cases_are_refused(case):
    with pytest.raises(ValueError, match=f"expected source:size:architecture.:width., got '{case}'"):
        classification.make_families(case, 1, classification.Config())
