"""Attacks on a small victim: draws, resumed cells, paired differences, settings, pictures and the ceiling."""

import json
import types

import numpy as np
import pytest

from experiments.studies import attacked, literature, public
from lft_jax.cli import picture

pytestmark = pytest.mark.standard_promotion


def flags(tmp_path, **changes):
    settings = {"methods": ("pgd-plain",), "steps": (2,), "images": (10,), "draws": 2, "reference": "pgd-plain"}
    return public.Config(smoke=True, output=str(tmp_path / "public.json"), **settings | changes)


def measured(config):
    public.measure(config)
    with open(config.output, encoding="utf-8") as file:
        return json.load(file)


def test_classes_take_turns_and_more_images_have_the_fewer_ones_among_them():
    labels = np.repeat(np.arange(5), 6)
    first = public.support_order(labels, 0)
    assert sorted(first) == list(range(30)) and not np.array_equal(first, public.support_order(labels, 1))
    assert all(set(labels[part]) == set(range(5)) for part in np.split(first, 6))
    np.testing.assert_array_equal(first, public.support_order(labels, 0))


def test_cells_are_kept_and_extended(tmp_path, monkeypatch):
    results = measured(flags(tmp_path))
    assert results["about"]["model"] == "digits_small_cnn_1000" and results["clean_accuracy"] > 0.9
    (row,) = results["rows"]
    assert (row["method"], row["steps"], row["images"]) == ("pgd-plain", 2, 10)
    assert len(row["draw_asr"]) == len(row["draw_seconds"]) == 2 and "difference" not in row
    assert 0 < row["asr"] <= 1 and 0 < row["fooling_rate"] <= 1 and row["evaluations"] == 50
    assert row["asr"] == pytest.approx(np.mean(row["draw_asr"]))

    runs, attack = [], public.attack

    def counted(victim, method, steps, count, draw):
        runs.append((steps, count, draw))
        return attack(victim, method, steps, count, draw)

    monkeypatch.setattr(public, "attack", counted)
    more = measured(flags(tmp_path, methods=("pgd-shifts", "pgd-plain"), draws=3))
    assert runs == [(2, 10, 0), (2, 10, 1), (2, 10, 2), (2, 10, 2)]
    again, shifted = more["rows"]
    assert again["draw_asr"][:2] == row["draw_asr"]
    difference = np.subtract(shifted["draw_asr"], again["draw_asr"])
    assert shifted["difference"]["to"] == "pgd-plain" and shifted["difference"]["asr"] == pytest.approx(
        np.mean(difference)
    )

    runs.clear()
    replaced = measured(flags(tmp_path, steps=(1,), again=("pgd-plain",)))["rows"]
    assert [(row["method"], row["steps"]) for row in replaced] == [("pgd-shifts", 2), ("pgd-plain", 1)]
    assert runs == [(1, 10, 0), (1, 10, 1)]


def test_rates_count_images_that_are_right_when_clean(monkeypatch):
    images = types.SimpleNamespace(query=None, query_labels=np.array([0, 1, 2, 3]))
    victim = attacked.Victim({}, None, images, np.array([0, 1, 2, 0]))
    monkeypatch.setattr(attacked, "classes", lambda *_: np.array([0, 0, 0, 3]))
    assert victim.rates(np.zeros(1)) == {"asr": pytest.approx(2 / 3), "fooling_rate": 0.75}


def test_without_images_all_methods_have_synthetic_ones(tmp_path, monkeypatch):
    problems = []

    def method(problem):
        problems.append(problem)
        return literature.Found(np.zeros((8, 8, 1), np.float32), 1, 0.0)

    monkeypatch.setitem(public.METHODS, "none", method)
    (row,) = measured(flags(tmp_path, methods=("none",), images=(0,)))["rows"]
    assert (row["images"], row["asr"]) == (0, 0)
    first, second = problems
    assert first.synthetic and first.images.shape == (30, 8, 8, 1) and first.images.dtype == np.uint8
    assert not np.array_equal(first.images, second.images)
    predicted = first.model(np.float32(first.images) / 255)
    np.testing.assert_array_equal(first.labels, np.argmax(predicted, -1))

    given = {}

    def attack(model, images, labels=None, **options):
        given.update(images=images, labels=labels, shape=options["shape"])
        return types.SimpleNamespace(perturbation=np.zeros((8, 8, 1)), queries=1, seconds=0.0)

    monkeypatch.setattr(public.lft_jax, "universal_perturbation", attack)
    public.Attack()(first)
    assert given == {"images": None, "labels": None, "shape": (8, 8, 1)}


def test_intervals_are_those_of_few_draws():
    mean, width = public.mean_interval([0.4, 0.5, 0.6])
    assert mean == pytest.approx(0.5) and width == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert public.mean_interval([0.5]) == (0.5, None)


def test_settings_of_a_family_are_methods(tmp_path, monkeypatch):
    names = [literature.name_of("sign", method) for method in literature.FAMILIES["sign"][:2]]
    monkeypatch.setitem(literature.FAMILIES, "sign", literature.FAMILIES["sign"][:24:2])
    names = list(literature.settings("sign"))
    config = flags(tmp_path, methods=(), grid=("sign",), steps=(1,), draws=1, reference=names[0])
    rows = measured(config)["rows"]
    assert [row["method"] for row in rows] == names and "difference" in rows[1] and "difference" not in rows[0]
    more = measured(flags(tmp_path, methods=(names[1],), steps=(1,), draws=2, reference=names[0]))["rows"]
    assert [len(row["draw_asr"]) for row in more[:3]] == [1, 2, 1]


def test_perturbations_are_drawn(tmp_path):
    config = flags(tmp_path, methods=(), picture=("pgd-plain", "sign"))
    assert measured(config)["picture"] == ["pgd-plain", "sign"]
    assert (tmp_path / "public_perturbations.png").stat().st_size > 5000


def test_of_large_images_the_corners_of_perturbations_are_drawn_alone(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(picture, "save", lambda figure, path: drawn.append(figure))
    found = {"a": np.full((80, 80, 3), 0.1, np.float32), "b": np.zeros((80, 80, 3), np.float32)}
    found["a"][:, 64:] = -0.1
    public.draw_corners({**found, "c": found["b"], "d": found["b"], "e": -found["a"]}, tmp_path / "x.png")
    axes = [axis for axis in drawn[0].axes if axis.axison]
    assert [axis.get_title() for axis in axes] == ["a", "b", "c", "d", "e"]
    pixels = [axis.get_images()[0].get_array() for axis in axes]
    assert {shown.shape for shown in pixels} == {(64, 64, 3)}
    assert [float(shown.min()) for shown in pixels] == [1, 0.5, 0.5, 0.5, 0]


def test_the_ceiling_is_chosen_on_support_images_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(public, "_TARGETS", 2)
    monkeypatch.setattr(public, "_BATCH", 20)
    config = flags(tmp_path, methods=(), ceiling=True, ceiling_steps=3)
    found = measured(config)["ceiling"]
    runs = found["runs"]
    assert [(run["loss"], run["start"]) for run in runs[:4]] == [
        (loss, start) for loss in ("cross_entropy", "hinge") for start in ("zeros", "tiles")
    ]
    best = max(runs, key=lambda run: run["support_error"])
    assert found["asr"] == best["asr"] and found["evaluations"] == 2 * 20 * 3 * len(runs)
    assert all(run["target"] is not None for run in runs[4:]) and 1 <= len(runs[4:]) <= 2
    monkeypatch.setattr(public, "_long_run", None)  # fails if anything is run again
    assert measured(config)["ceiling"]["runs"] == runs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("newton",)}, "methods: unknown"),
        ({"methods": ("sga step=7",)}, "methods: unknown"),
        ({"picture": ("newton",)}, "picture: unknown"),
        ({"grid": ("newton",)}, "grid: unknown"),
        ({"steps": (0,)}, "steps and images must be"),
        ({"images": (1000,)}, "images must be at most 180"),
        ({"queries": -1}, "queries must be"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        public.measure(flags(tmp_path, **changes))


def test_a_file_of_another_study_is_refused(tmp_path):
    measured(flags(tmp_path, methods=()))
    with pytest.raises(ValueError, match=r"output: .*has results of .*'queries': 179.*expected .*'queries': 50"):
        public.measure(flags(tmp_path, methods=(), queries=50))


def test_names_of_methods_can_be_flags():
    assert not any("," in name for name in public.METHODS)
