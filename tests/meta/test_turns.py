"""Families that take turns in meta-steps, and the bound on the meta-gradient of each, against closed forms."""

import jax
import numpy as np
import optax
import pytest

from lft_jax import learners
from lft_jax.meta.evolution import PersistentEvolutionStrategies
from lft_jax.meta.mesh import task_mesh
from lft_jax.meta.trainer import meta_trainer
from lft_jax.optimizers.rules import coordinate_lstm
from tests.meta.quadratics import KEY, RATE, maml_closed_form, meta_gradient, quadratic

FAMILIES = [quadratic(0, tag="a"), quadratic(1, tag="b"), quadratic(2, tag="a"), quadratic(3), quadratic(4, tag="b")]
MAML = learners.maml(optax.sgd(RATE), second_order=True)


def trainer_of(families=FAMILIES, **options):
    settings = {"num_steps": 1, "tasks_per_family": 1, "meta_optimizer": optax.sgd(1.0)}
    return meta_trainer(MAML, families, **settings, **options)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_families_take_turns_in_their_order(count):
    trainer = trainer_of(families_per_step=count)
    state = trainer.init(KEY)
    for step in range(6):
        chosen = [(step * count + j) % len(FAMILIES) for j in range(count)]
        each = [maml_closed_form(FAMILIES[i], np.float64(state.params), second_order=True) for i in chosen]
        grads, metrics = meta_gradient(trainer, state)
        np.testing.assert_allclose(grads, np.mean([grad for _, grad in each], 0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(metrics["family_loss"])[chosen], [loss for loss, _ in each], rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], np.mean([loss for loss, _ in each]), rtol=1e-5)
        assert np.flatnonzero(np.isfinite(metrics["final_loss"])).tolist() == sorted(chosen)
        state = trainer.step(state)[0]


def test_turns_are_the_same_on_a_mesh():
    alone, shared = (trainer_of(families_per_step=2, mesh=mesh) for mesh in (None, task_mesh(1)))
    one, other = alone.step(alone.init(KEY)), shared.step(shared.init(KEY))
    np.testing.assert_allclose(one[0].params, other[0].params, rtol=1e-6)
    np.testing.assert_allclose(one[1]["family_loss"], other[1]["family_loss"], rtol=1e-6)


@pytest.mark.parametrize("bound", [0.1, 1.0, 100.0])
def test_the_meta_gradient_of_each_family_is_clipped(bound):
    trainer = trainer_of(max_family_norm=bound)
    state = trainer.init(KEY)
    grads = [maml_closed_form(family, np.float64(state.params), second_order=True)[1] for family in FAMILIES]
    expected = np.mean([grad * min(1, bound / np.linalg.norm(grad)) for grad in grads], 0)
    np.testing.assert_allclose(meta_gradient(trainer, state)[0], expected, rtol=1e-5)


def test_a_family_out_of_turn_keeps_its_particles():
    strategies = PersistentEvolutionStrategies(window=1, pairs=2, sigma=0.1)
    families = [quadratic(0, tag="a"), quadratic(1, tag="b")]
    options = {"num_steps": 2, "tasks_per_family": 1, "meta_optimizer": optax.sgd(1e-3), "meta_gradient": strategies}
    trainer = meta_trainer(
        learners.lft(coordinate_lstm(2, 1, features="raw")), families, families_per_step=1, **options
    )
    before = trainer.init(KEY)
    after = trainer.step(before)[0]
    first, second = ([np.asarray(x) for x in jax.tree.leaves(after.particles[i])] for i in (0, 1))
    kept = [np.asarray(x) for x in jax.tree.leaves(before.particles[1])]
    assert all(np.array_equal(a, b) for a, b in zip(second, kept, strict=True))
    assert not all(np.array_equal(a, np.zeros_like(a)) for a in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families_per_step": 0}, "families_per_step must be at least 1"),
        ({"families_per_step": 6}, "families_per_step must be at most 5, the families, got 6"),
        ({"max_family_norm": 0.0}, "max_family_norm must be"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(**options)


def test_clipping_on_several_devices_is_refused():
    class Two:
        size = 2

    assert task_mesh(1).size == 1
    with pytest.raises(
        ValueError, match="max_family_norm: gradients of a family on 2 devices are not clipped together"
    ):
        trainer_of(max_family_norm=1.0, mesh=Two())
