"""Pages of the study of public models: rows, paired differences, the ceiling, the legend and the figures."""

import copy

import pytest

from experiments.report import figures, public


def row(method, asr, steps=20, difference=None, images=10):
    return {
        "method": method,
        "steps": steps,
        "images": images,
        "draw_asr": [asr, asr],
        "asr": asr,
        "asr_interval": 0.015,
        "fooling_rate": asr + 0.01,
        "fooling_rate_interval": None,
        "evaluations": 1000.0,
        "seconds": 1.26,
        **({} if difference is None else {"difference": {"to": "uap-linf", "asr": difference, "interval": 0.02}}),
    }


RESULTS = {
    "about": {
        "model": "toy",
        "role": "test",
        "source": "toys",
        "norm": "linf",
        "epsilon": 8 / 255,
        "queries": 50,
        "support": 20,
        "split": "test",
    },
    "clean_accuracy": 0.9,
    "ceiling": {},
    "rows": [row("uap-linf", 0.7), row("sga", 0.72, difference=0.02), row("sign-patterns", 0.6, difference=-0.1)],
    "provenance": {"command": "python -m experiments.studies.public", "commit": "abc", "device": "1 x cpu"},
}


@pytest.fixture
def results():
    return copy.deepcopy(RESULTS)


def test_rows_are_in_order_with_differences(results):
    text = public.public_section(results, "results/public/toy.json", "../toy")
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert table == [
        "| `sign-patterns` | 2 | 60.0 ± 1.5 | -10.0 ± 2.0 | 61.0 | 1000 | 1.3 |",
        "| `uap-linf` | 2 | 70.0 ± 1.5 |  | 71.0 | 1000 | 1.3 |",
        "| `sga` | 2 | 72.0 ± 1.5 | +2.0 ± 2.0 | 73.0 | 1000 | 1.3 |",
    ]
    assert "minus `uap-linf`" in text and "## Attacks on `toy`" in text and "2308.06015" in text
    assert "- `patterns`" in text and "- `tile`" not in text and ".png" not in text


def test_rows_of_another_device_are_marked(results):
    for measured, device in zip(results["rows"], ("1 x cpu", "1 x gpu"), strict=False):
        measured["device"] = device
    text = public.public_section(results, "results/public/toy.json", "../toy")
    assert [line.startswith("| `sga`") for line in text.splitlines() if "1.3† |" in line] == [True]
    assert "† measured on 1 x gpu." in text and "among 20 others" in text


def test_what_is_measured_besides_is_shown(results, tmp_path):
    results["picture"] = ["sga"]
    results["rows"] += [row("sga", 0.5, steps=5), row("uap-linf", 0.4, steps=5)]
    runs = [{"steps": 7}, {"steps": 7}]
    results["ceiling"] = {
        "asr": 0.9,
        "fooling_rate": 0.91,
        "loss": "hinge",
        "target": None,
        "start": "tiles",
        "evaluations": 2800,
        "runs": runs,
    }
    text = public.public_section(results, "results/public/toy.json", "../toy")
    assert "Ceiling: 90.0" in text and "2 runs of 7 momentum" in text and "loss hinge, start tiles; 2800" in text
    assert "![success rate against K and the number of support images](../toy.png)" in text
    assert "(../toy_perturbations.png)" in text and "and images with the classes" in text
    results["about"]["source"] = "imagenet_sample"
    assert "are not shown): `sga`." in public.public_section(results, "results/public/toy.json", "../toy")
    figures.public(results, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 5000


def test_numbers_of_images_have_a_panel_of_their_own(results, tmp_path, monkeypatch):
    results["rows"] += [row("sga", 0.5, images=0), row("sga", 0.7, images=500), row("uap-linf", 0.4, steps=5)]
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    figures.public(results, tmp_path / "toy.png")
    steps, images = drawn[0].axes
    assert (steps.get_xlabel(), images.get_xlabel()) == ("K", "support images")
    (line,) = images.containers
    x, y = line.lines[0].get_data()
    known = next(each for each in results["rows"] if each["method"] == "sga")
    assert (list(x), list(y)) == ([0, known["images"], 500], [0.5, known["asr"], 0.7])


def test_one_number_of_steps_has_no_curve(results, tmp_path):
    figures.public(results, tmp_path / "toy.png")
    assert not (tmp_path / "toy.png").exists()


def test_settings_of_a_grid_have_a_page_of_their_own(results):
    results["rows"] = [row("sga step=0.4 final=1", 0.5)]
    text = public.public_section(results, "results/public/grid/toy.json", "../toy")
    assert "## Settings of baselines on `toy`" in text and "- `sga`" in text


def test_tuned_settings_are_told_from_frozen_ones(results):
    results["rows"].append(row("sga step=0.4 final=1", 0.9, difference=0.2))
    text = public.public_section(results, "results/public/toy.json", "../toy")
    assert "## Attacks on `toy`" in text and "- a method with its settings: tuned" in text
    assert "step=0.4" not in public.public_brief([results])


def test_the_brief_names_the_strongest_rival(results):
    results["rows"] += [row("spatial-linf-plain", 0.9, difference=0.2), row("sga", 0.99, images=50, difference=0.3)]
    lines = public.public_brief([results]).splitlines()
    assert lines[2:] == [
        "| `toy` | 20 | `sga`, 72.0 ± 1.5 | 70.0 ± 1.5 | level (-2.0 ± 2.0) |",
    ]
    results["rows"][1]["difference"]["asr"] = -0.03
    assert "ahead (+3.0 ± 2.0)" in public.public_brief([results])
    results["rows"][1]["difference"] |= {"asr": 0.1, "interval": None}
    assert "-10.0, one draw" in public.public_brief([results])


def test_a_model_with_fewer_than_two_rivals_is_left_out_of_the_brief(results):
    assert [row["method"] for row in results["rows"][:2]] == ["uap-linf", "sga"]
    for number in (2, 1):
        results["rows"] = results["rows"][:number]
        assert public.public_brief([results]).count("\n") == 2


def test_the_last_line_has_the_best_other_method_over_all_models(results):
    """By a loop: the means of draws, their variance over draws, and Student's t with one degree of freedom."""
    draws = {
        "uap-linf": ((0.6, 0.8), (0.4, 0.5)),
        "sga": ((0.5, 0.5), (0.5, 0.4)),  # the best on average
        "sign-patterns": ((0.8, 0.9), (0.0, 0.1)),
        "short-steps": ((1.0, 1.0), (1.0, 1.0)),  # a stage of uap-linf
    }
    found = [copy.deepcopy(results), copy.deepcopy(results)]
    for model, (name, each) in enumerate(zip(("toy", "other"), found, strict=True)):
        each["about"]["model"] = name
        each["rows"] = [
            {**row(method, sum(values[model]) / 2, difference=0.1), "draw_asr": list(values[model])}
            for method, values in draws.items()
        ]
    found[0]["rows"] += [row("adam", 0.99, difference=0.1)]  # not measured on the other one
    found[1]["rows"][1]["draw_asr"].append(1.0)  # another draw, that not all have
    *_, last = public.public_brief(found).splitlines()

    def summary(parts):
        means = [sum(part) / 2 for part in parts]
        variances = [sum((x - mean) ** 2 for x in part) for part, mean in zip(parts, means, strict=True)]
        return 100 * sum(means) / 2, 100 * 12.7062 * (sum(variances) / 2 / 4) ** 0.5

    own, rival = (summary(draws[name]) for name in ("uap-linf", "sga"))
    pairs = [[a - b for a, b in zip(*each, strict=True)] for each in zip(draws["uap-linf"], draws["sga"], strict=True)]
    mean, width = summary(pairs)
    assert last == (
        f"| the mean of all 2 | 20 | `sga`, {rival[0]:.1f} ± {rival[1]:.1f} | {own[0]:.1f} ± {own[1]:.1f} | "
        f"level ({mean:+.1f} ± {width:.1f}) |"
    )
    assert "the mean of all" not in public.public_brief(found[:1])
