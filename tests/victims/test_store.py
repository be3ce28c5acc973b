"""Victims on disk."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax.victims import Victim, build_model, load_victim, save_victim

IMAGES = np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype(np.float32)


def make(architecture="small_cnn", seed=0, num_classes=4):
    model = build_model(architecture, num_classes)
    like = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    generator = np.random.default_rng(seed)
    variables = jax.tree.map(lambda x: jnp.asarray(generator.uniform(0.1, 1, x.shape), x.dtype), dict(like))
    card = {"architecture": architecture, "num_classes": num_classes, "image_shape": [8, 8, 1], "source": "digits"}
    return Victim(variables, card)


@pytest.mark.parametrize("architecture", ["small_cnn", "vgg"])
def test_a_saved_victim_can_be_loaded(tmp_path, architecture):
    victim = make(architecture)
    save_victim(tmp_path / "deep" / "victim", victim)
    loaded = load_victim(tmp_path / "deep" / "victim")
    assert loaded.card == victim.card
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, victim.variables)
    logits: Any = build_model(architecture, 4).apply(victim.variables, IMAGES)
    np.testing.assert_allclose(loaded.logits_fn(IMAGES), logits, rtol=1e-6)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["victim"]


def test_saving_again_replaces_the_victim(tmp_path):
    save_victim(tmp_path / "victim", make(seed=0))
    save_victim(tmp_path / "victim", make(seed=1))
    jax.tree.map(np.testing.assert_array_equal, load_victim(tmp_path / "victim").variables, make(seed=1).variables)


def test_victims_of_one_architecture_share_a_compilation(tmp_path):
    @jax.jit
    def apply(logits_fn, images):
        return logits_fn(images)

    save_victim(tmp_path / "victim", make(seed=1))
    first, second = make(seed=0), load_victim(tmp_path / "victim")
    assert not np.allclose(apply(first.logits_fn, IMAGES), apply(second.logits_fn, IMAGES))
    assert apply._cache_size() == 1  # pyrefly: ignore[missing-attribute]


def test_errors_for_missing_and_damaged_victims_say_what_to_run(tmp_path):
    def refuse(path, message):
        with pytest.raises(
            ValueError, match=rf"(?s)path: .*{path.name}.*{message}.*experiments.train_victim --output="
        ):
            load_victim(path)

    refuse(tmp_path / "absent", "there is no|no victim")
    save_victim(tmp_path / "good", make())

    def damaged(name):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        return tmp_path / name

    path = damaged("no_weights")
    (path / "variables.safetensors").unlink()
    refuse(path, "cannot be read")

    path = damaged("half_a_card")
    (path / "card.json").write_text((path / "card.json").read_text()[:20])
    refuse(path, "damaged")

    path = damaged("other_card")
    card = json.loads((path / "card.json").read_text())
    (path / "card.json").write_text(json.dumps(card | {"num_classes": 5}))
    refuse(path, "damaged")

    path = damaged("empty_card")
    (path / "card.json").write_text("{}")
    refuse(path, "architecture")

    path = damaged("truncated")
    file = path / "variables.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refuse(path, "damaged.*truncated")


def test_cards_must_have_the_entries_that_loading_needs(tmp_path):
    with pytest.raises(ValueError, match=r"victim: its card must have .*; num_classes, image_shape missing"):
        save_victim(tmp_path / "victim", Victim({}, {"architecture": "vgg"}))
    assert not list(tmp_path.iterdir())
