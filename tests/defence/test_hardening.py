"""Universal adversarial training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lft_jax
from lft_jax.data import load_source
from lft_jax.defence import Hardening, harden
from lft_jax.optimizers import hand_designed
from lft_jax.victims import VictimConfig, build_model, clean_accuracy, train_victim

SIGN = hand_designed.projected_gradient(0.5)
NONE = optax.set_to_zero()
PLAIN = Hardening(epsilon=0.25, epochs=1, batch_size=8, attack=SIGN, attack_steps=20, search=None, perturbations=1)


def linear(variables, images):
    return images.reshape(len(images), -1) @ variables


def data(count=16, side=4):
    images = np.random.default_rng(0).uniform(0.3, 0.7, (count, side, side, 1)).astype(np.float32)
    return images, np.arange(count) % 2


@pytest.mark.standard_promotion
def test_one_step_is_the_one_of_the_formula():
    """A linear model: gradients of both sides by hand."""
    images, labels = data(8)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)
    settings = dataclasses.replace(PLAIN, fraction=0.5)
    found = harden(linear, weights, images, labels, settings, optimizer=optax.sgd(0.1), key=jax.random.key(3))
    (theta,) = found.perturbations
    assert np.unique(np.abs(theta)).tolist() == [0.125]  # one step of half the radius, along the sign
    rows = find_rows(jax.random.key(3), 8)
    x, y = images[rows].reshape(8, -1), labels[rows]

    def probabilities(x):
        return np.asarray(jax.nn.softmax(jnp.asarray(x @ np.asarray(weights))))

    # The attack raises the cross-entropy of the first four images: it goes along its gradient.
    ascent = ((probabilities(x[:4]) - np.eye(2)[y[:4]]) @ np.asarray(weights).T).sum(0)
    np.testing.assert_array_equal(np.sign(theta).ravel(), np.sign(ascent))
    mixed = np.concatenate([np.clip(x[:4] + theta.ravel()[None], 0, 1), x[4:]])
    error = probabilities(mixed) - np.eye(2)[y]
    np.testing.assert_allclose(found.variables, np.asarray(weights) - 0.1 * mixed.T @ error / 8, rtol=1e-4, atol=1e-6)
    loss = -np.log(probabilities(mixed)[np.arange(8), y]).mean()
    np.testing.assert_allclose(found.history["loss"], [loss], rtol=1e-5)
    right = probabilities(mixed).argmax(1) == y
    assert found.history["perturbed_accuracy"].tolist() == [right[:4].mean()]
    assert found.history["clean_accuracy"].tolist() == [right[4:].mean()]


def find_rows(key, count):
    seed = np.asarray(jax.random.key_data(jax.random.fold_in(key, 0))).tolist()
    return np.random.default_rng(seed).permutation(count)


@pytest.mark.standard_promotion
def test_a_perturbation_of_size_0_is_plain_training_and_no_rate_leaves_the_weights():
    images, labels = data()
    weights = jnp.zeros((16, 2))
    tiny = dataclasses.replace(PLAIN, epsilon=1e-9)
    found = harden(linear, weights, images, labels, tiny, optimizer=optax.sgd(0.1))
    rows = find_rows(jax.random.key(0), 16).reshape(2, 8)
    expected = np.zeros((16, 2))
    for part in rows:
        x, y = images[part].reshape(8, -1), labels[part]
        error = np.asarray(jax.nn.softmax(jnp.asarray(x @ expected))) - np.eye(2)[y]
        expected = expected - 0.1 * x.T @ error / 8
    np.testing.assert_allclose(found.variables, expected, rtol=1e-4, atol=1e-6)
    still = harden(linear, weights, images, labels, PLAIN, optimizer=NONE)
    np.testing.assert_array_equal(still.variables, weights)


@pytest.mark.standard_promotion
def test_the_perturbation_begins_again_and_stays_in_its_ball():
    images, _ = data()
    labels = np.zeros(16, int)  # so that all gradients have the same signs
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)

    def run(epochs, attack_steps, **changes):
        settings = dataclasses.replace(PLAIN, epochs=epochs, attack_steps=attack_steps, **changes)
        return np.abs(harden(linear, weights, images, labels, settings, optimizer=NONE).perturbations)

    assert run(1, 2).max() == 0.25  # two steps of 0.125, along the same signs
    assert run(2, 3).max() == 0.125  # the fourth minibatch is the first of a new perturbation
    assert run(4, 8).max() == 0.25  # projected
    length = run(4, 8, norm="l2", attack=hand_designed.normalized_gradient(1.0))
    np.testing.assert_allclose(np.linalg.norm(length), 0.25, rtol=1e-5)


class Normed(nn.Module):
    """Batch statistics, dropout, and a mode."""

    @nn.compact
    def __call__(self, images, *, train, deterministic=True):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(images.reshape(len(images), -1))
        return nn.Dense(2)(nn.Dropout(0.5)(x, deterministic=deterministic))


@pytest.mark.standard_promotion
def test_modules_are_trained_in_training_mode_and_keep_their_collections():
    images, labels = data()
    module = Normed()
    variables = module.init(jax.random.key(0), images, train=False)
    settings = dataclasses.replace(PLAIN, batch_size=16)
    first, other = (
        harden(module, variables, images, labels, settings, optimizer=optax.sgd(0.1), key=jax.random.key(k))
        for k in range(2)
    )
    assert jax.tree.structure(first.variables) == jax.tree.structure(dict(variables))
    statistics = first.variables["batch_stats"]["BatchNorm_0"]["mean"]
    assert float(jnp.abs(statistics).max()) > 0.1  # begins at 0
    assert not np.array_equal(
        first.variables["params"]["Dense_0"]["kernel"], other.variables["params"]["Dense_0"]["kernel"]
    )
    again = harden(module, variables, images, labels, settings, optimizer=optax.sgd(0.1), key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, again.variables, first.variables)
    model = lft_jax.models.from_flax(module, first.variables)
    assert model(images).shape == (16, 2)


@pytest.mark.standard_promotion
def test_several_perturbations_begin_again_one_after_another():
    images, _ = data()
    labels = np.zeros(16, int)  # so that all gradients have the same signs
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)
    slow = hand_designed.projected_gradient(0.25)  # 0.0625 a step
    settings = dataclasses.replace(PLAIN, epochs=3, fraction=1.0, attack=slow, attack_steps=4, perturbations=2)
    found = harden(linear, weights, images, labels, settings, optimizer=NONE)
    # After six minibatches: the first began again at the fifth, the second at the third.
    assert np.abs(found.perturbations).max((1, 2, 3)).tolist() == [0.125, 0.25]
    assert np.isnan(found.history["clean_accuracy"]).all()  # all images are perturbed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be a finite number above 0, got 0.0"),
        ({"epsilon": 8}, "epsilon must be at most 1"),
        ({"norm": "l1"}, "norm: there is no 'l1' ball"),
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1, got 0.0"),
        ({"fraction": 1.5}, "fraction must be"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"perturbations": 0}, "perturbations must be at least 1"),
        ({"perturbations": 9}, "perturbations must be at most the 8 images of a minibatch, got 9"),
        ({"attack_steps": 2**30}, "attack_steps must be below"),
        ({"attack_steps": 0}, "attack_steps must be at least 1"),
        ({"attack": "uap-linff"}, "Did you mean 'uap-linf'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    images, labels = data()
    with pytest.raises(ValueError, match=message):
        harden(linear, jnp.zeros((16, 2)), images, labels, dataclasses.replace(PLAIN, **changes))


def test_images_labels_and_models_that_do_not_fit_are_refused():
    images, labels = data()
    weights = jnp.zeros((16, 2))
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        harden(linear, weights, images * 255, labels, PLAIN)
    with pytest.raises(ValueError, match=r"labels must be within \[0, 2\)"):
        harden(linear, weights, images, labels + 1, PLAIN)
    with pytest.raises(ValueError, match=r"model must return logits \[N, classes\], got shape \(1, 4, 4, 1\)"):
        harden(lambda variables, images: images, weights, images, labels, PLAIN)
    with pytest.raises(ValueError, match=r"variables must have the collection 'params', got \['kernel'\]"):
        harden(nn.Dense(2), {"kernel": weights}, images, labels, PLAIN)
    with pytest.raises(TypeError, match=r"model must be a .*Module or a function"):
        harden("small_cnn", weights, images, labels, PLAIN)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_hardened_victim_withstands_attacks_that_fool_it_before():
    """Digits, the small CNN: the learned attack inside, fresh attacks of two kinds after."""
    train, test = load_source("digits", "train"), load_source("digits", "test")
    before, _ = train_victim(VictimConfig("digits", "small_cnn", epochs=8), train, test)
    module = build_model("small_cnn", 10)
    after = harden(module, before, train.images, train.labels, Hardening(epsilon=0.25, epochs=60, batch_size=64))
    few = np.unique(train.labels, return_index=True)[1]
    rates, accuracy = {}, {}
    for name, variables in (("before", before), ("after", after.variables)):
        model = lft_jax.models.from_flax(module, variables)
        accuracy[name] = clean_accuracy(model.traced(), test.images, test.labels)
        for attack, settings in (("ours", {"steps": 10}), ("query", {"oracle": "query", "max_queries": 1000})):
            found = lft_jax.universal_perturbation(
                model, train.images[few], train.labels[few], epsilon=0.25, progress=False, **settings
            )
            rates[name, attack] = lft_jax.attack_success_rate(model, test.images, test.labels, found.perturbation)
    assert after.history["perturbed_accuracy"][-1] > 0.8
    assert accuracy["after"] > accuracy["before"] - 0.03
    for attack in ("ours", "query"):
        assert rates["before", attack] > 0.35
        assert rates["after", attack] < 0.75 * rates["before", attack]
