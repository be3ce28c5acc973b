"""The study of Omniglot's small sets: its images, its floor, a run that goes on, and its page."""

import json
import os

import jax
import numpy as np
import pytest

from experiments import common
from experiments.report import omniglot as report
from experiments.studies import _omniglot_small, classification, omniglot
from lft_jax.tasks import classification_family

RNG = np.random.default_rng(0)
needs_shared = pytest.mark.skipif("LFT_SHARED_DIR" not in os.environ, reason="LFT_SHARED_DIR is not set")


def drawings(images):
    return {np.asarray(image).tobytes() for image in images}


@needs_shared
def test_splits_share_no_drawing_and_no_rotated_one():
    train, validation, test = (_omniglot_small.load(split) for split in ("train", "validation", "test"))
    assert (train.num_classes, validation.num_classes, test.num_classes) == (4 * 68, 18, 156)
    assert all(set(np.bincount(source.labels)) == {20} for source in (train, validation, test))
    unseen = drawings([*validation.images, *test.images])
    assert not drawings(train.images) & unseen
    assert not any(drawings(np.rot90(train.images[train.labels % 4 == 0], k, (1, 2))) & unseen for k in range(4))
    assert len(drawings(train.images)) == len(train.images)
    assert [len(characters) for characters in _omniglot_small.shared_characters()] == [50, 50]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Seven and three characters of 20 drawings, of which the last two and the first two are the same."""
    images = RNG.integers(0, 256, (8 * 20, 5, 5, 1)).astype(np.uint8)
    labels = np.repeat(np.arange(8, dtype=np.int32), 20)
    (tmp_path / "omniglot_small").mkdir()
    for name, kept in (("small1", labels < 7), ("small2", labels >= 5)):
        first = labels[kept].min()
        np.savez(tmp_path / "omniglot_small" / f"{name}.npz", images=images[kept], labels=labels[kept] - first)
    monkeypatch.setenv("LFT_SHARED_DIR", str(tmp_path))
    return images


def test_shared_characters_are_left_out_and_the_others_rotated(toy):
    shared = _omniglot_small.shared_characters()
    assert [list(labels) for labels in shared] == [[5, 6], [0, 1]]
    train = _omniglot_small.load("train")
    assert train.num_classes == 4 * 4  # of five characters the first is for validation
    for label in range(16):
        drawn = toy[20 * (1 + label // 4) :][:20]
        turned = [np.rot90(image, label % 4) for image in drawn]
        np.testing.assert_array_equal(train.images[train.labels == label], turned)
    np.testing.assert_array_equal(_omniglot_small.load("validation").images, toy[:20])
    np.testing.assert_array_equal(_omniglot_small.load("test").images, toy[100:])


def test_missing_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LFT_SHARED_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"LFT_SHARED_DIR: there is no file .*small1.npz"):
        _omniglot_small.load("train")
    monkeypatch.delenv("LFT_SHARED_DIR")
    with pytest.raises(ValueError, match="LFT_SHARED_DIR must be set"):
        _omniglot_small.load("train")
    with pytest.raises(ValueError, match="split: unknown name 'tests'"):
        _omniglot_small.load("tests")


def test_nearest_centroids_are_those_of_pixels():
    images, labels = RNG.uniform(size=(60, 4, 4, 1)).astype(np.float32), np.arange(60) % 5
    family = classification_family(images, labels, ways=4, shots=3, query_shots=5, architecture="linear")
    keys, expected = common.task_keys(3), []
    draw = jax.jit(lambda key: family.sample(jax.random.split(key, 3)[0]))  # the tasks that fine-tuning has
    for key in keys:
        support, query = jax.tree.map(np.asarray, draw(key))
        centroids = [np.mean(support.images[support.labels == label], 0, dtype=np.float64) for label in range(4)]
        nearest = [np.argmin([np.sum((image - c) ** 2) for c in centroids]) for image in query.images]
        expected.append(np.mean(nearest == query.labels))
    np.testing.assert_allclose(omniglot._centroid_accuracies(family, keys), expected)


@pytest.mark.standard_promotion
def test_a_run_goes_on_where_it_stopped(toy, tmp_path, monkeypatch):
    del toy
    monkeypatch.setattr(classification, "_SCANNED", 1)
    grids = {name: settings[:1] for name, settings in classification.GRIDS.items()}
    monkeypatch.setattr(classification, "GRIDS", grids)
    monkeypatch.setattr(omniglot, "LENGTHS", (1, 2))
    monkeypatch.setattr(_omniglot_small, "_VALIDATION", 2)  # three characters, as for tests: they share programs
    options = {"congruous": "omniglot_small:4:mlp:2", "incongruous": (), "initializations": ("maml",), "seeds": (0,)}
    options |= {"meta_steps": 1, "rule_meta_steps": 1, "tasks": 1, "num_tasks": 2, "validation_tasks": 2}
    options |= {"ways": 2, "shots": (1,), "num_steps": 2, "familiar_tasks": 2, "workdir": str(tmp_path / "runs")}
    flags = omniglot.Config(output=str(tmp_path / "o.json"), **options)
    found = omniglot.omniglot(flags)
    results = json.loads((tmp_path / "o.json").read_text())
    assert results == json.loads(json.dumps(found))
    rows = {row["method"]: row for row in results["rows"]}
    assert rows.keys() == {"sgd", "adam", "lft", "maml"}
    assert all(len(row["familiar_accuracy"]) == len(row["validation_accuracy"]) == 2 for row in rows.values())
    assert "runs" not in json.dumps(results["flags"]) and str(tmp_path / "runs") not in json.dumps(results)
    text = report.omniglot_section(results, "results/o.json", "../o")
    assert f"| maml | {100 * rows['maml']['familiar_accuracy'][0]:.1f} ± " in text
    assert (tmp_path / "o.png").stat().st_size > 10_000

    # Without its last row, only that is measured again, from the stored parameters.
    del results["rows"][-1]
    provenance = {**results["provenance"], "commit": "before"}
    (tmp_path / "o.json").write_text(json.dumps({**results, "provenance": provenance}))
    monkeypatch.setattr(common.checkpoints, "save_tree", None)
    again = json.loads(json.dumps(omniglot.omniglot(flags)))
    assert again["rows"] == json.loads(json.dumps(found["rows"]))
    [resumed] = again["provenance"].pop("resumed_at_commits")
    assert resumed.startswith(results["provenance"]["commit"][:12])  # the working tree may change meanwhile
    assert again["provenance"] == provenance and again["lengths"] == results["lengths"]


def result(test, familiar, held_out):
    row = {"shots": 1, "part": "congruous", "case": "omniglot_small:28:conv4_strided:16", "method": "maml"}
    row |= {"seed_accuracy": [test, test], "accuracy": [0.5, test], "accuracy_interval": [0.02, 0.01]}
    row |= {"familiar_accuracy": [familiar, 0.02], "validation_accuracy": [held_out, 0.03]}
    return row | {"difference_to_sgd": [0.1, 0.01], "difference_to_adam": [0.1, 0.01], "settings_tried": 2}


def test_the_page_says_what_is_lost_on_new_characters():
    flags = {"congruous": "omniglot_small:28:conv4_strided:16", "incongruous": [], "ways": 5, "shots": [1]}
    flags |= {"num_tasks": 600, "seeds": [0, 1], "meta_steps": 1000, "rule_meta_steps": 200, "tasks": 4}
    flags |= {"maml_steps": 1, "num_steps": 2, "familiar_tasks": 50, "initializations": ["maml", "anil"]}
    provenance = {"command": "python -m experiments.studies.omniglot", "commit": "abc", "device": "1 x cpu"}
    centroids = {"shots": 1, "test_accuracy": [0.6, 0.01], "familiar_accuracy": [0.62, 0.01]}
    centroids |= {"validation_accuracy": [0.61, 0.01]}
    results = {"flags": flags, "rows": [result(0.8, 0.9, 0.85)], "centroids": [centroids], "provenance": provenance}
    text = report.omniglot_section(results, "results/omniglot.json", "../omniglot")
    assert "| maml | 90.0 ± 2.0 | 85.0 ± 3.0 | 80.0 ± 1.0 | +10.0 | 98.7 ± 0.4 (arXiv 1703.03400) |" in text
    assert "| nearest centroid of pixels | 62.0 ± 1.0 | 61.0 ± 1.0 | 60.0 ± 1.0 | +2.0 |  |" in text
    assert "MAML has 80.0 on test characters, published are 98.7. Of these 18.7 points, 8.7 are missing" in text
    assert "already (90.0)" in text and "The other 10.0 lie between" in text
    assert "lose 2.0 (nearest centroid of pixels) there" in text and "; 8.0 to 8.0 points are left" in text
    assert "instead of 1,000 of 4" in text and "Longer meta-training" not in text
    lengths = [{**centroids, "meta_steps": 250}, {**centroids, "meta_steps": 4000, "familiar_accuracy": [0.7, 0.01]}]
    longer = report.omniglot_section({**results, "lengths": lengths}, "results/omniglot.json", "../omniglot")
    assert "from 250 to 4,000 meta-steps MAML gains +8.0 points on characters of its meta-training, +0.0 on" in longer
    assert "| 4,000 | 70.0 ± 1.0 | 61.0 ± 1.0 | 60.0 ± 1.0 |" in longer
    assert f"**Not measured yet**: 1-shot, congruous, `{flags['congruous']}`: sgd, adam, lft, anil." in text
    results["flags"] = {**flags, "initializations": ["maml"]}
    results["rows"] += [{**result(0.8, 0.9, 0.85), "method": name} for name in ("sgd", "adam", "lft")]
    assert "Not measured yet" not in report.omniglot_section(results, "results/omniglot.json", "../omniglot")
