import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import common
from experiments.studies import public_models
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


def test_tasks_of_a_public_model(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(100, 130)  # one image of each class
    model = public_models.PublicModel("training", "imagenet_sample", 0.1, lambda weights, x: x, dict, {})
    monkeypatch.setitem(public_models.MODELS, "small", model)
    monkeypatch.setattr(
        public_models, "load", lambda name: lambda x: jnp.eye(130)[jnp.sum(x, (1, 2, 3)).astype(int) % 130]
    )
    found = public_models.PublicImages(images, labels, images[:0], labels[:0])
    monkeypatch.setattr(public_models, "load_images", lambda *_, **__: found)
    settings = common.TaskConfig(ways=3, query_shots=2, epsilon={"imagenet_sample": 0.1}, beta=5.0)
    family = common.family_of("public/small", "train", settings)
    assert family.objective == AttackLoss("cross_entropy", beta=5.0) and family.recipe.loss.beta == 12.0
    support, query = family.sample(jax.random.key(0))
    drawn = np.concatenate([support.labels, query.labels])
    assert len(support.labels) == 3 and len(set(drawn.tolist())) == 9  # true classes, and no image twice
    np.testing.assert_allclose(support.images, images[support.labels - 100] / np.float32(255), rtol=1e-6)
    assert len({(label - 100) // 10 for label in support.labels.tolist()}) == 3  # of three groups of images
    with pytest.raises(ValueError, match="victims: public/small has images for meta-training only, got split 'test'"):
        common.family_of("public/small", "test", settings)
    with pytest.raises(ValueError, match="victims: public: unknown name 'smal'"):
        common.family_of("public/smal", "train", settings)


def test_tasks_of_the_first_images_of_a_source():
    victim = "victims/digits_small_cnn_1000"
    whole, few = (common.family_of(victim, "train", common.TaskConfig(images=n)) for n in (None, 300))
    np.testing.assert_array_equal(few.images, whole.images[:300])
