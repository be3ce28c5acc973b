"""Imitation of a hand-designed optimizer: the distance, its meta-gradient, and the trained rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lft_jax import Stages, Unroll
from lft_jax.evaluation import baselines
from lft_jax.meta import learners
from lft_jax.meta.evolution import EvolutionStrategies
from lft_jax.meta.imitation import Imitation, imitating
from lft_jax.meta.outer_loss import outer_losses
from lft_jax.meta.trainer import meta_trainer
from lft_jax.optimizers.rules import coordinate_lstm
from lft_jax.optimizers.transform import learned_fine_tuner
from lft_jax.tasks.quadratic import quadratic_family
from lft_jax.tasks.uap import uap_family

KEY = jax.random.key(2)
RULE = coordinate_lstm(2, 1, features="raw", output_scale=0.5)
STEPS, EPSILON = 3, 0.3
RNG = np.random.default_rng(0)
WEIGHTS = jnp.asarray(RNG.normal(size=(16, 3)).astype(np.float32))


def test_the_distance_is_that_of_a_plain_loop():
    """On perturbations in a ball: the oracle reports a scale, and projection is not part of an update."""
    images = RNG.uniform(size=(30, 4, 4, 1)).astype(np.float32)
    victim = lambda images: images.reshape(len(images), -1) @ WEIGHTS  # noqa: E731
    family = uap_family(images, np.arange(30) % 3, victim, ways=2, query_shots=2, epsilon=EPSILON, loss="cross_entropy")
    params = RULE.init(KEY)
    teacher = baselines.projected_gradient(0.8, 0.5)
    learner = imitating(learners.lft(RULE), teacher)
    options = {"num_steps": STEPS, "steps": np.arange(STEPS)}
    found = jax.jit(lambda keys: outer_losses(learner, params, family, keys, **options))(KEY[None])[0]

    @jax.jit
    def by_hand(key):
        oracle = family.oracle(family.sample(jax.random.split(key, 3)[0]).support)
        tx, theta, momentum, distances = learned_fine_tuner(params, RULE), jnp.zeros((4, 4, 1)), 0, []
        state = tx.init(theta)
        for k in range(STEPS):
            answer = oracle(theta, key)
            momentum = answer.grads + 0.5 * momentum
            updates, state = tx.update(answer.grads, state, theta, progress=k / STEPS, **answer.extras)
            distances.append(jnp.mean((updates / EPSILON + 0.8 * jnp.sign(momentum)) ** 2))
            theta = jnp.clip(theta + updates, -EPSILON, EPSILON)
        return jnp.stack(distances)

    np.testing.assert_allclose(found, by_hand(KEY), rtol=1e-5)
    assert np.all(found > 0.1)


@pytest.mark.parametrize("window", [None, 1])
def test_the_teacher_is_a_constant(x64, window):
    """With a learning rate r, and 1 for the teacher, the updates differ by (1 - r) times the gradient."""
    family = quadratic_family(np.asarray([1.0, 0.5]), support=2, query=2)
    learner = imitating(learners.fixed("descent", optax.sgd), optax.sgd(1.0))
    options = {"num_steps": STEPS, "steps": np.arange(STEPS), "unroll": Unroll(window=window)}
    support = family.sample(jax.random.split(KEY, 3)[0]).support

    def total(rate):
        return jnp.sum(outer_losses(learner, {"learning_rate": rate}, family, KEY[None], **options))

    value, slope = jax.value_and_grad(total)(0.3)
    theta, squares = np.zeros(2), 0
    for _ in range(STEPS):
        grads = np.asarray(family.curvature) * (theta - np.mean(support, axis=0))
        theta, squares = theta - 0.3 * grads, squares + np.mean(grads**2)
    np.testing.assert_allclose([value, slope], [0.7**2 * squares, -2 * 0.7 * squares], rtol=1e-10)


def test_a_rule_learns_from_its_teacher_on_a_model_without_gradients(opaque_family):
    """Imitation uses backpropagation; the meta-steps after it use the meta-gradient that was chosen."""
    imitation = Imitation(baselines.projected_gradient(0.5), 60)
    trainer = meta_trainer(
        learners.lft(coordinate_lstm(4, 1, output_scale=1.0)),
        [opaque_family],
        num_steps=2,
        tasks_per_family=4,
        meta_optimizer=optax.rmsprop(0.03),
        stages=Stages([(1, 1)], imitation),
        meta_gradient=EvolutionStrategies(1),
        unroll=Unroll("final"),
    )
    state, losses = trainer.init(KEY), []
    for _ in range(60):
        state, metrics = trainer.step(state)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[0], 0.25, rtol=0.2)  # an untrained rule makes small updates
    assert np.mean(losses[-10:]) < 0.25 * losses[0]
    assert metrics["skipped"] == 0
    _, metrics = trainer.step(state)  # the first meta-step without imitation, on a loss without a derivative
    assert metrics["grad_norm"] > 0


def test_learners_without_an_update_rule_cannot_imitate():
    with pytest.raises(ValueError, match="learner: reptile has no update rule"):
        imitating(learners.reptile(optax.sgd(0.1)), optax.sgd(0.1))
    with pytest.raises(ValueError, match="meta_steps must be at least 1, got 0"):
        Imitation(optax.sgd(0.1), 0)
