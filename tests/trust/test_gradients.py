"""A random sample of the cells of `python -m tests.trust.gradients`, and what the table is."""

import collections
import functools
import inspect
import random

import jax
import numpy as np
import pytest

from lft_jax.optimizers.features import FEATURES
from lft_jax.optimizers.rules import RULES
from tests.trust import gradients
from tests.trust.test_symmetries import random_signals, random_weights, steps

REFUSED: collections.Counter[str] = collections.Counter()
TABLE = list(gradients.programs(REFUSED))
#: Two programs, of the exact gradient and of estimates; the latter of one oracle.
SAMPLE = [
    random.Random(1).choice([p for p in TABLE if p.rule and (None in p.oracles.values()) == exact]) for exact in (1, 0)
]


def test_the_table_has_all_rules_features_oracles_and_learners():
    assert {program.rule for program in TABLE} == {"", *RULES}
    assert {name for program in TABLE for name in program.features} == {"", "all", *FEATURES}
    assert {name for program in TABLE for name in program.oracles} >= {"gradient", "gaussian"}
    assert len(TABLE[0].oracles) + len(TABLE[-1].oracles) == 1 + len(gradients.DRAW)
    names = {program.learner.removesuffix(" of second order") for program in TABLE}
    assert names >= {"lft", "l2o", "adaptive_lft", "maml", "sign_maml", "anil", "reptile", "meta_sgd", "joint"}
    bounds = {gradients.named(constraint) for constraint in TABLE[0].constraints}
    assert bounds == {"linf ball", "l2 ball", "l1 penalty", "l2 penalty"}
    said = "\n".join(REFUSED)
    for refusal in ("no 'l1' ball", "no 'linf' penalty", "unexpected keyword argument 'features'"):
        assert refusal in said


@pytest.mark.parametrize("program", SAMPLE, ids=lambda program: f"{program.rule} {program.learner}")
def test_a_sample_of_meta_gradients_equals_finite_differences(program):
    name = random.Random(2).choice(list(program.oracles))
    program = program._replace(oracles={name: program.oracles[name]})
    cells = gradients.checked(program, REFUSED)
    assert len(cells) == len(program.features) * len(program.constraints)
    worst = max(cells, key=lambda cell: cell.error)
    assert worst.error <= gradients.TOLERANCE, worst
    assert all(cell.slope > 1e-5 for cell in cells)  # the weights matter


@pytest.mark.slow
def test_a_wrong_meta_gradient_is_found(monkeypatch):
    """Without the derivative of the projection."""
    program = next(p for p in TABLE if p.rule == "spectral_lstm" and p.learner == "lft" and "gradient" in p.oracles)
    bowl = gradients.Bowl.project
    monkeypatch.setattr(
        gradients.Bowl, "project", lambda self, theta: theta + jax.lax.stop_gradient(bowl(self, theta) - theta)
    )
    errors = {cell.constraint: cell.error for cell in gradients.checked(program, REFUSED)}
    assert errors.pop("l2 ball") > 0.01
    assert max(errors.values()) <= gradients.TOLERANCE


@pytest.mark.parametrize("name", [name for name in RULES if "features" in inspect.signature(RULES[name]).parameters])
def test_a_rule_with_weights_of_0_is_that_of_the_other_features(name):
    rng, feature = np.random.default_rng(0), random.Random(3).choice(list(FEATURES))
    rule = gradients.rule_of(name)
    params = random_weights(rule, rng)
    kept = jax.tree.map(lambda p, k: np.float32(p * k), params, gradients._kept(params, rule, feature))
    alone = gradients.dataclasses.replace(rule, features=(feature,))
    first = sum(FEATURES[f].size for f in gradients.ALL[: gradients.ALL.index(feature)])
    own, rest = slice(first, first + FEATURES[feature].size), slice(rule.num_features, None)
    few = jax.tree.map(np.copy, params)
    cell = few["cells"][0]["weight"]
    few["cells"][0]["weight"] = np.concatenate([cell[:, own], cell[:, rest]], 1)
    for layer in few["convolutions"][:1]:
        layer["weight"] = layer["weight"].reshape(-1, 9, rule.num_features)[:, :, own].reshape(len(layer["bias"]), -1)
    run = functools.partial(steps, signals=random_signals(rng, (4, 4, 1)), progress=np.float32(0.5))
    np.testing.assert_allclose(run(rule, kept), run(alone, few), rtol=1e-4, atol=1e-6)
