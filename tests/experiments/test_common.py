import sys
import types

import jax
import jax.numpy as jnp
import pytest

from experiments import common
from lft_jax import oracles
from lft_jax.cli import provenance
from lft_jax.tasks.perturbation import AttackLoss, Constraint
from lft_jax.victims import DEFAULT_EPSILON, Victim, build_model


def test_provenance_names_the_module_and_omits_local_folders(monkeypatch):
    main = types.SimpleNamespace(__spec__=types.SimpleNamespace(name="benchmarks.meta_step"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(
        sys, "argv", ["/somewhere/meta_step.py", "--repeats=2", "--data_dir=/private", "--compilation_cache=/mine"]
    )
    assert provenance.describe([0])["command"] == "python -m benchmarks.meta_step --repeats=2"
    monkeypatch.setattr(main, "__spec__", None)  # of a console script
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lft-attack", "--steps=3"])
    assert provenance.describe([0])["command"] == "lft-attack --steps=3"


def test_task_config_sets_constraint_losses_and_estimator():
    model = build_model("small_cnn", 10)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    card = {"architecture": "small_cnn", "num_classes": 10, "image_shape": [8, 8, 1], "source": "digits"}
    victim = Victim(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(like)), card)
    ball = common.make_family(victim, "train", common.TaskConfig())
    assert (ball.constraint, ball.estimator) == (Constraint("linf", DEFAULT_EPSILON["linf"]["digits"]), None)
    assert ball.objective == ball.recipe.loss == AttackLoss("cross_entropy")
    hinge = common.make_family(victim, "train", common.TaskConfig(loss="hinge", kappa=3.0))
    assert (hinge.objective.kind, hinge.objective.kappa) == ("hinge", 3.0)
    penalty = common.make_family(victim, "train", common.TaskConfig(norm="l1", penalty=0.1, num_directions=4))
    assert (penalty.constraint, penalty.estimator) == (Constraint("l1", None, 0.1), oracles.ZerothOrder(4))
    with pytest.raises(
        ValueError, match=r"penalty: expected a penalty or radii, not both; got 0\.1 and \{'digits': 0\.2\}"
    ):
        common.make_family(victim, "train", common.TaskConfig(norm="l1", penalty=0.1, epsilon={"digits": 0.2}))
