"""Shipped rules match their cards, and a run is shipped with a card."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import meta_train
from experiments.studies import ship
from lft_jax import pretrained
from lft_jax.pretrained import list_pretrained, load_pretrained, pretrained_card


@pytest.mark.parametrize("name", list_pretrained())
def test_shipped_rules_match_their_cards(name):
    """On 20 small tasks. Tolerances are wide, since steps along a sign amplify rounding errors."""
    params, rule = load_pretrained(name)
    card = pretrained_card(name)
    found = ship.check(params, rule, card)
    assert abs(found["asr"] - card["check"]["asr"]) < 0.03
    for norm in ("l1", "l2", "linf"):
        assert found[norm] == pytest.approx(card["check"][norm], rel=0.05)
    untrained = ship.check(jax.tree.map(jnp.zeros_like, params), rule, card)  # the base update alone
    assert any(abs(untrained[name] / card["check"][name] - 1) > 0.02 for name in card["check"])


def test_ship_writes_the_rule_and_its_card(tmp_path, monkeypatch):
    flags = meta_train.Config(victims=(), workdir="", rule="coordinate_lstm", hidden=2, layers=1, num_steps=3)
    rule = meta_train.rule_of(flags)
    stored = {
        "learner": "lft",
        "victims": ["victims/mnist_lenet_4"],
        "rule": "coordinate_lstm",
        "hidden": 2,
        "num_steps": 3,
    }
    params = rule.init(jax.random.key(0))
    pretrained.save_rule(tmp_path / "run" / "rule.safetensors", params, rule, {"seeds": [3], "meta_training": stored})
    row = dict.fromkeys(ship._SHOWN, 0)
    rows = [
        {**row, "method": method, "other": 1}
        for method in ("pgd", "pgd, augmented", "lft (mnist)", "lft (cifar10)", "oracle")
    ]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(ship.pretrained, "__file__", str(tmp_path / "package" / "__init__.py"))
    monkeypatch.setattr(ship, "check", lambda *given: {"asr": 0.5})
    results = str(tmp_path / "results.json")
    ship.ship(ship.Config(run=str(tmp_path / "run"), name="mine", fails="Often.", results=(results,)))
    name = str(tmp_path / "package" / "mine.safetensors")
    card = pretrained_card(name)
    assert card["seeds"] == [3]
    assert card["where_it_fails"] == "Often."
    assert card["check"] == {"asr": 0.5}
    assert card["meta_test"] == [{"file": results, **row, "method": method} for method in ("pgd", "lft (mnist)")]
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(name)[0], params)


@pytest.mark.parametrize("name", list_pretrained())
def test_shipped_rules_are_loaded_by_name(name):
    flags, learned = meta_train.load_learned(name)
    params, rule = load_pretrained(name)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, learned.params, [params]))
    described = meta_train.rule_of(flags)  # the flags describe the rule, but for a step that was changed afterwards
    if (step := pretrained_card(name).get("step")) is not None:
        assert step == {"meta_training": described.step, "shipped": rule.step}
        described = dataclasses.replace(described, step=rule.step)
    assert described == rule
    assert flags.workdir == name
    assert len(flags.victims) >= 2
    assert meta_train.tasks_of(flags).augment


def test_names_of_neither_a_run_nor_a_shipped_rule_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        meta_train.load_learned(str(tmp_path / "uap-linf"))
