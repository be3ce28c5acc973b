"""The study of defences, on small numbers, and its page."""

import dataclasses
import json

import pytest

import lft_jax
from experiments.report.defence import defence_section, defence_summary
from experiments.studies import defence
from lft_jax.optimizers import hand_designed

SIGN = hand_designed.projected_gradient(0.4)


@pytest.mark.standard_promotion
@pytest.mark.filterwarnings("ignore:Without a pattern, the model classifies only")  # after one epoch
def test_cells_are_measured_once_and_shown(tmp_path, monkeypatch):
    monkeypatch.setitem(defence.EPOCHS, "digits", 1)
    monkeypatch.setitem(defence.TRAINING, "digits", {"epochs": 1})
    plain = {"attack": SIGN, "search": None, "perturbations": 1}
    monkeypatch.setattr(defence, "HARDENINGS", {"none": None, "learned": plain})
    few = {"optimizer": SIGN, "recipe": defence.ATTACKS["sign steps"]["recipe"], "steps": 2}
    monkeypatch.setattr(defence, "ATTACKS", {"uap-linf": few, "sign steps on many images": few})
    monkeypatch.setattr(defence, "MANY", 30)
    path = tmp_path / "digits.json"
    flags = defence.Config(
        source="digits", hardenings=("none",), draws=1, queries=50, output=str(path), workdir=str(tmp_path / "victims")
    )
    first = defence.study(flags)
    assert [(row["defence"], row["attack"]) for row in first["rows"]] == [
        ("none", "uap-linf"),
        ("none", "sign steps on many images"),
    ]
    # More draws and hardenings are added to what is there; weights are read.
    monkeypatch.setattr(defence, "train_victim", None)
    found = defence.study(dataclasses.replace(flags, hardenings=(), draws=2))
    assert json.loads(path.read_text()) == found
    assert [len(row["draw_asr"]) for row in found["rows"]] == [2, 2, 2, 2]
    assert found["rows"][0]["draw_asr"][:1] == first["rows"][0]["draw_asr"]
    assert all(0 <= row["asr"] <= 1 and 0 < row["clean_accuracy"] <= 1 for row in found["rows"])
    assert len(found["histories"]["learned"]["loss"]) == 1 and found["histories"]["none"] == {}
    found["rows"].append({**found["rows"][0], "part": "art", "defence": "JPEG"})
    page = defence_section(found, "results/defence/digits.json", "")
    row = found["rows"][3]
    assert f"| learned | {100 * row['clean_accuracy']:.1f} | " in page
    assert f"{100 * row['asr']:.1f} ± {100 * row['asr_interval']:.1f} |" in page
    assert "| preprocessor | clean accuracy | made on the plain model |" in page and "| JPEG |" in page
    # The audits of the networks before and after.
    budget = lft_jax.AuditBudget(support_images=(5,), queries=(30,), draws=1, methods=("patterns",))
    monkeypatch.setattr(defence, "BUDGET", budget)
    found = defence.study(dataclasses.replace(flags, hardenings=(), draws=2, audit=True))
    assert json.loads(path.read_text()) == found and list(found["audits"]) == ["none", "learned"]
    audit = found["audits"]["learned"]
    assert audit["split"] == {"support": 10, "choice": 7, "query": 33} and audit["failures"] == []
    assert [threat["epsilon"] for threat in audit["threats"]] == [0.125, 0.25]
    assert (tmp_path / "victims/digits_learned_audit/index.html").is_file()
    row, threat = found["rows"][3], audit["threats"][1]
    for text in (defence_section(found, "results/defence/digits.json", ""), defence_summary([found])):
        assert f"| learned | {100 * row['clean_accuracy']:.1f} | " in text
        assert f"| learned | 0.25 | {100 * audit['clean_accuracy']['rate']:.1f} | {threat['short']} | " in text
        assert f"| {100 * threat['accuracy']['rate']:.1f} | {audit['verdict']} |" in text
    monkeypatch.setattr(defence, "MANY", 40)
    with pytest.raises(ValueError, match="is of other settings"):
        defence.study(flags)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="hardenings: unknown name 'learnt'"):
        defence.study(defence.Config(hardenings=("learnt",)))
    with pytest.raises(ValueError, match="attacks: unknown name 'uap'"):
        defence.study(defence.Config(attacks=("uap",)))
