"""The program that trains victims, on a tiny source."""

import json

import numpy as np
import pytest
from absl import flags

from experiments import train_victim
from lft_jax.cli import config
from lft_jax.data import load_source
from lft_jax.victims import MODELS, clean_accuracy, load_victim
from tests.programs import Program


@pytest.fixture
def tiny(tmp_path):
    labels = np.arange(80) % 2
    images = np.random.default_rng(0).integers(0, 100, (80, 8, 8)).astype(np.uint8)
    images[labels == 1] += 150
    np.savez(tmp_path / "tiny.npz", images=images, labels=labels)
    return tmp_path / "tiny.npz"


def test_training_writes_victim_card_and_curve(tiny, tmp_path, capsys):
    output, curve = tmp_path / "victim", tmp_path / "curve.json"
    given = train_victim.Config(
        source=str(tiny),
        architecture="small_cnn",
        seed=3,
        epochs=3,
        batch_size=8,
        learning_rate=1e-2,
        augment="crop",
        output=str(output),
        curve=str(curve),
    )
    train_victim.train(given)
    victim = load_victim(output)
    expected = {"source": str(tiny), "architecture": "small_cnn", "seed": 3, "epochs": 3, "image_shape": [8, 8, 1]}
    assert {name: victim.card[name] for name in expected} == expected
    assert load_source(victim.card["source"], "test").name == "tiny"
    with np.load(tiny) as file:
        everything = file["images"][..., None], file["labels"]
    assert clean_accuracy(victim.logits_fn, *everything) > 0.9
    written = json.loads(curve.read_text())
    assert [point["epoch"] for point in written["curve"]] == [1, 2, 3]
    assert written["test_accuracy"] == victim.card["test_accuracy"]
    assert written["wall_seconds"] > 0
    assert {"command", "commit", "versions", "device", "seeds"} <= written.keys()
    assert f"test accuracy {written['test_accuracy']:.4f} on 16 images" in capsys.readouterr().out


def test_defaults_depend_on_the_source():
    recipe = train_victim._recipe(train_victim.Config(source="digits", epochs=2))
    assert (recipe.architecture, recipe.epochs, recipe.learning_rate) == ("small_cnn", 2, 3e-3)
    assert train_victim._recipe(train_victim.Config(source="else")).architecture == "vgg"
    for source in train_victim._DEFAULTS:
        assert train_victim._recipe(train_victim.Config(source=source)).check().architecture in MODELS


def test_flags_are_parsed_to_a_configuration():
    values = flags.FlagValues()
    config.define_flags(train_victim.Config, values)
    values(["program", "--source=cifar10", "--epochs=4", "--architecture=lenet"])
    given = config.read_flags(train_victim.Config, values)
    assert given == train_victim.Config(source="cifar10", epochs=4, architecture="lenet")


def test_help_and_errors_on_the_command_line(tmp_path):
    def run(*arguments):
        return Program("experiments.train_victim", *arguments).wait()

    helped = run("--help").stdout
    assert "--architecture" in helped
    assert "TFDS" in helped
    failed = run("--source=absent.npz", f"--output={tmp_path / 'victim'}")
    assert failed.exit_code != 0
    assert "FileNotFoundError: name: there is no file absent.npz" in failed.stderr
    assert not list(tmp_path.iterdir())
