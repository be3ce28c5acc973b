import json

import numpy as np
import pytest

from experiments.report import render, sections
from experiments.studies import zo_l2l

METHODS = {"update_rnn", "update_rnn + query_rnn", "update_rnn + guided"}
METHODS |= {name + tuned for name in zo_l2l.BASELINES for tuned in ("", " (tuned)")}


@pytest.mark.standard_promotion
def test_all_methods_attack_the_same_images_with_the_same_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(zo_l2l, "RATES", (4.0, 8.0))
    flags = zo_l2l.Config(
        output=str(tmp_path / "zo_l2l.json"),
        victim="victims/digits_small_cnn_1000",
        update_steps=2,
        query_steps=2,
        num_steps=4,
        window=2,
        meta_images=20,
        images=2,
        runs=3,
    )
    zo_l2l.zo_l2l(flags)
    results = json.loads((tmp_path / "zo_l2l.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert rows.keys() == METHODS
    assert [row["loss"][-1] for row in results["rows"]] == sorted(row["loss"][-1] for row in results["rows"])
    for row in rows.values():
        assert len(row["loss"]) == len(row["loss_interval"]) == 4 and np.all(np.isfinite(row["loss"]))
        assert row["queries"] == [21, 42, 63, 84]
        np.testing.assert_allclose(np.mean(row["final_loss_by_image"]), row["loss"][-1])
        difference = row["loss"][-1] - rows["update_rnn"]["loss"][-1]
        np.testing.assert_allclose(row["difference_to_update_rnn"][0], difference, atol=1e-12)
    for name, (_, rate) in zo_l2l.BASELINES.items():
        published, tuned = rows[name], rows[f"{name} (tuned)"]
        assert published["rate_times_d"] == rate
        assert tuned["rate_times_d"] == (4, 8)[int(np.argmin(tuned["tuning_losses"]))]
        # Equal settings give equal results: images, starts and directions are the same for all methods.
        assert (tuned["loss"] == published["loss"]) == (tuned["rate_times_d"] == rate)

    section = sections.zo_l2l_section(results, "results/zo_l2l.json", "../results/zo_l2l")
    assert "By the last step's loss: " + " < ".join(row["method"] for row in results["rows"]) + "." in section
    assert f"| zo_adam, learning rate 8 / d | {rows['zo_adam']['loss'][-1]:.2f} ± " in section
    header, *_ = (line for line in section.splitlines() if line.startswith("|"))
    assert {line.count("|") for line in section.splitlines() if line.startswith("|")} == {header.count("|")}
    assert (tmp_path / "zo_l2l.png").stat().st_size > 10_000
    assert render.KINDS["zo_l2l"][0] is sections.zo_l2l_section
