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


def test_flags_describe_estimators():
    assert meta_train.estimator_of(flags()) is None
    assert meta_train.estimator_of(flags(meta_gradient="es", es_pairs=3, es_sigma=0.1)) == EvolutionStrategies(3, 0.1)
    for name, value in {"second_order": True, "window": 5}.items():
        with pytest.raises(ValueError, match=f"{name}: evolution strategies differentiate nothing"):
            meta_train.estimator_of(flags(meta_gradient="es", **{name: value}))
