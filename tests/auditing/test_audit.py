"""An audit of a linear model, whose every number is computed again from the perturbations."""

import dataclasses
import html.parser
import json
import re
import warnings
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest

import lft_jax
from lft_jax.auditing import AuditBudget, _audit
from lft_jax.auditing._junit import junit

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(16, 3)).astype(np.float32)
WEIGHTS -= WEIGHTS.mean(0)  # brightness is no class
IMAGES = RNG.integers(60, 200, (120, 4, 4, 1), np.uint8)
LABELS = (IMAGES.reshape(120, -1) / np.float32(255) @ WEIGHTS).argmax(-1)
LABELS[::10] = (LABELS[::10] + 1) % 3  # the model is wrong about these
BUDGET = AuditBudget((2, 5, 40), (2, 4), (30, 60), 2, methods=("momentum", "patterns", "patterns-l2"))
HOSTILE = ["<script>alert(1)</script>", "\"><img src='http://evil/x.png'>", "{{ 7 * 7 }} $x_1$ \u732b"]


def linear(x):
    return jnp.reshape(x, (len(x), -1)) @ WEIGHTS


def opaque(x):
    return np.asarray(x).reshape(len(x), -1) @ WEIGHTS


def run(model=linear, budget=BUDGET, labels=LABELS, **options):
    options = {"epsilons": (0.1, 0.2), "progress": False, **options}
    return lft_jax.audit(model, IMAGES, labels, budget=budget, **options)


@pytest.fixture(scope="module")
def report():
    return run(class_names=HOSTILE, image_names=[f"<b>{n}</b>.png" for n in range(120)], about={"model": HOSTILE[0]})


def test_every_rate_is_that_of_its_perturbation(report):
    results = report.results
    rows = results["rows"]["query"]
    images, labels = IMAGES[rows], LABELS[rows]
    clean = opaque(images / np.float32(255)).argmax(-1)
    assert results["split"] == {"support": 30, "choice": 18, "query": 72} and results["settings"]["differentiable"]
    assert results["clean_accuracy"]["rate"] == pytest.approx(np.mean(clean == labels))
    runs = {run.cell.name: run for run in report.runs}
    measured = 0
    for cell in results["cells"]:
        for draw in cell["draws"]:
            found = runs[draw["run"]]
            theta = found.perturbation
            size = np.abs(theta).max() if cell["norm"] == "linf" else np.linalg.norm(theta)
            assert size <= cell["epsilon"] * (1 + 1e-5)
            expected = lft_jax.attack_success_rate(linear, images, labels, theta, target=cell["target"])
            assert draw["success"] == pytest.approx(expected)
            measured += 1
        successes = [draw["success"] for draw in cell["draws"]]
        assert cell["mean"] == pytest.approx(np.mean(successes)) and cell["low"] <= cell["mean"] <= cell["high"]
        assert (cell["least"], cell["most"]) == (min(successes), max(successes))
    # (2 radii + 1 other size) x 2 draws; patterns: 1 other number of images and as many as its evaluations are enough
    # for, x 2 draws; l2: 2 x 2; targeted.
    assert measured == len(runs) == (6 + 6) + (2 + 2) + 4 + 1
    head = results["headline"]
    theta = runs[head["run"]].perturbation
    np.testing.assert_array_equal(theta, report.perturbation)
    after = opaque(np.clip(images / np.float32(255) + theta, 0, 1)).argmax(-1)
    assert head["accuracy"]["rate"] == pytest.approx(np.mean(after == labels))
    right = clean == labels
    assert report.asr == head["success"]["rate"] == pytest.approx(np.mean(after[right] != labels[right]))
    assert sum(count for _, _, count in results["collapse"]) == right.sum()
    assert sum(count for i, j, count in results["collapse"] if i != j) == head["success"]["hits"]
    others = right & (labels != results["dominant"]["class"])
    ends = np.sum(after[others] == results["dominant"]["class"])
    assert (results["dominant"]["images"], results["dominant"]["of"]) == (ends, others.sum())
    assert results["targeted"]["success"]["images"] == others.sum()


def test_the_choice_images_alone_choose_the_strongest(report):
    rows = report.results["rows"]["choice"]
    runs = {run.cell.name: run for run in report.runs if run.cell.target is None}

    def chosen(run):
        rate = lft_jax.attack_success_rate(linear, IMAGES[rows], LABELS[rows], run.perturbation)
        return rate, -run.evaluations

    for threat in [report.results["headline"], *report.results["threats"]]:
        ball = [r for r in runs.values() if (r.cell.norm, r.cell.epsilon) == (threat["norm"], threat["epsilon"])]
        assert chosen(runs[threat["run"]]) == max(map(chosen, ball))
    head = report.results["headline"]
    assert (head["norm"], head["epsilon"]) == ("linf", 0.2)
    assert [(t["norm"], t["radius"]) for t in report.results["threats"]] == [
        ("linf", "0.1"),
        ("linf", "51/255"),
        ("l2", "0.4"),  # of patterns of full contrast: 0.1 * sqrt(16)
        ("l2", "0.8"),
    ]


def test_the_targeted_run_aims_at_the_class_that_most_images_fall_into(report):
    (targeted,) = [run for run in report.runs if run.cell.target is not None]
    head = next(run for run in report.runs if run.cell.name == report.results["headline"]["run"])
    rows = report.results["rows"]["choice"]
    before, after = opaque(IMAGES[rows] / np.float32(255)).argmax(-1), head.predicted[: len(rows)]
    moved = np.bincount(after[after != before])
    assert targeted.cell == dataclasses.replace(head.cell, target=moved.argmax())
    dominant = report.results["dominant"]
    assert (dominant["class"], dominant["choices"]) == (moved.argmax(), moved.max())
    assert f"({moved.max()} of all 18)" in Page(report.html()).text


class Page(html.parser.HTMLParser):
    """Tags, text, and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text, self.ids = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)
            assert not name.startswith("on")

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_escapes_what_users_wrote(report):
    text = report.html()
    page = Page(text)
    assert len(text.encode()) < 2e6
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert page.addresses and all(a.startswith(("data:", "#")) for a in page.addresses)
    assert not re.findall(r"url\((?!#)", text) and "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    references = set(re.findall(r"(?:href=\"|url\()#([\w.-]+)", text))
    assert references <= set(page.ids)
    for said in (
        *report.results["verdict"]["sentences"],
        *report.results["not_tried"],
        "Which classes collapse into which",
        f"1 {HOSTILE[1]}",
        f"2 {HOSTILE[2]}",
        "<b>",
        "success (ASR), %",
        "wall time without compilation, s",
        "Wall time is that of the attack on",
        lft_jax.__version__,
    ):
        assert said in page.text, said
    assert page.tags.count("svg") == 1 + 2 + 3 + 1
    assert page.tags.count("img") == 3 + 2 * 12
    assert not re.search(r"\bnan\b", re.sub(r"data:image[^\"]*", "", text).lower())


def test_all_is_written(report, tmp_path):
    report.save(tmp_path / "deep" / "out", fail_above=0.01)
    folder = tmp_path / "deep" / "out"
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report.results))
    np.testing.assert_array_equal(np.load(folder / "perturbation.npy"), report.perturbation)
    assert {path.name for path in folder.glob("runs/*.npy")} == {f"{run.cell.name}.npy" for run in report.runs}
    assert (folder / "index.html").read_text(encoding="utf-8") == report.html()
    assert not list(folder.glob("**/*.partial"))
    suite = ElementTree.parse(folder / "junit.xml").getroot()
    assert suite.attrib["tests"] == suite.attrib["failures"] == "1" and suite.find("testcase/failure") is not None
    assert len(suite.findall("properties/property")) == 4


def test_a_limit_is_exceeded_by_the_lower_bound_only(report):
    low, high = report.interval
    assert 0 < low < report.asr < high
    for limit, failures in ((low - 0.001, "1"), (low + 0.001, "0"), (report.asr, "0"), (None, "0")):
        assert ElementTree.fromstring(junit(report.results, limit)).attrib["failures"] == failures
    with pytest.raises(ValueError, match=r"fail_above must be at least 0 and below 1, got 30"):
        report.save("nowhere", fail_above=30)


def test_it_prints_its_verdict(report):
    said = repr(report)
    assert "30 images to attack from, 18 to choose, 72 to judge" in said and report.verdict in said
    assert f"{100 * report.asr:.0f}%" in report.verdict and "95% interval" in report.verdict


@pytest.fixture
def attacks(monkeypatch):
    """The attacks that are made, by their radius and number of images; may be told to fail."""
    made = []

    def counted(model, images, labels, **options):
        made.append((options["epsilon"], len(images), options.get("target")))
        if counted.fails is not None and len(made) > counted.after:
            raise counted.fails
        return lft_jax.universal_perturbation(model, images, labels, **options)

    counted.fails, counted.after = None, 0
    monkeypatch.setattr(_audit, "universal_perturbation", counted)
    counted.made = made
    return counted


SMALL = AuditBudget((5,), (2,), (30,), 2, methods=("patterns",))


def test_it_goes_on_where_it_was_interrupted(attacks, tmp_path):
    whole = run(opaque, SMALL, output=tmp_path / "whole", l2_epsilons=())
    assert len(attacks.made) == 5  # 2 radii x 2 draws, targeted
    attacks.made.clear()
    attacks.fails, attacks.after = KeyboardInterrupt(), 3
    with pytest.raises(KeyboardInterrupt):
        run(opaque, SMALL, output=tmp_path / "part", l2_epsilons=())
    attacks.made.clear()
    attacks.fails = None
    seen = []
    report = run(opaque, SMALL, output=tmp_path / "part", l2_epsilons=(), progress=seen.append)
    assert len(attacks.made) == 2 and seen[-1]["stored"] == 3 and seen[-1]["done"] == seen[-1]["runs"] == 5
    assert seen[-1]["left"] == 0 and all(entry["left"] >= 0 for entry in seen)
    for name in ("headline", "collapse", "rows", "verdict", "evaluations"):
        a, b = (
            json.dumps({**r.results, "headline": {**r.results["headline"], "seconds": 0}}[name])
            for r in (whole, report)
        )
        assert a == b
    attacks.made.clear()
    again = run(opaque, SMALL, output=tmp_path / "part", l2_epsilons=())
    assert not attacks.made and again.results["headline"] == report.results["headline"]


def test_a_changed_plan_runs_what_is_missing_and_a_changed_model_all(attacks, tmp_path):
    run(opaque, SMALL, output=tmp_path, l2_epsilons=())
    attacks.made.clear()
    run(opaque, dataclasses.replace(SMALL, draws=3), output=tmp_path, l2_epsilons=(), epsilons=(0.1, 0.2))
    assert [made for made in attacks.made if made[2] is None] == [(0.2, 5, None), (0.1, 5, None)]
    relabelled = np.where(np.arange(120) % 7, LABELS, 0)
    for changed in ({"model": lambda x: opaque(x) * np.float32(1.1)}, {"seed": 1}, {"labels": relabelled}):
        attacks.made.clear()
        options = {"model": opaque, "budget": SMALL, "output": tmp_path, "l2_epsilons": (), **changed}
        run(**options)
        assert len(attacks.made) == 5, changed


def test_warnings_and_devices_of_stored_runs_are_kept(attacks, tmp_path, monkeypatch):
    def noisy(model, images, labels, **options):
        if options["epsilon"] == 0.1:
            warnings.warn("of the smaller radius", stacklevel=1)
        return lft_jax.universal_perturbation(model, images, labels, **options)

    monkeypatch.setattr(_audit, "universal_perturbation", noisy)
    options = {"output": tmp_path, "l2_epsilons": ()}
    with pytest.warns(UserWarning, match="of the smaller radius") as caught:
        first = run(opaque, SMALL, **options)
    assert len(caught) == 1 and first.results["warnings"] == ["of the smaller radius"]
    monkeypatch.setattr(_audit._findings, "device", lambda: "another machine")
    again = run(opaque, SMALL, **options)  # nothing is run, and nothing is said
    assert again.results["warnings"] == first.results["warnings"] and "of the smaller radius" in again.html()
    assert again.results["versions"] == first.results["versions"]
    more = run(opaque, dataclasses.replace(SMALL, draws=3), **options | {"epsilons": (0.2,)})
    assert more.results["versions"]["device"] == f"{first.results['versions']['device']} and another machine"


def test_a_model_that_is_mostly_wrong_is_doubted():
    labels = np.where(np.arange(120) % 3, (LABELS + 1) % 3, LABELS)
    with pytest.warns(UserWarning, match=r"classifies only \d+% of 92 images as their labels say. If you know it"):
        report = run(opaque, SMALL, labels=labels, epsilons=(1e-4,), l2_epsilons=())
    assert report.results["verdict"]["grade"] == "doubtful" and report.interval[0] < 0.1
    assert report.results["clean_accuracy"]["low"] <= 0.5 and "input_range" in report.results["verdict"]["sentences"][0]
    assert "With the strongest pattern no choice image changes its answer" in Page(report.html()).text
    assert not report.results["warnings"]  # each attack would say it of its few images


def test_failed_runs_are_said_and_made_again(attacks, tmp_path):
    attacks.fails, attacks.after = RuntimeError("the card is gone\nand more"), 2
    report = run(opaque, SMALL, output=tmp_path, l2_epsilons=())
    assert len(report.results["failures"]) == 3 and report.results["targeted"] is None
    assert "3 of the planned attacks failed" in report.verdict
    suite = ElementTree.fromstring(junit(report.results, None))
    assert suite.attrib["errors"] == "1" and "the card is gone" in suite.find("testcase/error").text
    page = Page(report.html()).text
    assert "Runs that failed" in page and "RuntimeError: the card is gone" in page and "and more" not in page
    attacks.fails = None
    assert not run(opaque, SMALL, output=tmp_path, l2_epsilons=()).results["failures"]
    attacks.fails, attacks.after = RuntimeError("at once"), 0
    with pytest.raises(RuntimeError, match="at once"):
        run(opaque, SMALL, l2_epsilons=())


def test_a_model_without_gradients_is_attacked_by_queries_and_the_page_says_so():
    report = run(opaque, dataclasses.replace(BUDGET, draws=1))
    assert not report.results["settings"]["differentiable"]
    assert {run.cell.method for run in report.runs} == {"patterns", "patterns-l2"}
    assert "Attacks with gradients: the model has none here." in Page(report.html()).text
    with pytest.raises(ValueError, match=r"budget: none of its methods .* can be run: the model has no gradients"):
        run(opaque, dataclasses.replace(BUDGET, methods=("momentum",)))


def test_without_labels_the_answers_are_the_labels():
    report = run(opaque, SMALL, labels=None, l2_epsilons=())
    assert report.results["clean_accuracy"] is None and not report.results["settings"]["labelled"]
    rows = report.results["rows"]["query"]
    assert report.asr == pytest.approx(lft_jax.fooling_rate(opaque, IMAGES[rows], report.perturbation))
    page = Page(report.html())
    assert "their answer changes" in report.verdict and "since no labels were given" in page.text
    # One number of images and of evaluations is no curve.
    assert page.tags.count("svg") == 1 + 1 and "Success against the radius" in page.text
    assert "Success against steps" not in page.text and "Success against the number" not in page.text


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"epsilons": (8,)}, ValueError, r"epsilons must be radii above 0 and at most 1, such as 8 / 255, got \[8\]"),
        ({"epsilons": (0.0,)}, ValueError, "epsilons must be radii above 0"),
        ({"epsilons": (), "l2_epsilons": ()}, ValueError, "epsilons must have at least one radius"),
        ({"l2_epsilons": (-1.0,)}, ValueError, "l2_epsilons must be radii above 0, such"),
        ({"class_names": ["a"] * 4}, ValueError, "class_names must be 3 strings, got 4"),
        ({"class_names": [1, 2, 3]}, TypeError, "class_names must be a sequence of strings"),
        ({"image_names": ["a"]}, ValueError, "image_names must be 120 strings, got 1"),
        ({"labels": LABELS + 3}, ValueError, "labels must"),
        ({"labels": (opaque(IMAGES / np.float32(255)).argmax(-1) + 1) % 3}, ValueError, "classifies no query image"),
        ({"model": lambda x: opaque(x) * np.float32("nan")}, ValueError, "NaN or infinite logits for 120 clean images"),
        ({"model": "resnet"}, TypeError, "model must be a function of images"),
    ],
)
def test_wrong_arguments(options, error, said):
    with pytest.raises(error, match=said):
        run(**{"model": opaque, "budget": SMALL, **options})
