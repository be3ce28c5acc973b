"""Evolution strategies compared with gradients, within their sampling error."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lft_jax import Stages, Unroll
from lft_jax.evaluation import baselines
from lft_jax.meta import learners
from lft_jax.meta.evolution import EvolutionStrategies, PersistentEvolutionStrategies
from lft_jax.meta.trainer import meta_trainer
from lft_jax.optimizers.rules import coordinate_lstm
from lft_jax.tasks.quadratic import QuadraticFamily, quadratic_family

KEY = jax.random.key(5)


def test_a_linear_loss_has_its_gradient_and_the_stated_variance(x64):
    params = {"a": jnp.ones((4, 5)), "b": jnp.zeros(30)}
    slopes = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)

    def loss(params):
        value = sum(jnp.sum(s * x) for s, x in zip(jax.tree.leaves(slopes), jax.tree.leaves(params), strict=True))
        return value, {"twice": 2 * value}

    pairs, size = 5000, 50
    (value, aux), grads = EvolutionStrategies(pairs, 0.3)(loss, params, KEY)
    np.testing.assert_allclose(value, loss(params)[0])  # mirrored points cancel
    np.testing.assert_allclose(aux["twice"], 2 * value)
    error = optax.tree.norm(jax.tree.map(jnp.subtract, grads, slopes)) ** 2
    expected = (size + 1) * optax.tree.norm(slopes) ** 2 / pairs
    assert 0.4 < error / expected < 2  # a sum of fifty squares scatters by a fifth


def test_it_is_the_gradient_of_the_smoothed_loss(x64):
    # E sin(x + s e) = exp(-s^2 / 2) sin(x); its variance is below 1 / (2 s)^2.
    sigma, pairs = 0.8, 40_000
    _, grad = EvolutionStrategies(pairs, sigma)(lambda x: (jnp.sin(x), ()), jnp.asarray(0.3), KEY)
    expected = np.exp(-(sigma**2) / 2) * np.cos(0.3)
    assert abs(grad - expected) < 4 / (2 * sigma) / np.sqrt(pairs) < 0.05 * expected


def test_in_meta_training_it_agrees_with_backpropagation(x64):
    rule = coordinate_lstm(2, 1, features="raw", output_scale=0.5)
    families = [quadratic_family(np.asarray(c), support=3, query=3) for c in ([1.0, 0.5], [0.3, 0.2, 0.1])]

    def gradient(strategies):
        options = {"num_steps": 3, "tasks_per_family": 2, "meta_optimizer": optax.sgd(1.0), "meta_gradient": strategies}
        trainer = meta_trainer(learners.lft(rule), families, **options)
        state = trainer.init(jax.random.key(0))
        after, metrics = trainer.step(state)
        return jax.tree.map(jnp.subtract, state.params, after.params), metrics

    exact, of_exact = gradient(None)
    pairs = 3000
    found, of_found = gradient(EvolutionStrategies(pairs, 1e-3))
    for name in ("loss", "family_loss", "final_loss"):
        np.testing.assert_allclose(of_found[name], of_exact[name], rtol=1e-4)
    size, norm = optax.tree.size(exact), float(optax.tree.norm(exact))
    error = float(optax.tree.norm(jax.tree.map(jnp.subtract, found, exact)))
    # Each of two families has half the weight and random directions of its own.
    assert error < 2 * norm * np.sqrt((size + 1) / pairs) < 0.5 * norm


# ---- Windows ----


def sum_over_windows(strategies, windows, key):
    """The estimated derivative of `sum_t s_t` by x, where `s_t = s_(t-1) + x`, with one step per window."""

    def loss(x, s):
        return ((s + x, ()), s + x)

    def window(particles, inputs):
        number, key = inputs
        (_, grad), particles = strategies(loss, jnp.asarray(0.7), particles, key, begins=number == 0)
        return particles, grad

    # The sum of an earlier episode must be ignored.
    particles = jax.tree.map(lambda x: x + 5, strategies.init(jnp.asarray(0.0), jnp.asarray(0.0)))
    particles = particles._replace(carried=jnp.zeros_like(particles.carried))
    _, grads = jax.lax.scan(window, particles, (jnp.arange(windows), jax.random.split(key, windows)))
    return jnp.sum(grads)


@pytest.mark.parametrize("accumulate", [True, False])
def test_persistent_ones_are_unbiased_where_truncated_ones_are_not(x64, accumulate):
    # x acts on s_t through t steps, so the derivative is 1 + 2 + ... + K; truncated to one window it is K. With E_t the
    # sum of t normal numbers e_t, the estimates are the sums of E_t^2 and of E_t e_t over t.
    windows, pairs = 5, 20_000
    strategies = PersistentEvolutionStrategies(1, pairs, 0.3, accumulate)
    found = jax.jit(sum_over_windows, static_argnums=(0, 1))(strategies, windows, KEY)
    if accumulate:
        expected = windows * (windows + 1) / 2
        variance = sum(2 * min(t, u) ** 2 for t in range(1, windows + 1) for u in range(1, windows + 1))
    else:
        expected, variance = windows, sum(t + 1 for t in range(1, windows + 1))
    assert abs(found - expected) < 4 * np.sqrt(variance / pairs) < 0.08 * expected
    one = [sum_over_windows(dataclasses.replace(strategies, pairs=2, accumulate=a), 1, KEY) for a in (True, False)]
    assert one[0] == one[1]  # the first window is the same in both
    assert 4 * np.sqrt(variance / pairs) < 0.1 * (windows * (windows + 1) / 2 - windows)  # so the two differ


def gradients_of_an_episode(strategies, keys, num_steps=4):
    """For each key, the mean meta-gradient over the windows of an episode, at constant meta-parameters."""
    families = [quadratic_family(np.asarray(c), support=3, query=3) for c in ([1.0, 0.5], [0.4, 0.2, 0.1])]
    settings = {"learning_rate": jnp.asarray(0.05), "decay": jnp.asarray(0.5)}
    learner = dataclasses.replace(
        learners.fixed("momentum", baselines.sgd), init=lambda key, families: settings, second_order=strategies is None
    )
    options = {"num_steps": num_steps, "tasks_per_family": 2, "meta_optimizer": optax.sgd(1.0)}
    trainer = meta_trainer(learner, families, meta_gradient=strategies, **options)
    windows = num_steps // getattr(strategies, "window", num_steps)
    first = trainer.init(jax.random.key(0))

    def episode(key):
        def window(state, _):
            after, metrics = trainer.step(state)
            grads = jax.tree.map(jnp.subtract, state.params, after.params)
            return after._replace(params=state.params), (grads, metrics["loss"])

        _, outputs = jax.lax.scan(window, first._replace(key=key), length=windows)
        return jax.tree.map(lambda x: jnp.mean(x, 0), outputs)

    return jax.jit(lambda keys: jax.lax.map(episode, keys))(keys)


def test_estimates_of_an_episode_agree_with_backpropagation(x64):
    """The mean difference over many keys is within its sampling error, except for truncated strategies."""
    keys = jax.random.split(KEY, 40)
    exact, losses = gradients_of_an_episode(None, keys)
    for strategies in (
        EvolutionStrategies(100, 1e-2),
        PersistentEvolutionStrategies(2, 100, 1e-2),
        PersistentEvolutionStrategies(2, 100, 1e-2, accumulate=False),
    ):
        found, tried = gradients_of_an_episode(strategies, keys)
        np.testing.assert_allclose(np.mean(tried), np.mean(losses), rtol=1e-3)  # the mean over windows
        differences = np.concatenate(
            [(a - b).reshape(len(keys), -1) for a, b in zip(*map(jax.tree.leaves, (found, exact)), strict=True)], 1
        )
        scatter = np.sum(np.var(differences, 0, ddof=1)) / len(keys)
        ratio = np.sum(np.mean(differences, 0) ** 2) / scatter  # about 1 without a bias
        assert ratio > 12 if not getattr(strategies, "accumulate", True) else ratio < 6, (strategies, ratio)
        assert scatter < 0.03 * sum(np.sum(np.mean(x, 0) ** 2) for x in jax.tree.leaves(exact))


class SearchingFamily(QuadraticFamily):
    """Quadratic tasks that record each search for a start."""

    searches = []  # noqa: RUF012

    def warm_start(self, theta, support, key):
        jax.debug.callback(lambda: self.searches.append(1))
        return theta + jnp.mean(support, 0), 3


jax.tree_util.register_dataclass(SearchingFamily, ["curvature", "center", "noise"], ["support", "query"])


def test_a_start_is_searched_once_per_episode():
    family = SearchingFamily(jnp.ones(2))
    SearchingFamily.searches.clear()
    options = {"num_steps": 6, "tasks_per_family": 1, "meta_optimizer": optax.sgd(0.0)}
    learner = learners.lft(coordinate_lstm(2, 1))
    trainer = meta_trainer(learner, [family], meta_gradient=PersistentEvolutionStrategies(2, 4, 1e-2), **options)
    state = trainer.init(jax.random.key(0))
    losses = []
    for _ in range(6):
        state, metrics = trainer.step(state)
        losses.append(float(metrics["loss"]))
    jax.effects_barrier()
    assert len(SearchingFamily.searches) == 2 * 4 * 2  # mirrored pairs, in each of two episodes of three windows
    assert max(losses) < 2  # about 1 after the search, about 3 without


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 5}, "its window of 2 must divide num_steps = 5"),
        ({"num_steps": 4, "stages": Stages([(2, 10)])}, "without a curriculum"),
        ({"num_steps": 4, "unroll": Unroll("final")}, "step_weights: they are 0 in some windows"),
    ],
)
def test_windows_that_do_not_fit_are_refused(options, message):
    options = {"meta_gradient": PersistentEvolutionStrategies(2), "meta_optimizer": optax.sgd(1.0), **options}
    with pytest.raises(ValueError, match=message):
        meta_trainer(learners.lft(coordinate_lstm(2, 1)), [quadratic_family(np.ones(2, np.float32))], **options)


@pytest.mark.parametrize(("window", "same"), [(3, True), (1, False)])
def test_a_window_of_all_steps_is_no_truncation(window, same):
    options = {"num_steps": 3, "tasks_per_family": 2, "meta_optimizer": optax.sgd(1.0)}
    trainers = [
        meta_trainer(learners.lft(coordinate_lstm(2, 1)), [quadratic_family(np.ones(2, np.float32))], **options, **more)
        for more in ({}, {"unroll": Unroll(window=window)})
    ]
    full, cut = (trainer.step(trainer.init(jax.random.key(0)))[1] for trainer in trainers)
    np.testing.assert_allclose(cut["loss"], full["loss"], rtol=1e-6)
    assert np.isclose(cut["grad_norm"], full["grad_norm"], rtol=1e-5) == same


def test_meta_training_on_a_model_without_gradients(opaque_family):
    family = opaque_family
    learner = learners.lft(coordinate_lstm(2, 1, features="raw"))
    options = {"num_steps": 2, "tasks_per_family": 2, "meta_optimizer": optax.sgd(1.0)}
    trainer = meta_trainer(learner, [family], meta_gradient=EvolutionStrategies(2), **options)
    state = trainer.init(jax.random.key(0))
    after, metrics = trainer.step(state)
    assert np.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0
    assert metrics["skipped"] == 0
    with pytest.raises(ValueError, match="callback"):
        meta_trainer(learner, [family], **options).step(after)


@pytest.mark.parametrize(("window", "second_order"), [(2, False), (None, True)])
def test_options_of_backpropagation_are_refused(window, second_order):
    learner = learners.lft(coordinate_lstm(2, 1), second_order=second_order)
    family = quadratic_family(np.ones(2, np.float32))
    with pytest.raises(ValueError, match="meta_gradient: evolution strategies differentiate nothing"):
        meta_trainer(
            learner,
            [family],
            meta_optimizer=optax.sgd(1.0),
            meta_gradient=EvolutionStrategies(),
            unroll=Unroll(window=window),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pairs": 0}, "pairs must be at least 1, got 0"), ({"sigma": 0.0}, "sigma must be a finite number above 0")],
)
def test_bad_settings_are_refused(options, message):
    for build in (EvolutionStrategies, functools.partial(PersistentEvolutionStrategies, 2)):
        with pytest.raises(ValueError, match=message):
            build(**options)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        PersistentEvolutionStrategies(0)
