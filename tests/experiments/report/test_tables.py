"""Rendered results: the numbers of a file stand in its tables, and its figures exist."""

import json

import pytest

from experiments.report import render, tables
from experiments.studies import breadth

SEEDS = {"seeds": 1, "seed_asr": [0.5]}


def row(method, asr, steps, gap, victim="toy_small_cnn_1000", **more):
    return {
        "source": "toy",
        "victim": victim,
        "seen_victim": False,
        "method": method,
        "at": [1, 2],
        "asr": asr,
        "asr_interval": [0.01, None],
        "difference_to_tuned_pgd": [asr[-1] - 0.4, 0.02],
        "steps_to_tuned_pgd": steps,
        "gap_closed": gap,
        "gap_closed_augmented": None,
        "clean_accuracy": 0.98,
        "l1": 1.0,
        "l2": 0.5,
        "linf": 0.1,
        "loss": -1.0,
        **SEEDS,
        **more,
    }


COMPARISON = {
    "rows": [
        row("pgd", [0.2, 0.4], 2, 0.0, task_asr=[0.3, 0.5], queries=[200, 400]),
        row("pgd (untuned)", [0.1, 0.1], None, -1.5),
        row("pgd, augmented", [0.2, 0.45], 2, 0.25, task_asr=[0.35, 0.55]),
        row("lft", [0.4, 0.55], 1, 0.75, seeds=2, seed_asr=[0.5, 0.6], task_asr=[0.5, 0.6], queries=[300, 400]),
        row("maml", [0.3, 0.39], None, 0.0),
        row("oracle", [0.6, 0.6], 1, 1.0),
        row("pgd", [0.2, 0.4], 2, 0.0, victim="toy_lenet_1001"),
    ],
    "tasks": {"shots": 2, "ways": 3, "norm": "l1", "epsilon": {}, "penalty": 0.01, "num_directions": 10, "waves": 40},
    "protocol": {"num_tasks": 7, "num_validation": 4, "methods": ["pgd", "adam"]},
    "meta_training": [
        {
            "learner": "lft",
            "victims": ["v/toy_small_cnn_0", "v/big_toy_lenet_1"],
            "shots": 1,
            "start": "gradient",
            "seed": seed,
            "waves": 40,
        }
        for seed in (0, 1)
    ]
    + [
        {"learner": learner, "victims": ["v/toy_lenet_0"], "shots": 2, "seed": 0, "waves": 0, "num_directions": 12}
        for learner in ("maml", "joint")
    ],
    "provenance": {"command": "python -m experiments.studies.study", "commit": "abc", "device": "1 x cpu"},
}
BREADTH = {
    "flags": {"optimizer": "uap-linf", "num_tasks": 5},
    "rows": [
        {
            "victim": "toy_lenet_1001",
            "image_shape": [8, 9, 3],
            "classes": 4,
            "shots": 2,
            "factor": 0.5,
            "num_steps": 6,
            "methods": {
                "pgd": {"asr": 0.3, "interval": 0.02, "difference_to_tuned_pgd": [0.0, 0.0]},
                "uap-linf": {"asr": 0.41, "interval": 0.03, "difference_to_tuned_pgd": [0.11, 0.04]},
            },
        }
    ],
    "provenance": {"command": "python -m experiments.studies.breadth", "commit": "abc", "device": "1 x cpu"},
}
ABLATION = {
    "flags": {
        "study": "hard",
        "num_tasks": 5,
        "meta_steps": 3,
        "seeds": 2,
        "architectures": [],
        "epsilon": ["toy=0.3"],
    },
    "rows": [
        {
            "variant": variant,
            "victim": "toy_lenet_101",
            "at": [1, 20],
            "asr": [0.1, asr],
            "asr_interval": [0.01, 0.02],
            "difference": [asr - 0.5, 0.03],
            "seed_differences": [asr - 0.49, asr - 0.51],
            "queries": 200.0,
        }
        for variant, asr in (("base", 0.5), ("no spread", 0.46))
    ],
    "provenance": {"command": "python -m experiments.studies.ablation", "commit": "abc", "device": "1 x cpu"},
}


@pytest.fixture
def rendered(tmp_path):
    """The document that the three results make, and the folder of their files."""
    (tmp_path / "docs").mkdir()
    document = tmp_path / "docs" / "results.md"
    document.write_text(f"Before.\n{render.BEGIN}\nold\n{render.END}\nAfter.\n")
    files = {"compare": COMPARISON, "breadth": BREADTH, "ablation": ABLATION}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    render.render(
        render.Config(results=tuple(str(tmp_path / f"{name}.json") for name in files), document=str(document))
    )
    return document.read_text(), tmp_path


@pytest.mark.parametrize(
    ("tasks", "start", "kind"),
    [
        ({"shots": 1}, "momentum", "l2 ball"),
        ({"shots": 5, "second_loss": "dominant"}, "gradient", "l2 ball, 5 images, two losses, along the gradient"),
        ({"penalty": 0.01, "kappa": 5.0}, "gradient", "penalty, kappa 5"),
        ({"num_directions": 3, "second_loss": "hinge"}, "momentum", "queries only"),
    ],
)
def test_comparisons_of_one_victim_are_told_apart(tasks, start, kind):
    changes = {"tasks": {"shots": 2, "norm": "l2", **tasks}, "meta_training": [{"start": start}]}
    lines = tables.claims([{**COMPARISON, **changes}]).strip().splitlines()
    assert lines[-1].startswith(f"| `toy_small_cnn_1000` | {kind} | 5.5 |")


def test_what_is_around_the_marks_stays(rendered):
    text, _ = rendered
    assert text.startswith(f"Before.\n{render.BEGIN}\n## The LFT against each kind of rival")
    assert text.endswith(f"{render.END}\nAfter.\n")
    assert "old" not in text


@pytest.mark.parametrize(
    "line",
    [
        "## Attacks on toy: 3 classes, 2 images of each, zeroth-order gradients of 10 directions a step from a start",
        # The differences of the two tasks are 0.2 and 0.1, and 0.15 and 0.05; 1.96 / sqrt(2) of their deviation 0.0707.
        "| queries only | 5.5 | +15.0 ± 9.8 |  | +10.0 ± 9.8 | 1 (300 of 400 queries) |  | never |  | 75% |",
        "a penalty of 0.01 on the l1 norm",
        "lft (2 seeds) on 2 victims of toy and big_toy; maml (1 seed) on 1 victim of toy; joint (1 seed) on ",
        "with 1 image(s) of each class; maml and joint without that search, with 12 directions. Baselines",
        "on 4 validation tasks of the same victim",
        " from a start that 40 evaluations searched plane waves for, rules that start along the gradient\n",
        "| lft | 40.0 ± 1.0 | 55.0 ± ? (50.0 to 60.0) | +15.0 ± 2.0 | 1 | 75% |  | -1.00 | 1.0 | 0.50 | 0.100 |",
        "| oracle |  | 60.0 ± ? | +20.0 ± 2.0 | 1 | 100% |  | -1.00 | 1.0 | 0.50 | 0.100 |",
        "| toy_lenet_1001 | 8x9x3 | 4 | 2 | x 0.5 | 6 | 30.0 ± 2.0 | 41.0 ± 3.0 | +11.0 ± 4.0 |",
        "3 meta-steps on victims of all the study's architectures, mean over 2 meta-training seeds. In brackets",
        "and that of each seed. Radii by default, but toy=0.3. What the variants are",
        "| no spread | 20 | 200 | 10.0 | 46.0 (-4.0 ± 3.0: -3.0, -5.0) |",
        "| base | 20 | 200 | 10.0 | 50.0 |",
        "![success against the step](../compare.png)",
        "![perturbations of toy_lenet_1001](../compare_toy_lenet_1001.png)",
    ],
)
def test_numbers_and_figures_are_those_of_the_files(rendered, line):
    assert line in rendered[0]


def test_a_summary_has_a_line_a_victim(tmp_path):
    rows = [r for r in COMPARISON["rows"] if r["victim"] == "toy_small_cnn_1000"]
    (tmp_path / "mine.json").write_text(json.dumps({**COMPARISON, "rows": rows}))
    document = tmp_path / "README.md"
    document.write_text(f"{render.BEGIN}{render.END}")
    files = (str(tmp_path / "mine.json"),)
    render.render(render.Config(results=files, document=str(document), summary=True))
    cells = ["40.0 ± ?", "40.0 ± ? (pgd)", "45.0 ± ? (pgd)", "", "55.0 ± ?", "60.0 ± ?", "+15.0 ± 2.0", "75%"]
    assert f"| `toy_small_cnn_1000` | {' | '.join(cells)} |" in document.read_text()
    assert not (tmp_path / "mine.png").exists()


def test_figures_are_drawn_beside_the_files(rendered):
    for name in ("compare.png", "compare_steps.png"):
        assert (rendered[1] / name).stat().st_size > 5_000


def test_what_cannot_be_rendered_is_refused_by_name(tmp_path):
    rows = [r for r in COMPARISON["rows"] if r["method"] != "lft"]
    (tmp_path / "mine.json").write_text(json.dumps({**COMPARISON, "rows": rows}))
    document = tmp_path / "README.md"
    document.write_text(f"{render.BEGIN}{render.END}")
    options = {"results": (str(tmp_path / "mine.json"),), "document": str(document)}
    with pytest.raises(ValueError, match="results: toy_small_cnn_1000 was not attacked by an lft"):
        render.render(render.Config(summary=True, **options))
    seen = [{**row, "seen_victim": True} for row in rows]
    (tmp_path / "mine.json").write_text(json.dumps({**COMPARISON, "rows": seen}))
    render.render(render.Config(**options))
    assert "Victims that were in meta-training" in document.read_text()
    assert "each kind of rival" not in document.read_text()


def test_cases_fit_their_victims():
    sizes = set()
    for case in breadth.CASES:
        sizes.add(case.side)
        assert 2 <= case.classes <= 10
        assert case.source in ("digits", "mnist", "cifar10")
    assert {None, 224} <= sizes
