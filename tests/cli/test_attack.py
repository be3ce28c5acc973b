import dataclasses
import json

import numpy as np
import pytest

from lft_jax.cli import _exits
from lft_jax.cli._measure import Remembered, rates
from lft_jax.cli.attack import Config, attack
from lft_jax.cli.picture import before_and_after
from tests.programs import Program

#: A linear model of three classes of 4x4 images, in jax.numpy or in NumPy, and models that fail.
SOURCE = """
import itertools
import signal
import jax.numpy as jnp
import numpy as np

WEIGHTS = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
WEIGHTS -= WEIGHTS.mean(0)  # brightness is no class

def load():
    return lambda images: jnp.reshape(images, (len(images), -1)) @ WEIGHTS

def doubled():
    return lambda images: jnp.reshape(images, (len(images), -1)) @ (2 * WEIGHTS)

def failing(first, error):
    calls = itertools.count(1)

    def model(images):
        if next(calls) >= first:
            raise error
        return np.asarray(images).reshape(len(images), -1) @ WEIGHTS

    return model

def later():
    return failing(30, RuntimeError("the card is gone"))

def at_once():
    return failing(1, RuntimeError("there is no card"))

def stopped():
    return failing(30, KeyboardInterrupt())

def stopped_at_once():
    return failing(1, KeyboardInterrupt())

def terminated(first=30):
    calls = itertools.count(1)

    def model(images):
        if next(calls) == first:
            signal.raise_signal(signal.SIGTERM)
        return np.asarray(images).reshape(len(images), -1) @ WEIGHTS

    return model

def terminated_at_once():
    return terminated(1)

def wrong():
    return lambda images: images @ jnp.ones((7, 3))
"""


def write(folder):
    (folder / "linear.py").write_text(SOURCE)
    names = {}
    exec(SOURCE, names)
    images = np.random.default_rng(1).integers(60, 200, (80, 4, 4, 1), np.uint8)
    labels = (images.reshape(80, -1) / np.float32(255) @ names["WEIGHTS"]).argmax(-1)
    np.savez(folder / "images.npz", images=images, labels=labels)
    np.savez(folder / "bare.npz", images=images)


FLAGS = Config("runs/uap", model="linear:load", images="images.npz", epsilon="51/255", steps=3)


def flags(**changes):
    return dataclasses.replace(FLAGS, **changes)


def test_a_model_of_ones_own(folder, capsys):
    results = attack(FLAGS)
    printed = capsys.readouterr().out
    assert results == json.loads((folder / "runs/uap.json").read_text())
    theta = np.load(folder / "runs/uap.npy")
    assert theta.shape == (4, 4, 1) and np.abs(theta).max() <= 0.2 + 1e-6
    assert results["complete"] and results["epsilon"] == 0.2 and results["oracle"] == "gradient"
    assert (results["support"]["images"], results["unseen"]["images"], results["steps_done"]) == (3, 77, 3)
    assert results["unseen"]["clean_accuracy"] == 1 and results["test_asr"] == results["unseen"]["asr"] > 0.2
    assert len(results["history"]["loss"]) == 3 and results["provenance"]["seeds"] == [0]
    assert (folder / "runs/uap.png").stat().st_size > 5_000
    for said in (
        "attacks from 3 images; 77 unseen images to measure on",
        "UniversalPerturbation [4, 4, 1], linf ball of radius 0.2 (51/255), 3 of 3 steps by gradient",
        f"on 77 unseen images: clean accuracy 1.000, success (ASR) {results['test_asr']:.3f}, fooling rate",
        "written: runs/uap.npy, runs/uap.json, runs/uap.png",
    ):
        assert said in printed


def test_without_labels_the_predictions_are_the_labels(folder, capsys):
    results = attack(flags(images="bare.npz", num_images=8, num_test=20, optimizer="pgd"))
    assert (results["support"]["images"], results["unseen"]["images"]) == (8, 20)
    assert results["unseen"]["clean_accuracy"] is None
    assert results["unseen"]["asr"] == results["unseen"]["fooling_rate"]
    assert "on 20 unseen images: success (ASR)" in capsys.readouterr().out


def test_when_no_images_are_left_it_says_so(folder, capsys):
    results = attack(flags(num_images=80, steps=1))
    assert results["unseen"] is None and results["test_asr"] is None
    assert "nothing was measured on unseen images" in capsys.readouterr().out


def test_pictures_are_attacked_as_their_arrays(folder):
    pytest.importorskip("PIL")
    from PIL import Image

    with np.load("images.npz") as stored:
        arrays = dict(stored)
    order = np.argsort(arrays["labels"], kind="stable")
    np.savez("sorted.npz", **{name: array[order] for name, array in arrays.items()})
    for number, row in enumerate(order):
        path = folder / "pictures" / str(arrays["labels"][row]) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(arrays["images"][row, ..., 0]).save(path)
    from_file, from_folder = attack(flags(images="sorted.npz")), attack(flags(images="pictures"))
    for name in ("support", "unseen", "history"):
        assert from_file[name] == from_folder[name]


def test_what_the_model_expects_is_said_by_flags(folder):
    # The weights of this model are twice those of the other: x * 2 / 4 makes up for it.
    results = attack(flags(model="linear:doubled", input_range=(0.0, 2.0), std=(4.0,)))
    plain = attack(FLAGS)
    np.testing.assert_allclose(results["history"]["loss"], plain["history"]["loss"], rtol=1e-4)


def test_queries_targets_starts_and_budgets(folder):
    start = attack(FLAGS)
    again = attack(flags(output="runs/on", start="runs/uap.npy", oracle="query", target=1, max_queries=150))
    assert again["oracle"] == "query" and 3 * 40 < again["queries"] <= 150  # shared by the steps
    assert again["steps_done"] == 3 and again["history"]["queries"] == sorted(again["history"]["queries"])
    assert again["history"]["l2"][0] != start["history"]["l2"][0]
    assert 0 <= again["unseen"]["asr"] <= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model": None},
            r"expected --model=package.module:function or --victim=folder, one of them, got --model=None",
        ),
        ({"victim": "somewhere"}, r"one of them, got --model=linear:load and --victim=somewhere"),
        ({"model": None, "victim": "x", "std": (1.0,)}, r"--images, --std: for --model only"),
        ({"data_dir": "x"}, r"--data_dir is for --victim only"),
        ({"images": None}, r"--images: expected an .npz file or a folder of pictures for --model, got none"),
        ({"epsilon": None}, r"--epsilon: expected a radius for --model, such as 8/255, got none"),
        ({"epsilon": "8/0"}, r"--epsilon: expected a number above 0 or a fraction such as 8/255, got '8/0'"),
        ({"epsilon": "-0.1"}, r"--epsilon: expected a number above 0"),
        ({"epsilon": "nan"}, r"--epsilon: expected a number above 0"),
        ({"epsilon": "8"}, r"epsilon must be at most 1, .*8 / 255"),
        ({"penalty": 0.1, "norm": "l1"}, r"epsilon|penalty"),
        ({"input_range": (0.0,)}, r"--input_range: expected two numbers, such as 0,255, got \(0.0,\)"),
        ({"image_channels": 2}, r"--image_channels: expected 1 or 3, got 2"),
        ({"optimizer": "momentun_pgd"}, r"optimizer: unknown name 'momentun_pgd'"),
        ({"start": "images.npz"}, r"--start: expected an .npy, .pt or .png file of a perturbation, got 'images.npz'"),
        ({"start": "nowhere.npy"}, r"--start: expected an .npy, .pt or .png file of a perturbation, got 'nowhere.npy'"),
    ],
)
def test_wrong_flags_are_refused(folder, changes, said):
    with pytest.raises(ValueError, match=said):
        attack(flags(**changes))
    assert not list(folder.glob("runs/*"))


@pytest.mark.parametrize("max_queries", [None, 1500])  # in the race, and after some steps
@pytest.mark.parametrize("name", ["later", "stopped"])
def test_a_run_that_ends_early_leaves_what_it_had_found(folder, name, max_queries):
    with pytest.raises(
        _exits.EndedEarly, match=r"ended early, after \d+ of 200 steps: .*linear.py, line \d+\)"
    ) as seen:
        attack(flags(model=f"linear:{name}", steps=200, oracle="query", max_queries=max_queries))
    assert "--start=runs/uap.npy begins with it" in str(seen.value)
    results = json.loads((folder / "runs/uap.json").read_text())
    assert not results["complete"] and ("card is gone" in results["error"] or name == "stopped")
    assert results["support"] is results["unseen"] is results["test_asr"] is None
    assert results["steps_done"] == len(results["history"].get("loss", ())) < 200
    assert (results["steps_done"] > 0) == (max_queries is not None)
    theta = np.load(folder / "runs/uap.npy")
    assert theta.shape == (4, 4, 1) and 0 < np.abs(theta).max() <= 0.2 + 1e-6


def test_an_error_before_the_first_step_leaves_nothing(folder):
    with pytest.raises(RuntimeError, match="there is no card"):
        attack(flags(model="linear:at_once", oracle="query"))
    assert not list(folder.glob("runs/*"))


def test_rates_ask_for_each_image_once():
    asked = []

    def model(images):
        asked.append(len(images))
        return np.stack([images.mean((1, 2, 3)), np.full(len(images), 0.5, np.float32)], 1)

    images = np.asarray([[[[0.2]]], [[[0.6]]], [[[0.7]]], [[[0.45]]]], np.float32)
    theta = np.full((1, 1, 1), -0.15, np.float32)  # changes the second image alone
    found = rates(Remembered(model), images, np.asarray([1, 0, 1, 1]), theta, None, None)
    assert found == {"images": 4, "clean_accuracy": 0.75, "asr": pytest.approx(1 / 3), "fooling_rate": 0.25}
    assert asked == [4, 4]
    assert rates(Remembered(model), images, None, theta, None, None)["asr"] == 0.25
    assert rates(Remembered(model), images, None, theta, 1, None)["asr"] == 0.5  # of the two that are class 0


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_of_any_channels_are_drawn(tmp_path, channels):
    images = np.zeros((2, 4, 4, channels), np.uint8)
    theta = np.zeros((4, 4, channels), np.float32)
    before_and_after(images, theta, np.array([1, 2]), np.array([1, 3]), tmp_path / "x.png", np.array([1, 1]))
    assert (tmp_path / "x.png").stat().st_size > 5_000


def run(folder, *arguments, module="lft_jax.cli.attack"):
    cache = str(folder / "cache")
    return Program(module, "--output=runs/uap", *arguments, folder=folder, XDG_CACHE_HOME=cache).wait()


OWN = ("--images=images.npz", "--epsilon=51/255", "--steps=12")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--model=linear:at_once", "--oracle=query", *OWN), 1, "Traceback"),
        (("--model=linear:load", "--stps=3"), 2, "Unknown command line flag 'stps'"),
        (("--model=linear:load", *OWN, "--mean=a"), 2, "--mean: expected a list of float, got ['a']."),
        (("--model=linear:lod", *OWN), 2, "ValueError: --model=linear:lod: module 'linear' has no 'lod'; it has load"),
        (("--model=linear:wrong", *OWN), 2, "(linear.py, line"),
        (("--model=linear:later", "--oracle=query", *OWN), 3, "RuntimeError: the card is gone (linear.py, line"),
        (("--model=linear:stopped_at_once", "--oracle=query", *OWN), 130, "interrupted; nothing was written"),
        (("--model=linear:terminated_at_once", "--oracle=query", *OWN), 143, "interrupted; nothing was written"),
        (("--model=linear:terminated", "--oracle=query", *OWN), 3, "ended early, after"),
    ],
)
def test_exit_codes(tmp_path, arguments, code, said):
    write(tmp_path)
    found = run(tmp_path, *arguments)
    assert found.exit_code == code, found.stderr
    assert said in found.stderr
    assert ("Traceback" in found.stderr) == (code == 1)
    assert suffixes(tmp_path) == ([".json", ".npy"] if code == 3 else [])


def suffixes(folder):
    return sorted(path.suffix for path in folder.glob("runs/*"))


def test_success_and_a_warning_of_one_line(tmp_path):
    write(tmp_path)
    images = np.full((12, 4, 4, 1), 0.5, np.float32)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(12) % 3)
    found = run(tmp_path, "--model=linear:load", *OWN, module="experiments.attack")
    assert found.exit_code == 0, found.stderr
    assert suffixes(tmp_path) == [".json", ".npy", ".png"]
    lines = [line for line in found.stderr.splitlines() if line.startswith("warning: ")]
    assert any("model classifies only" in line for line in lines) and "UserWarning" not in found.stderr


def test_without_images_the_attack_is_data_free(folder, capsys):
    results = attack(flags(images=None, shape=(4, 4, 1), optimizer="pgd"))
    assert results["support"] is results["unseen"] is results["test_asr"] is None and results["complete"]
    assert np.load(folder / "runs/uap.npy").shape == (4, 4, 1) and not (folder / "runs/uap.png").exists()
    printed = capsys.readouterr().out
    assert "attacks without images; there are none to measure on" in printed and "on synthetic images" in printed
    measured = attack(flags(shape=(4, 4, 1), optimizer="pgd", num_test=70))  # images are only measured on
    assert measured["support"] is None and measured["unseen"]["images"] == 70
    np.testing.assert_array_equal(measured["history"]["loss"], results["history"]["loss"])
    assert "attacks without images; 70 unseen images to measure on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"images": None},
            "an attack without images needs --shape=H,W,C, since the input_shape of the model is unknown",
        ),
        ({"images": None, "shape": (4, 4)}, r"shape must be \(H, W, C\), whole numbers"),
        ({"shape": (4, 4, 3)}, r"--shape: expected that of the images, \(4, 4, 1\), got \(4, 4, 3\)"),
        ({"shape": (4, 4, 1), "num_images": 3}, "--shots and --num_images: for attacks from --images"),
        ({"images": None, "shape": (4, 4, 1), "shots": 1}, "--shots and --num_images: for attacks from --images"),
    ],
)
def test_wrong_flags_without_images(folder, changes, said):
    with pytest.raises(ValueError, match=said):
        attack(flags(**changes))
