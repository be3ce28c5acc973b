"""The study that learns the tile, with small models in place of the public ones, and its page."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.report.tile import tile_section
from experiments.studies import attacked, public_models
from experiments.studies import tile as study
from lft_jax import models
from lft_jax._files import load_arrays
from lft_jax.tasks import tile as tiles

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 64, 64, 3), np.uint8)
EPSILON = 0.04


def logits(weights, x):
    """Differences of neighbours along rows: a pattern that alternates along columns decides."""
    return jnp.mean(x[:, :, ::2] - x[:, :, 1::2], (1, 2)) @ weights


LABELS = np.asarray(logits(np.eye(3, dtype=np.float32), IMAGES / np.float32(255))).argmax(1).astype(np.int32)


@pytest.fixture
def small(monkeypatch, tmp_path):
    images = public_models.PublicImages(IMAGES[:6], LABELS[:6], IMAGES[6:], LABELS[6:])

    def model(role):
        return public_models.PublicModel(role, "imagenet_sample", EPSILON, logits, lambda: 10 * np.eye(3), {})

    roles = {"learner": "training", "other": "choosing"}
    monkeypatch.setattr(public_models, "MODELS", {name: model(role) for name, role in roles.items()})
    monkeypatch.setattr(public_models, "load_images", lambda *args, **kwargs: images)
    monkeypatch.setattr(tiles, "PATH", tmp_path / "shipped.safetensors")
    return study.Config("learner", steps=3, judged=("other",), output=str(tmp_path / "tile.json"))


def test_it_learns_judges_and_ships_a_tile(small, tmp_path):
    study.learn(dataclasses.replace(small, ship=True))
    results = json.loads(Path(small.output).read_text(encoding="utf-8"))
    assert [(row["model"], row["role"], row["period"]) for row in results["rows"]] == [
        ("learner", "training", 32),
        ("other", "choosing", 32),
    ]
    like = {"tile": jax.ShapeDtypeStruct((32, 32, 3), np.float32)}
    tile = np.asarray(load_arrays(tmp_path / "shipped.safetensors", like)["tile"])
    assert 0 < np.abs(tile).max() <= 1 + 1e-6
    # What was shipped is what was judged: with it, the model errs as the row says.
    model = models.from_function(lambda x: logits(np.eye(3, dtype=np.float32), x))
    after = attacked.classes(model, IMAGES[6:], EPSILON * np.tile(tile, (2, 2, 1)))
    assert results["rows"][1]["asr"] == np.mean(after != LABELS[6:]) > 0
    card = json.loads((tmp_path / "shipped.json").read_text(encoding="utf-8"))
    shown = [{name: value for name, value in row.items() if name != "commit"} for row in results["rows"]]
    assert card["learned_on"] == "learner" and card["without_steps"] == shown


def test_another_period_is_a_row_of_its_own_and_a_second_run_takes_the_place_of_the_first(small):
    for period in (32, 8, 8):
        study.learn(dataclasses.replace(small, period=period))
    rows = json.loads(Path(small.output).read_text(encoding="utf-8"))["rows"]
    assert [row["period"] for row in rows] == [32, 32, 8, 8]
    text = tile_section(json.loads(Path(small.output).read_text(encoding="utf-8")), small.output, "")
    table = [line for line in text.splitlines() if line.startswith("| learner |")]
    assert [line.split(" | ")[2] for line in table] == ["8", "32"]
    assert f"{100 * rows[1]['asr']:.1f}" in table[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "model: other is for choosing"),
        ({"model": "none"}, "model: unknown name"),
        ({"period": 0}, "period"),
        ({"period": 16, "ship": True}, "period: a tile that ships has 32 pixels, got 16"),
    ],
)
def test_it_refuses(small, changes, message):
    with pytest.raises(ValueError, match=message):
        study.learn(dataclasses.replace(small, **changes))
