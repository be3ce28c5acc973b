import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import common, config, meta_train
from lft_jax.evaluation import baselines
from lft_jax.meta.evolution import EvolutionStrategies, PersistentEvolutionStrategies
from lft_jax.optimizers import rules
from lft_jax.pretrained import pretrained_card
from lft_jax.tasks import PatternSearch, Proxies
from lft_jax.victims import load_victim


def flags(**changes):
    return meta_train.Config(victims=(), workdir="unused", **changes)


def test_flags_describe_rules():
    assert meta_train.rule_of(flags()) == rules.spatial_lstm(base_update=rules.MomentumUpdate(0.8, 0.5))
    described = flags(
        rule="coordinate_lstm", features=("adam",), hidden=5, layers=2, base_update="none", output_scale=0.01
    )
    assert meta_train.rule_of(described) == rules.coordinate_lstm(5, 2, features="adam", output_scale=0.01)
    spectral = flags(rule="spectral_lstm", hidden=5, base_step=0.4, base_decay=0.9, tau=2.0)
    assert meta_train.rule_of(spectral) == rules.spectral_lstm(5, step=0.4, decay=0.9, tau=2.0)


def test_flags_describe_the_images_and_the_start_of_a_step():
    described = flags(proxies=True, patterns=25, radius_factor=2.0, epsilon=("digits=0.1",), ways=2)
    victim = Path(__file__).parents[2] / "victims" / "digits_small_cnn_1000"
    family = common.make_family(load_victim(victim), "test", meta_train.tasks_of(described))
    assert family.recipe.augmentation == Proxies()
    assert family.recipe.search == PatternSearch.within(25)
    assert family.radius_factor == 2


def test_flags_describe_tasks():
    tasks = meta_train.tasks_of(flags(epsilon=("digits=0.1",), shots=3, loss="hinge", task_start="random"))
    assert (tasks.epsilon, tasks.shots, tasks.loss, tasks.start) == ({"digits": 0.1}, 3, "hinge", "random")


@pytest.mark.parametrize("name", config.LEARNERS)
def test_flags_describe_learners(name):
    learner = meta_train.learner_of(flags(learner=name))
    assert learner.name == name
    assert learner.objective == {"l2o": "support", "reptile": "end"}.get(name, "query")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "spacial_lstm"}, r"rule: unknown name 'spacial_lstm'. Did you mean 'spatial_lstm'"),
        ({"learner": "mamll"}, r"learner: unknown name 'mamll'. Did you mean 'maml'"),
        ({"features": ("momentun",)}, r"features: unknown name 'momentun'. Did you mean 'momentum'"),
    ],
)
def test_unknown_names_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        meta_train.learner_of(flags(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learner": "maml", "hidden": 3}, "hidden: maml learns no update rule; leave it out"),
        ({"kappa": 5.0}, "kappa: lft minimises no hinge; leave it out"),
        ({"rule": "spectral_lstm", "features": ("raw",)}, "features: lft has features and layers of its own"),
        ({"tau": 2.0}, "tau: lft has no tau, without --rule=spectral_lstm"),
        ({"waves": 10, "patterns": 10}, "waves: lft searches for one start"),
        ({"proxies": True, "augment": False}, "augment: lft uses proxies instead"),
        ({"learner": "meta_sgd", "features": ("raw",)}, "features: meta_sgd learns no update rule"),
        ({"base_update": "none", "base_step": 0.1}, "base_step: lft has no base update"),
        ({"learner": "joint", "inner_step": 0.1}, "inner_step: joint fine-tunes by its own rule"),
        ({"learner": "reptile", "step_weights": "final"}, "step_weights: reptile uses no derivative of an unroll"),
        ({"learner": "reptile", "second_order": True}, "second_order: reptile uses no derivative of an unroll"),
        (
            {"learner": "sign_maml", "second_order": True},
            "second_order: sign_maml steps along a sign, whose derivative",
        ),
        ({"learner": "sign_maml", "hidden": 3}, "hidden: sign_maml learns no update rule"),
        ({"adaptation_rate": 0.1}, "adaptation_rate: lft does not adapt its weights"),
        ({"learner": "adaptive_lft", "num_directions": 3}, "num_directions: adaptive_lft differentiates the loss"),
        ({"learner": "adaptive_lft", "meta_gradient": "es"}, "meta_gradient: adaptive_lft differentiates the loss"),
        ({"resolution": 8}, "resolution: lft uses exact gradients, without --num_directions"),
        ({"sampler": True}, "sampler: lft uses exact gradients, without --num_directions"),
        ({"sampler": True, "learner": "joint", "num_directions": 3}, "sampler: joint has no sampler of directions"),
        ({"features": ("raw", "update")}, "features: update is a feature of samplers"),
        ({"per_example": True}, "per_example: lft uses exact gradients, without --num_directions"),
        ({"basis": "dct", "num_directions": 3}, "basis: lft has no subspace of directions, without --resolution"),
        ({"es_pairs": 3}, "es_pairs: lft does not use evolution strategies, without --meta_gradient=es"),
        ({"es_window": 5}, "es_window: lft has no windows, without --meta_gradient=pes"),
        ({"meta_gradient": "pes"}, "es_window: pes needs a window that divides num_steps = 20, got None"),
        ({"meta_gradient": "truncated_es", "es_window": 3}, "es_window: truncated_es needs a window that divides"),
        ({"meta_gradient": "pes", "es_window": 5, "curriculum": (5, 20)}, "curriculum: lft has short windows already"),
        (
            {"meta_gradient": "pes", "es_window": 5, "step_weights": "final"},
            "step_weights: with final, all windows except the last",
        ),
        ({"meta_gradient": "pes", "es_window": 5, "learner": "adaptive_lft"}, "meta_gradient: adaptive_lft diff"),
        ({"curriculum": (5, 10)}, r"curriculum: expected .* to num_steps = 20, got \(5, 10\)"),
        ({"curriculum": (10, 5, 20)}, "curriculum: expected .* increasing numbers"),
        ({"curriculum": (0, 20)}, "curriculum: expected .* from at least 1"),
        (
            {"curriculum": (5, 10, 20), "meta_steps": 2},
            "curriculum: expected at most meta_steps = 2 increasing numbers",
        ),
        ({"learner": "maml", "imitation_steps": 5}, "imitation_steps: maml learns no update rule"),
        ({"imitation_decay": 0.9}, "imitation_decay: lft imitates nothing, without --imitation_steps"),
        ({"imitation_steps": 1000}, "imitation_steps: expected fewer than meta_steps = 1000, got 1000"),
        ({"imitation_steps": -1}, "imitation_steps: expected fewer than meta_steps = 1000, got -1"),
        ({"imitation_steps": 5}, "imitation_steps: the base update .* equals the update to imitate"),
        ({"penalty": 0.1, "norm": "l1", "epsilon": ("digits=0.1",)}, "epsilon: lft has a penalty"),
        (
            {"learner": "maml", "step_weights": "final", "window": 5},
            "window: the loss of the last of 20 steps, truncated to 5 steps",
        ),
    ],
)
def test_flags_without_effect_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        meta_train.meta_train(flags(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learner": "maml", "inner_step": 0.1, "step_weights": "final"},
        {"learner": "maml", "window": 5},
        {"learner": "sign_maml", "inner_step": 0.1},
        {"learner": "joint", "hidden": 3, "base_step": 0.1},
        {"meta_gradient": "es", "es_pairs": 3},
        {"meta_gradient": "pes", "es_window": 5, "imitation_steps": 5, "base_update": "none"},
        {"curriculum": (5, 10, 20), "imitation_steps": 5, "imitation_step": 0.2},
    ],
)
def test_flags_with_an_effect_are_accepted(changes):
    meta_train.check(flags(**changes))


def test_flags_describe_meta_gradients():
    assert meta_train.meta_gradient_of(flags()) is None
    assert meta_train.meta_gradient_of(flags(meta_gradient="es", es_pairs=3, es_sigma=0.1)) == EvolutionStrategies(
        3, 0.1
    )
    for name, value in {"second_order": True, "window": 5}.items():
        for meta_gradient in ("es", "pes"):
            with pytest.raises(ValueError, match=f"{name}: evolution strategies use no derivatives"):
                meta_train.meta_gradient_of(flags(meta_gradient=meta_gradient, **{name: value}))
    for meta_gradient, accumulate in {"pes": True, "truncated_es": False}.items():
        found = meta_train.meta_gradient_of(flags(meta_gradient=meta_gradient, es_window=5, es_pairs=3))
        assert found == PersistentEvolutionStrategies(5, 3, 0.01, accumulate)


@pytest.mark.parametrize(
    ("lengths", "meta_steps", "expected"),
    [((), 10, []), ((20,), 10, []), ((5, 20), 10, [(5, 5)]), ((5, 10, 20), 10, [(5, 3), (10, 3)])],
)
def test_flags_describe_curricula(lengths, meta_steps, expected):
    assert meta_train.curriculum_of(flags(curriculum=lengths, meta_steps=meta_steps)) == expected


def test_flags_describe_teachers():
    assert meta_train.imitation_of(flags()) is None
    found = meta_train.imitation_of(flags(imitation_steps=7, imitation_step=0.2, imitation_decay=0.9))
    assert found.meta_steps == 7
    teacher, expected, theta = found.teacher, baselines.projected_gradient(0.2, 0.9), jnp.zeros(3)
    states = [tx.init(theta) for tx in (teacher, expected)]
    for grads in jnp.asarray([[1.0, -2.0, 0.5], [-0.95, 0.1, 0.3]]):
        (update, states[0]), (other, states[1]) = (
            tx.update(grads, state, theta, scale=0.3) for tx, state in zip((teacher, expected), states, strict=True)
        )
        np.testing.assert_array_equal(update, other)
        assert np.any(update)


def test_missing_flags_of_old_runs_get_their_former_values():
    present = meta_train.present_flags({})
    assert (present["augment"], present["curriculum"], present["window"]) == (False, (), None)
    assert not {"victims", "workdir", "remat"} & present.keys()


@pytest.mark.parametrize("name", sorted(config.PRESETS))
def test_presets_equal_the_meta_training_of_shipped_rules(name):
    """Except the seed and the folder of the victims."""
    shipped = meta_train.flags_of(pretrained_card(name.replace("_", "-"))["meta_training"])
    preset = meta_train.Config(workdir="", seed=shipped.seed, **config.PRESETS[name])
    meta_train.check(preset)
    assert [Path(v).name for v in preset.victims] == [Path(v).name for v in shipped.victims]
    assert dataclasses.replace(preset, victims=()) == dataclasses.replace(shipped, victims=())


def test_flags_of_version_0_1_are_read_under_their_present_names():
    old = {"victims": ["a"], "start": "none", "start_step": 0.1, "start_decay": 0.2, "queries": 7, "weights": "linear"}
    found = meta_train.flags_of(old, "there")
    assert (found.base_update, found.base_step, found.base_decay) == ("none", 0.1, 0.2)
    assert (found.query_shots, found.step_weights, found.victims, found.workdir) == (7, "linear", ("a",), "there")


def test_runs_of_version_0_2_are_read_unless_they_have_what_is_gone():
    for absent in ({}, {"second_loss": "none"}, {"second_loss": None}):
        assert meta_train.flags_of({"victims": ["a"], **absent}) == meta_train.flags_of({"victims": ["a"]})
    with pytest.raises(ValueError, match=r"second_loss: only version 0\.2 has this flag, got 'dominant'"):
        meta_train.flags_of({"victims": ["a"], "second_loss": "dominant"})
    with pytest.raises(ValueError, match="base_update: unknown name 'gradient'"):
        meta_train.rule_of(meta_train.flags_of({"victims": ["a"], "start": "gradient"}))
