import dataclasses
import json
import signal

import numpy as np
import pytest

from lft_jax.cli import _exits
from lft_jax.cli.audit import Config, run
from tests.programs import Program

#: A linear model of three classes of 4x4 images on NumPy arrays, and one that is interrupted.
SOURCE = """
import itertools
import signal
import numpy as np

WEIGHTS = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
WEIGHTS -= WEIGHTS.mean(0)

def load():
    return lambda images: np.asarray(images).reshape(len(images), -1) @ WEIGHTS

def doubled():
    return lambda images: np.asarray(images).reshape(len(images), -1) @ (2 * WEIGHTS)

def stopped():
    calls = itertools.count(1)

    def model(images):
        if next(calls) >= 20:
            raise KeyboardInterrupt
        return load()(images)

    return model

def terminated():
    calls = itertools.count(1)

    def model(images):
        if next(calls) == 20:
            signal.raise_signal(signal.SIGTERM)
        return load()(images)

    return model
"""


def write(folder):
    (folder / "linear.py").write_text(SOURCE)
    names = {}
    exec(SOURCE, names)
    images = np.random.default_rng(1).integers(60, 200, (100, 4, 4, 1), np.uint8)
    labels = names["load"]()(images / np.float32(255)).argmax(-1)
    np.savez(folder / "images.npz", images=images, labels=labels, class_names=np.asarray(["<cat>", "dog"]))


FLAGS = Config(
    model="linear:load",
    data="images.npz",
    out="out",
    epsilons=("26/255", "51/255"),
    l2_epsilons=("none",),
    methods=("patterns",),
    support_images=(5,),
    queries=(30,),
    draws=2,
)


def flags(**changes):
    return dataclasses.replace(FLAGS, **changes)


def test_a_model_and_images_of_ones_own(folder, capsys):
    report = run(FLAGS)
    printed = capsys.readouterr()
    results = json.loads((folder / "out/report.json").read_text())
    assert results == json.loads(json.dumps(report.results))
    assert results["about"]["model"] == "linear:load" and results["about"]["data"] == "images.npz"
    assert results["settings"]["epsilons"] == {"linf": [26 / 255, 0.2], "l2": []}
    assert results["headline"]["success"]["images"] == 75 and report.verdict in printed.out
    assert "written: out/index.html, report.json, perturbation.npy, junit.xml, runs/" in printed.out
    assert "5/5 runs" in printed.err and "done" in printed.err
    page = (folder / "out/index.html").read_text()
    assert "0 &lt;cat&gt;" in page and "<cat>" not in page and "2 None" not in page
    assert np.abs(np.load(folder / "out/perturbation.npy")).max() <= 0.2 + 1e-6


def test_a_limit_ends_with_its_own_code_and_all_is_written(folder):
    with pytest.raises(_exits.LimitExceeded, match=r"its lower bound 0\.\d+ is above --fail_above=0.01") as caught:
        run(flags(fail_above=0.01))
    assert caught.value.code == 3 and (folder / "out/index.html").is_file()
    assert "<failure" in (folder / "out/junit.xml").read_text()
    run(flags(fail_above=0.99))
    assert "<failure" not in (folder / "out/junit.xml").read_text()


def test_interrupted_it_goes_on(folder, capsys):
    with pytest.raises(_exits.Kept, match="finished runs are in out, the same command goes on") as caught:
        run(flags(model="linear:stopped"))
    assert caught.value.code == 130
    stored = len(list(folder.glob("out/runs/*.json")))
    assert 0 < stored < 5 and not (folder / "out/index.html").exists()
    run(FLAGS)  # the same answers
    assert len(list(folder.glob("out/runs/*.json"))) == 5


def test_sigterm_counts_as_ctrl_c_with_a_code_of_its_own(folder):
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(_exits.Kept, match="the same command goes on") as caught, _exits.sigterm_as_interrupt():
        run(flags(model="linear:terminated"))
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) is former
    assert 0 < len(list(folder.glob("out/runs/*.json"))) < 5


def test_pictures_are_named_by_their_files_and_folders(folder):
    pytest.importorskip("PIL")
    from PIL import Image

    with np.load("images.npz") as stored:
        images, labels = stored["images"], stored["labels"]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / "pictures" / ("0_fox", "1", "2_<owl>")[label] / f"{number:03d}&.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    run(flags(data="pictures", query_images=20))
    page = (folder / "out/index.html").read_text()
    assert "0 fox" in page and "2 &lt;owl&gt;" in page and "&amp;.png" in page and "<owl>" not in page


def test_test_images_are_audited_where_there_are_some(folder):
    with np.load("images.npz") as stored:
        arrays = dict(stored)
    np.savez("both.npz", images=arrays["images"][:5], test_images=arrays["images"], test_labels=arrays["labels"])
    assert run(flags(data="both.npz")).results["split"] == {"support": 10, "choice": 15, "query": 75}


def test_only_as_many_images_are_read_as_can_be_used(folder):
    report = run(flags(query_images=10))
    assert report.results["split"]["query"] == 10
    with np.load("images.npz") as stored:
        arrays = {name: np.concatenate([stored[name]] * 12) for name in ("images", "labels")}
    np.savez("many.npz", **arrays)
    report = run(flags(data="many.npz", query_images=10))
    assert report.results["about"]["data"] == "many.npz (850 of 1200 images)"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "nowhere"}, "--data: expected a folder of pictures or an .npz file, got 'nowhere'"),
        ({"fail_above": 30.0}, "--fail_above: expected a number of at least 0 and below 1, got 30"),
        ({"epsilons": ("8",)}, "epsilons must be radii above 0 and at most 1"),
        ({"epsilons": ("x",)}, "--epsilons: expected a number above 0 or a fraction such as 8/255, got 'x'"),
        ({"l2_epsilons": ("-1",)}, "--l2_epsilons: expected a number above 0"),
        ({"methods": ("pgd",)}, "--methods"),
        ({"steps": (5, 3)}, "steps must be increasing"),
        ({"image_channels": 2}, "--image_channels: expected 1 or 3, got 2"),
        ({"input_range": (1.0,)}, "--input_range: expected two numbers"),
        ({"model": "linear:lod"}, "module 'linear' has no 'lod'"),
    ],
)
def test_wrong_flags(folder, changes, said):
    with pytest.raises(ValueError, match=said):
        run(flags(**changes))


def test_the_console_script_has_its_exit_code(tmp_path):
    write(tmp_path)
    arguments = ["--model=linear:load", "--data=images.npz", "--out=out", "--methods=patterns", "--support_images=5"]
    arguments += ["--queries=30", "--draws=1", "--epsilons=51/255", "--l2_epsilons=none", "--fail_above=0.01"]
    cache = str(tmp_path / "cache")
    found = Program("lft_jax.cli.audit", *arguments, folder=tmp_path, XDG_CACHE_HOME=cache).wait()
    assert found.exit_code == 3, found.stderr
    assert "is above --fail_above=0.01" in found.stderr and "Traceback" not in found.stderr
