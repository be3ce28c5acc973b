"""Stored rules: saved rules can be loaded, and errors name the damaged file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax import pretrained
from lft_jax.optimizers.rules import MomentumUpdate, coordinate_lstm, spatial_lstm
from lft_jax.optimizers.spectral import spectral_lstm
from lft_jax.optimizers.transform import learned_fine_tuner
from lft_jax.pretrained import list_pretrained, load_fine_tuner, load_pretrained, pretrained_card, save_rule

RULES = {
    "coordinate": coordinate_lstm(3, 2, features=("log_sign", "constraint"), base_update=MomentumUpdate(0.3, 0.7)),
    "spatial": spatial_lstm(3, 1, maps=(2,), features="raw", base_update=None),
    "spectral": spectral_lstm(3, step=0.5),
}
CARD = {"command": "python -m experiments.meta_train", "seeds": [0]}


def weights(rule, seed=0):
    leaves, structure = jax.tree.flatten(jax.eval_shape(rule.init, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])


@pytest.fixture
def stored(tmp_path):
    """The path of a stored rule."""
    path = tmp_path / "folder" / "rule.safetensors"
    save_rule(path, weights(RULES["coordinate"]), RULES["coordinate"], CARD)
    return path


@pytest.mark.parametrize("name", RULES)
def test_a_saved_rule_can_be_loaded(tmp_path, name):
    params, path = weights(RULES[name]), tmp_path / "rule.safetensors"
    save_rule(path, params, RULES[name], CARD)
    loaded, rule = load_pretrained(str(path))
    assert rule == RULES[name]
    assert hash(rule) == hash(RULES[name])
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(loaded))
    card = pretrained_card(str(path))
    assert {key: card[key] for key in CARD} == CARD
    # A "rule" entry in the given card is overwritten by the description of the stored rule.
    save_rule(path, params, RULES[name], {**card, "rule": {}})
    assert load_pretrained(str(path))[1] == RULES[name]


def test_a_file_that_changes_is_read_again(stored):
    before = load_fine_tuner(str(stored))
    assert load_fine_tuner(str(stored)) is before  # so that programs compiled for it are reused
    params = weights(RULES["spatial"], seed=1)
    save_rule(stored, params, RULES["spatial"], CARD)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(str(stored))[0], params)
    assert load_fine_tuner(str(stored)) is not before


def test_loaded_parameters_are_a_new_tree(stored):
    load_pretrained(str(stored))[0]["head"].clear()
    assert load_pretrained(str(stored))[0]["head"]


def test_unknown_names_list_near_matches(monkeypatch, stored):
    monkeypatch.setattr(pretrained, "_FOLDER", stored.parent)
    assert list_pretrained() == ["rule"]
    assert load_pretrained("rule")[1] == RULES["coordinate"]
    for use in (load_pretrained, load_fine_tuner, pretrained_card):
        with pytest.raises(ValueError, match=r"name: unknown name 'rules'. Did you mean 'rule'\?"):
            use("rules")


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .safetensors, got .*rule.npz"):
        save_rule(tmp_path / "rule.npz", {}, RULES["spatial"], CARD)


def swap_weights(path):
    other = path.with_name("other.safetensors")
    save_rule(other, weights(RULES["spatial"]), RULES["spatial"], CARD)
    path.write_bytes(other.read_bytes())


def rewrite_card(change):
    def damage(path):
        card = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(change(card)))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), r"rule.safetensors cannot be read .*truncated"),
        (lambda path: path.write_bytes(b""), r"rule.safetensors cannot be read .*truncated"),
        (lambda path: path.unlink(), r"rule.safetensors cannot be read"),
        (lambda path: path.with_suffix(".json").unlink(), r"the card .*rule.json .* cannot be read"),
        (lambda path: path.with_suffix(".json").write_bytes(b"\xff{"), r"the card .*rule.json .* cannot be read"),
        (rewrite_card(lambda card: [card]), r"the card .*rule.json .* cannot be read"),
        (rewrite_card(lambda card: CARD), r"the card of .*rule.safetensors does not describe a rule"),
        (rewrite_card(lambda card: {**card, "rule": {"hidden": 3}}), r"the card of .*rule.safetensors does not"),
        (
            rewrite_card(lambda card: {**card, "rule": {**card["rule"], "start": {"speed": 1}}}),
            r"the card of .*rule.safetensors does not describe a rule",
        ),
        (
            rewrite_card(lambda card: {**card, "meta_training": {"second_loss": "dominant"}}),
            r"rule.safetensors is a rule for two losses \(second_loss='dominant'\), which only lft_jax 0.2 has",
        ),
        (swap_weights, r"rule.safetensors holds other weights than expected"),
    ],
    ids=[
        "cut",
        "empty",
        "no weights",
        "no card",
        "no text",
        "a list",
        "no rule",
        "half a rule",
        "bad base update",
        "two losses",
        "swapped",
    ],
)
def test_errors_name_the_damaged_file(stored, damage, message):
    damage(stored)
    with pytest.raises(ValueError, match=message):
        load_pretrained(str(stored))


@pytest.mark.parametrize("name", list_pretrained())
def test_every_shipped_rule_is_small_works_and_has_its_provenance(name):
    params, rule = load_pretrained(name)
    assert (pretrained._FOLDER / f"{name}.safetensors").stat().st_size < 1e6
    card = pretrained_card(name)
    assert {"rule", "command", "commit", "versions", "seeds", "meta_test", "where_it_fails"} <= card.keys()
    tx = learned_fine_tuner(params, rule)
    for grad in (jnp.zeros((8, 8, 1)), jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 3)), jnp.float32)):
        updates, _ = jax.jit(tx.update)(grad, tx.init(grad), grad)
        assert np.all(np.isfinite(updates))
