"""Learners: the start, optimizer and objective of each, on linear victims of 4x4 images."""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lft_jax import AttackRecipe, Unroll, evaluation, learners
from lft_jax.meta.evolution import EvolutionStrategies
from lft_jax.meta.outer_loss import outer_losses, run_task
from lft_jax.meta.trainer import meta_trainer
from lft_jax.optimizers.rules import coordinate_lstm
from lft_jax.optimizers.transform import learned_fine_tuner
from lft_jax.tasks.regression import sine_family
from lft_jax.tasks.uap import uap_family

RULE = coordinate_lstm(3, 1, features=("raw", "progress"), output_scale=0.2)
STEPS, EPSILON = 3, 0.3
RNG = np.random.default_rng(0)
WEIGHTS = jnp.asarray(RNG.normal(size=(16, 3)).astype(np.float32))
KEYS = jax.random.split(jax.random.key(1), 2)


def linear(images):
    return images.reshape(len(images), -1) @ WEIGHTS[: images[0].size]


def family(height=4, **options):
    images = RNG.uniform(size=(30, height, 4, 1)).astype(np.float32)
    options = {"ways": 2, "query_shots": 2, "epsilon": EPSILON, "loss": "cross_entropy", **options}
    return uap_family(images, np.arange(30) % 3, linear, **options)


FAMILY = family()


def entropy(theta, batch):
    """The attacker's loss, by its definition."""
    chosen = jax.nn.log_softmax(linear(jnp.clip(batch.images + theta[None], 0, 1)))
    return jnp.mean(chosen[jnp.arange(len(batch.labels)), batch.labels])


@pytest.fixture(scope="module")
def by_hand():
    """`{objective: [tasks, K]}` losses of a plain loop over the rule's updates, and the rule's weights."""
    params = RULE.init(jax.random.key(0))

    @jax.jit
    def task(key):
        episode = FAMILY.sample(jax.random.split(key, 3)[0])
        tx, theta = learned_fine_tuner(params, RULE), jnp.zeros((4, 4, 1))
        state, losses = tx.init(theta), {"support": [], "query": []}
        for k in range(STEPS):
            updates, state = tx.update(jax.grad(entropy)(theta, episode.support), state, theta, progress=k / STEPS)
            theta = jnp.clip(theta + updates, -EPSILON, EPSILON)
            for name, batch in episode._asdict().items():
                losses[name].append(entropy(theta, batch))
        return losses

    tasks = [task(key) for key in KEYS]
    return {name: np.array([losses[name] for losses in tasks]) for name in tasks[0]}, params


@pytest.mark.parametrize(("make", "objective"), [(learners.lft, "query"), (learners.l2o, "support")])
def test_update_rules_are_judged_on_the_right_images(by_hand, make, objective):
    losses, params = by_hand
    learner = make(RULE)
    found = outer_losses(learner, params, FAMILY, KEYS, num_steps=STEPS, steps=np.arange(STEPS))
    np.testing.assert_allclose(found, losses[objective], rtol=1e-4, atol=1e-5)
    assert not np.allclose(losses["query"], losses["support"], rtol=1e-2)
    assert learner.name == make.__name__


def test_update_rules_of_one_description_share_an_optimizer():
    # Compiled programs are looked up by it.
    again = coordinate_lstm(3, 1, features=("raw", "progress"), output_scale=0.2)
    assert learners.lft(RULE).optimizer is learners.l2o(again).optimizer
    assert learners.lft(RULE).optimizer is not learners.lft(coordinate_lstm(4, 1)).optimizer


def test_update_rules_serve_families_of_any_shape():
    key = jax.random.key(2)
    params = learners.lft(RULE).init(key, (FAMILY, family(height=3)))
    jax.tree.map(np.testing.assert_array_equal, params, RULE.init(key))


@pytest.mark.parametrize(
    "make", [learners.lft, learners.l2o, learners.joint, lambda rule, **o: learners.maml(optax.sgd(0.1), **o)]
)
def test_second_order_is_passed_on(make):
    assert make(RULE, second_order=True).second_order
    assert not make(RULE, second_order=False).second_order


def test_maml_starts_tasks_from_its_parameters_inside_the_ball():
    learner = learners.maml(optax.sgd(0.1))
    random = family(recipe=AttackRecipe(augmentation=None, start="random"))
    params = learner.init(jax.random.key(0), (random, FAMILY))
    np.testing.assert_array_equal(params, random.init(jax.random.key(0)))
    np.testing.assert_allclose(learner.start(9 * params, FAMILY, KEYS[0]), np.clip(9 * params, -EPSILON, EPSILON))
    assert learner.objective == "query"
    assert learner.second_order


def test_an_adaptive_rule_first_descends_on_the_support_loss(by_hand):
    """Compared with a loop of gradient steps on the mean support loss; that gradient against finite differences."""
    params, key, rate = by_hand[1], KEYS[0], 0.5
    adaptive = learners.adaptive_lft(RULE, steps=2, learning_rate=rate)
    flat, unflatten = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def mean_support_loss(flat):
        return outer_losses(
            learners.l2o(RULE), unflatten(flat), FAMILY, key[None], num_steps=STEPS, steps=np.arange(STEPS)
        ).mean()

    expected = flat
    for _ in range(2):
        expected = expected - rate * jax.grad(mean_support_loss)(expected)
    direction = jnp.cos(jnp.arange(flat.size, dtype=flat.dtype))
    slope = (mean_support_loss(flat + 1e-2 * direction) - mean_support_loss(flat - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(slope, jax.grad(mean_support_loss)(flat) @ direction, rtol=0.02, atol=1e-4)

    found = run_task(adaptive, params, FAMILY, key, num_steps=STEPS)[1]
    plain = run_task(learners.lft(RULE), unflatten(expected), FAMILY, key, num_steps=STEPS)[1]
    np.testing.assert_allclose(found.thetas, plain.thetas, atol=2e-5)
    assert not np.allclose(found.thetas, run_task(learners.lft(RULE), params, FAMILY, key, num_steps=STEPS)[1].thetas)
    np.testing.assert_array_equal(found.queries, plain.queries + 2 * 2 * plain.queries[-1])
    judged = evaluation.evaluate(adaptive, params, FAMILY, KEYS[:1], num_steps=STEPS, at=(STEPS,))
    np.testing.assert_array_equal(judged["queries"][0], found.queries[-1:])


def test_an_adaptive_rule_is_meta_trained_through_its_adaptation_as_first_order_maml(by_hand):
    """The meta-gradient is that of the loss after adaptation, at the adapted weights."""
    params = by_hand[1]
    adaptive = learners.adaptive_lft(RULE, steps=1, learning_rate=0.5)

    def loss(learner, params):
        return outer_losses(learner, params, FAMILY, KEYS[:1], num_steps=STEPS, steps=np.arange(STEPS)).mean()

    support = functools.partial(loss, learners.l2o(RULE))
    adapted = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(support)(params))
    expected = jax.grad(functools.partial(loss, learners.lft(RULE)))(adapted)
    found = jax.grad(functools.partial(loss, adaptive))(params)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-3, atol=1e-5), found, expected)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        learners.adaptive_lft(RULE, steps=0)
    with pytest.raises(ValueError, match="learning_rate must be a finite number above 0, got -1"):
        learners.adaptive_lft(RULE, learning_rate=-1)


INITIALIZATIONS = [
    learners.maml(optax.sgd(0.1)),
    learners.reptile(optax.sgd(0.1)),
    learners.meta_sgd(0.1),
    learners.sign_maml(0.1),
    learners.anil(optax.sgd(0.1)),
    learners.joint(RULE),
]


@pytest.mark.parametrize("learner", INITIALIZATIONS, ids=lambda learner: learner.name)
def test_initializations_refuse_incongruous_families(learner):
    with pytest.raises(ValueError, match=rf"{learner.name} needs congruous tasks.*4, 4, 1.*3, 4, 1"):
        learner.init(jax.random.key(0), (FAMILY, FAMILY, family(height=3)))


def test_sign_maml_steps_along_the_sign_in_units_of_the_scale():
    learner = learners.sign_maml(0.2)
    start = jnp.asarray(RNG.uniform(-0.1, 0.1, (4, 4, 1)), jnp.float32)
    episode, trajectory = run_task(learner, start, FAMILY, KEYS[0], num_steps=STEPS)
    theta = start
    for found in trajectory.thetas:
        step = 0.2 * EPSILON * np.sign(jax.grad(entropy)(theta, episode.support))
        theta = jnp.clip(theta - step, -EPSILON, EPSILON)
        np.testing.assert_allclose(found, theta, atol=1e-6)
    # Without a scale, on any tree; a gradient of 0 gives an update of 0.
    tx = learner.optimizer(start)
    updates, _ = tx.update({"a": jnp.asarray([3.0, 0.0, -1e-9])}, tx.init(None))
    np.testing.assert_allclose(updates["a"], [-0.2, 0.0, 0.2])
    assert (learner.name, learner.objective, learner.second_order) == ("sign_maml", "query", False)


def test_the_full_meta_gradient_of_sign_maml_is_its_first_order_one():
    start = jnp.full((4, 4, 1), 0.01)

    def grad(second_order):
        learner = dataclasses.replace(learners.sign_maml(0.2), second_order=second_order)
        return jax.grad(lambda start: jnp.sum(losses_of(learner, start)))(start)

    grads = grad(False), grad(True)
    assert np.abs(grads[0]).max() > 0
    np.testing.assert_allclose(*grads, rtol=1e-5)


def test_anil_moves_the_head_alone():
    family = sine_family(widths=(3,), shots=4, query_shots=5)
    learner = learners.anil(optax.sgd(0.05), head=1)
    params = learner.init(jax.random.key(0), (family, family))
    episode, trajectory = run_task(learner, params, family, KEYS[0], num_steps=STEPS)
    theta = params
    for step in range(STEPS):
        head = jax.grad(lambda head, theta=theta: family.loss([theta[0], head], episode.support))(theta[1])
        theta = [params[0], jax.tree.map(lambda x, g: x - 0.05 * g, theta[1], head)]
        jax.tree.map(lambda f, e, k=step: np.testing.assert_allclose(f[k], e, rtol=1e-5), trajectory.thetas, theta)
    assert np.abs(theta[1]["weight"] - params[1]["weight"]).max() > 1e-4

    # The body is meta-learned too: the loss depends on it.
    def by_hand(params):
        theta = params
        for _ in range(STEPS):
            head = jax.grad(lambda head, theta=theta: family.loss([theta[0], head], episode.support))(theta[1])
            theta = [params[0], jax.tree.map(lambda x, g: x - 0.05 * g, theta[1], head)]
        return family.loss(theta, episode.query)

    def last_loss(params):
        return outer_losses(learner, params, family, KEYS[:1], num_steps=STEPS, steps=np.arange(STEPS))[0, -1]

    found, expected = jax.grad(last_loss)(params), jax.grad(by_hand)(params)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-3, atol=1e-5), found, expected)
    assert np.abs(found[0]["weight"]).max() > 0
    assert (learner.name, learner.objective, learner.second_order) == ("anil", "query", True)
    assert not learners.anil(optax.sgd(0.1), second_order=False).second_order


@pytest.mark.parametrize(("head", "families"), [("head", (FAMILY,)), (2, (sine_family(widths=(3,)),))])
def test_anil_needs_a_head(head, families):
    with pytest.raises(ValueError, match=f"anil fine-tunes a head: .* an entry {head!r}, got"):
        learners.anil(optax.sgd(0.1), head=head).init(KEYS[0], families)


def losses_of(learner, params, **options):
    return outer_losses(learner, params, FAMILY, KEYS, num_steps=STEPS, steps=np.arange(STEPS), **options)


@pytest.mark.parametrize("size", [0.1, 0.6])  # the second one is partly outside the ball
def test_reptile_moves_towards_the_end_of_fine_tuning(size):
    learner = learners.reptile(optax.sgd(0.5))
    params = jnp.asarray(RNG.uniform(-size, size, (4, 4, 1)), jnp.float32)
    start, ends = jnp.clip(params, -EPSILON, EPSILON), []
    for key in KEYS:  # by hand
        episode, theta = FAMILY.sample(jax.random.split(key, 3)[0]), start
        for _ in range(STEPS):
            theta = jnp.clip(theta - 0.5 * jax.grad(entropy)(theta, episode.support), -EPSILON, EPSILON)
        ends.append(theta)
    losses, pull_back = jax.vjp(lambda params: losses_of(learner, params), params)
    expected = [np.sum(np.square(start - end)) / 2 for end in ends]
    np.testing.assert_allclose(losses, np.repeat(np.asarray(expected)[:, None], STEPS, axis=1), rtol=1e-4)
    (grad,) = pull_back(jnp.zeros((2, STEPS)).at[:, -1].set(0.5))
    np.testing.assert_allclose(grad, start - np.mean(ends, axis=0), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="window: reptile differentiates nothing"):
        meta_trainer(learner, [FAMILY], meta_optimizer=optax.sgd(0.1), unroll=Unroll(window=2))
    with pytest.raises(ValueError, match="meta_gradient: reptile has no outer loss"):
        meta_trainer(learner, [FAMILY], meta_optimizer=optax.sgd(0.1), meta_gradient=EvolutionStrategies())


def test_joint_is_the_rule_from_a_start_of_its_own(by_hand):
    _, weights = by_hand
    learner = learners.joint(RULE)
    random = family(recipe=AttackRecipe(augmentation=None, start="random"))
    params = learner.init(jax.random.key(0), (random, FAMILY))
    assert np.abs(params["start"]).max() > 0
    assert jax.tree.structure(params["rule"]) == jax.tree.structure(weights)
    # From zeros it equals the LFT, from another start it does not, and both parts have meta-gradients.
    zero = {"start": jnp.zeros((4, 4, 1)), "rule": weights}
    np.testing.assert_allclose(losses_of(learner, zero), losses_of(learners.lft(RULE), weights), rtol=1e-6)
    moved = losses_of(learner, {**zero, "start": 9 * jnp.ones((4, 4, 1))})
    assert not np.allclose(moved, losses_of(learner, zero), rtol=1e-3)
    grads = jax.grad(lambda params: jnp.sum(losses_of(learner, params)))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in [*jax.tree.leaves(grads["start"]), grads["rule"]["head"]["weight"]])


def test_meta_sgd_is_maml_when_all_rates_are_equal():
    ours, maml = learners.meta_sgd(0.4), learners.maml(optax.sgd(0.4))
    start = jnp.asarray(RNG.uniform(-0.1, 0.1, (4, 4, 1)), jnp.float32)
    params = ours.init(jax.random.key(0), (FAMILY,))
    np.testing.assert_array_equal(params["rates"], np.float32(0.4))
    params = {**params, "start": start}
    np.testing.assert_allclose(losses_of(ours, params), losses_of(maml, start), rtol=1e-6)
    grads = jax.grad(lambda params: jnp.sum(losses_of(ours, params)))(params)
    expected = jax.grad(lambda start: jnp.sum(losses_of(maml, start)))(start)
    np.testing.assert_allclose(grads["start"], expected, rtol=1e-4, atol=1e-7)
    # The derivatives of all rates sum to that of one shared learning rate.
    rate = jax.grad(lambda rate: jnp.sum(losses_of(learners.maml(optax.sgd(rate)), start)))(jnp.float32(0.4))
    np.testing.assert_allclose(np.sum(grads["rates"]), rate, rtol=1e-4)
    assert (ours.objective, ours.second_order, learners.meta_sgd(0.1, second_order=False).second_order) == (
        "query",
        True,
        False,
    )


def test_a_learning_rate_must_be_positive():
    with pytest.raises(ValueError, match="learning_rate must be a finite number above 0, got 0"):
        learners.meta_sgd(0.0)
    with pytest.raises(ValueError, match="learning_rate must be a finite number above 0, got -1"):
        learners.sign_maml(-1)


def test_a_hand_designed_optimizer_takes_its_settings_as_params():
    learner = learners.fixed("descent", optax.sgd)

    @jax.jit
    def update(rate):
        tx = learner.optimizer({"learning_rate": rate})
        return tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0]

    np.testing.assert_allclose(update(0.25), -0.25)
    np.testing.assert_array_equal(learner.start({}, FAMILY, KEYS[0]), 0)
    with pytest.raises(ValueError, match="descent has nothing to meta-learn"):
        learner.init(KEYS[0], (FAMILY,))
