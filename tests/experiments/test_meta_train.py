import pytest

from experiments import meta_train
from lft_jax import rules
from lft_jax.estimators import EvolutionStrategies


def flags(**changes):
    return meta_train.Config(victims=(), workdir="unused", **changes)


def test_flags_describe_rules():
    assert meta_train.rule_of(flags()) == rules.spatial_lstm(start=rules.MomentumStart(0.8, 0.5))
    described = flags(rule="coordinate_lstm", features=("adam",), hidden=5, layers=2, start="none", output_scale=0.01)
    assert meta_train.rule_of(described) == rules.coordinate_lstm(5, 2, features="adam", output_scale=0.01)


def test_flags_describe_tasks():
    tasks = meta_train.tasks_of(flags(epsilon=("digits=0.1",), shots=3, loss="hinge", task_start="random"))
    assert (tasks.epsilon, tasks.shots, tasks.loss, tasks.start) == ({"digits": 0.1}, 3, "hinge", "random")


@pytest.mark.parametrize("name", meta_train.LEARNERS)
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
        ({"learner": "meta_sgd", "features": ("raw",)}, "features: meta_sgd learns no update rule"),
        ({"start": "none", "start_step": 0.1}, "start_step: lft has no hand-made update to add to"),
        ({"learner": "joint", "inner_step": 0.1}, "inner_step: joint fine-tunes by its own rule"),
        ({"learner": "reptile", "weights": "final"}, "weights: reptile differentiates nothing"),
        ({"learner": "reptile", "second_order": True}, "second_order: reptile differentiates nothing"),
        (
            {"learner": "sign_maml", "second_order": True},
            "second_order: sign_maml steps along a sign, whose derivative",
        ),
        ({"learner": "sign_maml", "hidden": 3}, "hidden: sign_maml learns no update rule"),
        ({"adaptation_rate": 0.1}, "adaptation_rate: lft does not adapt its weights"),
        ({"learner": "adaptive_lft", "num_directions": 3}, "num_directions: adaptive_lft differentiates the loss"),
        ({"learner": "adaptive_lft", "meta_gradient": "es"}, "meta_gradient: adaptive_lft differentiates the loss"),
        ({"resolution": 8}, "resolution: lft is given exact gradients, without --num_directions"),
        ({"es_pairs": 3}, "es_pairs: lft does not use evolution strategies, without --meta_gradient=es"),
        ({"penalty": 0.1, "norm": "l1", "epsilon": ("digits=0.1",)}, "epsilon: lft is given a penalty"),
        ({"learner": "maml", "weights": "final", "window": 5}, "window: the last of 20 steps alone, cut off after 5"),
    ],
)
def test_flags_without_a_use_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        meta_train.meta_train(flags(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learner": "maml", "inner_step": 0.1, "weights": "final"},
        {"learner": "maml", "window": 5},
        {"learner": "sign_maml", "inner_step": 0.1},
        {"learner": "joint", "hidden": 3, "start_step": 0.1},
        {"meta_gradient": "es", "es_pairs": 3},
    ],
)
def test_flags_of_use_are_not(changes):
    meta_train.check(flags(**changes))


def test_flags_describe_estimators():
    assert meta_train.estimator_of(flags()) is None
    assert meta_train.estimator_of(flags(meta_gradient="es", es_pairs=3, es_sigma=0.1)) == EvolutionStrategies(3, 0.1)
    for name, value in {"second_order": True, "window": 5}.items():
        with pytest.raises(ValueError, match=f"{name}: evolution strategies differentiate nothing"):
            meta_train.estimator_of(flags(meta_gradient="es", **{name: value}))
