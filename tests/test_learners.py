"""What is meta-learned: each learner's start, optimizer and objective, on linear victims of 4x4 images."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lft_jax import learners
from lft_jax.meta import outer_losses
from lft_jax.rules import coordinate_lstm
from lft_jax.tasks.uap import uap_family
from lft_jax.transform import learned_fine_tuner

RULE = coordinate_lstm(3, 1, features=("raw", "progress"), output_scale=0.2)
STEPS, EPSILON = 3, 0.3
RNG = np.random.default_rng(0)
WEIGHTS = jnp.asarray(RNG.normal(size=(16, 3)).astype(np.float32))
KEYS = jax.random.split(jax.random.key(1), 2)


def linear(images):
    return images.reshape(len(images), -1) @ WEIGHTS[: images[0].size]


def family(height=4, **options):
    images = RNG.uniform(size=(30, height, 4, 1)).astype(np.float32)
    options = {"ways": 2, "queries": 2, "epsilon": EPSILON, "loss": "cross_entropy", **options}
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
    # Programs are found again by it.
    again = coordinate_lstm(3, 1, features=("raw", "progress"), output_scale=0.2)
    assert learners.lft(RULE).optimizer is learners.l2o(again).optimizer
    assert learners.lft(RULE).optimizer is not learners.lft(coordinate_lstm(4, 1)).optimizer


def test_update_rules_serve_families_of_any_shape():
    key = jax.random.key(2)
    params = learners.lft(RULE).init(key, (FAMILY, family(height=3)))
    jax.tree.map(np.testing.assert_array_equal, params, RULE.init(key))


@pytest.mark.parametrize("make", [learners.lft, learners.l2o, lambda rule, **o: learners.maml(optax.sgd(0.1), **o)])
def test_second_order_is_passed_on(make):
    assert make(RULE, second_order=True).second_order
    assert not make(RULE, second_order=False).second_order


def test_maml_starts_tasks_from_its_parameters_inside_the_ball():
    learner = learners.maml(optax.sgd(0.1))
    random = family(start="random")
    params = learner.init(jax.random.key(0), (random, FAMILY))
    np.testing.assert_array_equal(params, random.init(jax.random.key(0)))
    np.testing.assert_allclose(learner.start(9 * params, FAMILY, KEYS[0]), np.clip(9 * params, -EPSILON, EPSILON))
    assert learner.objective == "query"
    assert learner.second_order


def test_maml_refuses_incongruous_families():
    with pytest.raises(ValueError, match=r"maml needs congruous tasks.*4, 4, 1.*3, 4, 1"):
        learners.maml(optax.sgd(0.1)).init(jax.random.key(0), (FAMILY, FAMILY, family(height=3)))


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
