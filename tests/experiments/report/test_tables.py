"""Rendered results: pages have the numbers of their files, and the committed pages are up to date."""

import json
import re
from pathlib import Path

import pytest

from experiments.report import render, tables, victims
from experiments.studies import breadth

ROOT = Path(__file__).parents[3]
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
        "gap_closed_augmented": 0.25,
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
    """The document rendered from three results files, and their folder."""
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
        (
            {"shots": 5, "second_loss": "dominant"},
            "gradient",
            "l2 ball, 5 images per class, two losses, base update along the gradient",
        ),
        ({"penalty": 0.01, "kappa": 5.0}, "gradient", "penalty, kappa 5"),
        ({"num_directions": 3, "second_loss": "hinge"}, "momentum", "queries only"),
    ],
)
def test_comparisons_of_one_victim_have_different_settings(tasks, start, kind):
    changes = {"tasks": {"shots": 2, "norm": "l2", **tasks}, "meta_training": [{"start": start}]}
    lines = tables.claims([{**COMPARISON, **changes}]).strip().splitlines()
    assert lines[-1].startswith(f"| `toy_small_cnn_1000` | {kind} | 5.5 |")


def test_text_outside_the_marks_is_kept(rendered):
    text, _ = rendered
    assert text.startswith(f"Before.\n{render.BEGIN}\n## The LFT against each kind of method")
    assert text.endswith(f"{render.END}\nAfter.\n")
    assert "old" not in text


@pytest.mark.parametrize(
    "line",
    [
        "## Attacks on `toy_small_cnn_1000` and `toy_lenet_1001`: 3 classes, 2 images per class, queries only, l1 pen",
        "- Gradients: zeroth-order estimates from 10 directions per step; the start is the best of plane waves, ",
        "searched with 40 evaluations of every support image.",
        # Differences by task: 0.2 and 0.1, 0.15 and 0.05. Intervals: 1.96 / sqrt(2) times the deviation 0.0707.
        "| queries only | 5.5 | +15.0 ± 9.8 |  | +10.0 ± 9.8 | 1 (300 of 400 queries) |  | never |  | 75% | 25% |",
        "a penalty of 0.01 times the l1 norm",
        "lft (2 seeds) on 2 victims of toy and big_toy; maml (1 seed) on 1 victim of toy; joint (1 seed) on ",
        "with 1 support image(s) per class; maml and joint without that search, with 12 directions per step.\n",
        "on 4 validation tasks of the same victim",
        "queries only, l1 penalty, base update along the gradient\n",
        "| lft | 40.0 ± 1.0 | 55.0 ± ? (50.0 to 60.0) | +15.0 ± 2.0 | 1 | 75% | 25% | -1.00 | 1.0 | 0.50 | 0.100 |",
        "| oracle |  | 60.0 ± ? | +20.0 ± 2.0 | 1 | 100% | 25% | -1.00 | 1.0 | 0.50 | 0.100 |",
        "| toy_lenet_1001 | 8x9x3 | 4 | 2 | x 0.5 | 6 | 30.0 ± 2.0 | 41.0 ± 3.0 | +11.0 ± 4.0 |",
        "3 meta-steps on victims of all the study's architectures, mean over 2 meta-training seeds. In brackets",
        "paired by task, then that of each seed. Radii are the defaults, except toy=0.3. Variants",
        "## Ablation of the study `hard`: no spread\n",
        "| no spread | 20 | 200 | 10.0 | 46.0 (-4.0 ± 3.0: -3.0, -5.0) |",
        "| base | 20 | 200 | 10.0 | 50.0 |",
        "![ASR against the fine-tuning step](../compare.png)",
        "![perturbations of toy_lenet_1001](../compare_toy_lenet_1001.png)",
    ],
)
def test_document_has_numbers_and_figures_of_the_files(rendered, line):
    assert line in rendered[0]


def test_radii_that_differ_from_meta_training_are_named():
    tasks = {**COMPARISON["tasks"], "norm": "linf", "penalty": None, "epsilon": {"toy": 0.2}}
    runs = [{**run, "epsilon": ["toy=0.3"]} for run in COMPARISON["meta_training"]]
    section = tables.results_section({**COMPARISON, "tasks": tasks, "meta_training": runs}, "toy.json", "toy")
    assert "- Bound: linf ball, radius toy 0.2 (meta-trained at 0.3).\n" in section


def of_one_victim():
    rows = [r for r in COMPARISON["rows"] if r["victim"] == "toy_small_cnn_1000"]
    return {**COMPARISON, "rows": rows}


def test_summary_has_a_row_per_victim():
    cells = ["40.0 ± ?", "40.0 ± ? (pgd)", "45.0 ± ? (pgd)", "", "55.0 ± ?", "60.0 ± ?", "+15.0 ± 2.0", "+10.0 ± 9.8"]
    assert tables.summary([of_one_victim()]).endswith(f"| `toy_small_cnn_1000` | {' | '.join(cells)} | 75% | 25% |\n")


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (0.0, "ahead (+10.0 ± 9.8); 40% against 20% after one step"),
        (-0.1, "level (+0.0 ± 9.8)"),
        (-0.3, "behind (-20.0 ± 9.8)"),
    ],
)
def test_short_summary_has_a_verdict(tmp_path, change, verdict):
    results = of_one_victim()
    rows = [
        {**r, "task_asr": [x + change for x in r["task_asr"]]} if r["method"] == "lft" else r for r in results["rows"]
    ]
    (tmp_path / "mine.json").write_text(json.dumps({**results, "rows": rows}))
    document = tmp_path / "README.md"
    document.write_text(f"{render.BEGIN}{render.END}")
    files = (str(tmp_path / "mine.json"),)
    assert verdict in tables.brief([{**results, "rows": rows}])
    assert verdict in tables.brief([{**results, "rows": rows}], ("toy_small_cnn_1000",))
    assert verdict not in tables.brief([{**results, "rows": rows}], ("another",))
    render.render(render.Config(results=files, document=str(document), summary=True))
    assert document.read_text().startswith(f"{render.BEGIN}\n| unseen victim | tuned PGD |")
    assert not (tmp_path / "mine.png").exists()


def test_figures_are_drawn_beside_the_files(rendered):
    for name in ("compare.png", "compare_steps.png"):
        assert (rendered[1] / name).stat().st_size > 5_000


def test_errors_of_render_name_the_argument(tmp_path):
    rows = [r for r in COMPARISON["rows"] if r["method"] != "lft"]
    (tmp_path / "mine.json").write_text(json.dumps({**COMPARISON, "rows": rows}))
    document = tmp_path / "README.md"
    document.write_text(f"{render.BEGIN}{render.END}")
    options = {"results": (str(tmp_path / "mine.json"),), "document": str(document)}
    for summary in (tables.summary, tables.brief):
        with pytest.raises(ValueError, match="results: a summary needs an lft, and none attacked toy_small_cnn_1000"):
            summary([{**COMPARISON, "rows": rows}])
    with pytest.raises(ValueError, match="results: all results files are rendered without --document"):
        render.render(render.Config(results=options["results"]))
    with pytest.raises(ValueError, match="has no marks"):
        render.render(render.Config(results=options["results"], document=options["results"][0]))
    seen = [{**row, "seen_victim": True} for row in rows]
    (tmp_path / "mine.json").write_text(json.dumps({**COMPARISON, "rows": seen}))
    render.render(render.Config(**options))
    assert "Victims that were in meta-training" in document.read_text()
    assert "each kind of method" not in document.read_text()


def test_results_of_an_unknown_program_are_refused(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"provenance": {"command": "python -m experiments.other"}}))
    document = tmp_path / "notes.md"
    document.write_text(f"{render.BEGIN}{render.END}")
    with pytest.raises(ValueError, match=r"mine\.json was written by other, which has no section"):
        render.render(render.Config(results=(str(tmp_path / "mine.json"),), document=str(document)))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("results/hard/mnist.json", "hard-mnist"),
        ("results/l2/results.json", "l2"),
        ("results/sine.json", "sine"),
        ("elsewhere/mine.json", "mine"),
    ],
)
def test_page_names(path, name):
    assert render.page_name(path) == name


def documents():
    paths = render.all_results(ROOT)
    return render.all_documents(ROOT, {path: json.loads((ROOT / path).read_text()) for path in paths})


def test_committed_pages_are_up_to_date():
    rendered = documents()
    stale = [
        path for path, text in rendered.items() if not (ROOT / path).is_file() or (ROOT / path).read_text() != text
    ]
    assert not stale, "run `python -m experiments.report.render --nodraw`"
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / render.PAGES).glob("*.md")}
    assert pages == {path for path in rendered if path.startswith(f"{render.PAGES}/")}


def links(document):
    """The files that a Markdown document links to, without anchors and web addresses."""
    found = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    return [target.partition("#")[0] for target in found if "://" not in target and not target.startswith("#")]


def test_links_in_documents_lead_to_files():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        missing = [target for target in links(document) if not (document.parent / target).exists()]
        assert not missing, document.relative_to(ROOT)


def test_breadth_cases_are_valid():
    sizes = set()
    for case in breadth.CASES:
        sizes.add(case.side)
        assert 2 <= case.classes <= 10
        assert case.source in ("digits", "mnist", "cifar10")
    assert {None, 224} <= sizes


def test_sizes_of_victims():
    # Counted by hand: 2 x 2 x 24 and 1 x 1 x 48 outputs of 9 products a channel, a hidden layer, logits.
    products = 2 * 2 * 24 * 9 * 3 + 48 * 9 * 24 + 48 * 64 + 64 * 10
    assert victims.size_of("small_cnn", 10, (4, 4, 3))[1] == 2 * products
    # One token: attention of a token to itself.
    tokens = 4 * 9 * 48 + 9 * 48 * 96 + 5 * (6 * 96 * 96 + 2 * 96) + 96 * 10
    assert victims.size_of("vit", 10, (4, 4, 1))[1] == 2 * tokens
    parameters, _ = victims.size_of("mobilenet", 10, (32, 32, 3))
    assert parameters == 205642  # as tests/victims/test_models.py counts them


def test_every_stored_victim_is_in_the_table():
    table = victims.victims_table(ROOT)
    names = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert sorted(names) == sorted(card.parent.name for card in ROOT.glob("victims/*/card.json"))
    (row,) = [line for line in table.splitlines() if "adversarial" in line]
    assert [cell.strip() for cell in row.split("|")[-4:-1]] == ["85.78", "56.05", "train"]
