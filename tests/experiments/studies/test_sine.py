import json

import numpy as np
import pytest

from experiments import common
from experiments.report import sections
from experiments.studies import sine


@pytest.mark.standard_promotion
def test_every_method_is_evaluated_on_its_networks(tmp_path):
    flags = sine.Config(
        output=str(tmp_path / "sine.json"),
        widths=(4, 3),
        seeds=(0,),
        maml_steps=100,
        lft_steps=100,
        published_steps=100,
        num_tasks=5,
        workdir=str(tmp_path / "runs"),
    )
    first = sine.sine(flags)
    kept = [path for path in tmp_path.rglob("seed_0_*") if path.is_dir()]
    assert len(kept) == 1 + 3 + 2
    ready = [path.stat().st_mtime_ns for path in kept]
    again = sine.sine(flags)  # loads the stored meta-parameters
    assert [path.stat().st_mtime_ns for path in kept] == ready
    assert again["rows"] == first["rows"] and again["published"] == first["published"]
    assert [row["method"] for row in first["published"]] == list(sine.PUBLISHED)
    rows = json.loads((tmp_path / "sine.json").read_text())["rows"]
    methods = {width: [row["method"] for row in rows if row["width"] == width] for width in (4, 3)}
    assert methods[3] == ["lft", "sgd", "adam"]
    assert methods[4] == [*methods[3], "maml", "meta_sgd", "reptile"]
    for row in rows:
        assert len(row["error"]) == 10 and np.all(np.isfinite(row["error"]))
    of = {row["method"]: row for row in rows if row["width"] == 3}
    np.testing.assert_allclose(of["lft"]["difference_to_sgd"][0], of["lft"]["error"][-1] - of["sgd"]["error"][-1])
    assert of["sgd"]["difference_to_sgd"] == [0, 0]
    assert of["adam"]["setting"] in sine.GRIDS["adam"]
    section = sections.sine_section(
        json.loads((tmp_path / "sine.json").read_text()), "results/sine.json", "../results/sine"
    )
    assert section.count("| lft | ") == 2
    obtained = first["published"][0]["error"][0]
    assert f"| maml | 0.77 ± 0.11 | {obtained:.3f} ± " in section
    assert (tmp_path / "sine.png").stat().st_size > 10_000
    adam = of["adam"]["setting"]
    named = f"| adam, learning rate {adam['learning_rate']}, b1 {adam['b1']} | "
    assert f"{named}{of['adam']['error'][0]:.3f} ± " in section


def test_means_with_infinite_errors_are_none():
    values = np.asarray([[1.0, 2.0], [3.0, np.inf], [2.0, 4.0], [2.0, 5.0]])
    row = common.curve_row("error", values, {"sgd": np.zeros_like(values)})
    assert row["error"] == (2.0, None) and row["error_interval"][1] is None
    assert row["diverged"] == [0, 0.25]
    assert row["difference_to_sgd"] == (None, None)
    shown = sections._curve_lines([{"method": "sgd", **row, "difference_to_adam": (0.5, 0.1)}], "error", "{}", "{:+}")
    assert shown[-2].endswith("| not finite | not finite | +0.5 ± 0.1 |")
