"""The study of attacks by queries, on a small victim of the digits."""

import json

import numpy as np
import pytest

from experiments.report import queries
from experiments.studies import _procedural, public_queries
from lft_jax import models

pytestmark = pytest.mark.standard_promotion


def flags(tmp_path, **changes):
    settings = {"model": "digits_small_cnn_1000", "budgets": (40, 200), "draws": 2, "queries": 60, "images": 5}
    return public_queries.Config(output=str(tmp_path / "queries.json"), **settings | changes)


def measured(config):
    public_queries.measure(config)
    with open(config.output, encoding="utf-8") as file:
        return json.load(file)


class Model:
    """A linear classifier that counts its images."""

    def __init__(self, shape=(8, 8, 1)):
        self.weights = np.random.default_rng(0).normal(size=(int(np.prod(shape)), 3)).astype(np.float32)
        self.images = 0

    def __call__(self, images):
        self.images += len(images)
        return np.reshape(images, (len(images), -1)) @ self.weights


@pytest.mark.parametrize("name", public_queries.METHODS)
def test_methods_stay_in_the_ball_and_within_each_budget(name, monkeypatch):
    model, budgets = Model(), (60, 200, 400)
    classifier = models.on_numpy(model)
    monkeypatch.setattr(public_queries, "_logits", lambda _, images: model(images))
    images = np.random.default_rng(1).integers(60, 200, (4, 8, 8, 1)).astype(np.uint8)
    labels = np.argmax(model(images.astype(np.float32) / 255), -1)
    for budget in budgets:
        model.images = 0
        task = public_queries.Task(classifier, images, labels, 0.2, 3)
        found = public_queries.METHODS[name](task, (budget,))
        assert model.images <= budget
        for theta in found.values():
            assert theta.shape == (8, 8, 1) and np.abs(theta).max() <= 0.2 + 1e-6
    assert found.keys() == {400}
    losses = [public_queries.Task.loss(task, theta) for theta in (np.zeros((8, 8, 1), np.float32), found[400])]
    assert losses[1] < losses[0]


def test_the_loss_is_the_clamped_cross_entropy(monkeypatch):
    logits = np.asarray([[0.0, 1.0, -2.0], [50.0, 0.0, 0.0]])
    monkeypatch.setattr(public_queries, "_logits", lambda *_: logits)
    task = public_queries.Task(models.on_numpy(Model()), np.zeros((2, 8, 8, 1), np.uint8), np.asarray([0, 1]), 0.1, 0)
    first = np.log(1 + np.e + np.exp(-2))
    np.testing.assert_allclose(task.loss(np.zeros((8, 8, 1))), -(first + 12) / 2)


@pytest.mark.parametrize("noise", [(_procedural.perlin, 4), (_procedural.gabor, 4)])
def test_procedural_noise_is_of_signs_and_depends_on_its_parameters(noise):
    function, size = noise
    patterns = [function(np.random.default_rng(seed).random(size), (16, 12, 3)) for seed in range(6)]
    assert {pattern.shape for pattern in patterns} == {(16, 12, 1)}
    assert np.all(np.abs(patterns) == 1) and len(np.unique(np.reshape(patterns, (6, -1)), axis=0)) > 3


def test_bayesian_optimisation_finds_a_minimum():
    points = []

    def loss(point):
        points.append(point)
        return float(np.sum((point - 0.3) ** 2))

    _procedural.optimised(loss, 2, 40, np.random.default_rng(0))
    distances = [np.linalg.norm(point - 0.3) for point in points]
    assert len(points) == 40 and min(distances) < 0.1 and np.mean(distances[20:]) < np.mean(distances[:5])


def test_cells_are_kept_and_extended_and_have_a_page(tmp_path):
    config = flags(tmp_path, methods=("tiles", "patterns"), draws=1)
    rows = measured(config)["rows"]
    assert {(row["method"], row["budget"]) for row in rows} == {
        (m, b) for m in ("tiles", "patterns") for b in (40, 200)
    }
    results = measured(flags(tmp_path, methods=("patterns", "tiles"), draws=3))
    for old, new in zip(rows, results["rows"], strict=True):
        assert new["draw_asr"][:1] == old["draw_asr"] and len(new["draw_asr"]) == 3
        np.testing.assert_allclose(new["asr"], np.mean(new["draw_asr"]))
    by = {(row["method"], row["budget"]): row for row in results["rows"]}
    difference = by["patterns", 200]["difference"]
    pairs = np.subtract(by["patterns", 200]["draw_asr"], by["tiles", 200]["draw_asr"])
    np.testing.assert_allclose(difference["asr"], np.mean(pairs))
    text = queries.queries_section(results, str(config.output), "queries")
    assert "| `patterns` |" in text and f"{100 * by['patterns', 200]['asr']:.1f}" in text
    queries.draw_queries(results, tmp_path / "queries.png")
    assert (tmp_path / "queries.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"output: .* has results of"):
        measured(flags(tmp_path, queries=50))
