"""A model that is trained further is attacked with its present weights, whatever was compiled before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lft_jax
from lft_jax import evaluation, learners
from lft_jax.auditing import _model
from lft_jax.victims import clean_accuracy

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.2, 0.8, size=(12, 4, 4, 1)).astype(np.float32)
OLD, NEW = (RNG.normal(size=(16, 3)).astype(np.float32) for _ in range(2))
OPTIMIZER = optax.GradientTransformation(lambda theta: (), lambda g, s, p=None: (-0.1 * g, s))
STATE = {"weights": OLD}


def attack(model):
    recipe = lft_jax.AttackRecipe(augmentation=None)
    options = {"epsilon": 0.15, "steps": 2, "optimizer": OPTIMIZER, "recipe": recipe, "oracle": "gradient"}
    return lft_jax.universal_perturbation(model, IMAGES, **options).perturbation


def expected(weights):
    return attack(jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, jnp.asarray(weights)))


class Bound:
    def __init__(self, weights):
        self.weights = weights

    def logits(self, x):
        return x.reshape(len(x), -1) @ self.weights


@dataclasses.dataclass
class Data:
    weights: np.ndarray

    def __call__(self, x):
        return x.reshape(len(x), -1) @ self.weights


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Equal to every other one."""

    weights: np.ndarray = dataclasses.field(compare=False)

    def __call__(self, x):
        return x.reshape(len(x), -1) @ self.weights


class Module(nnx.Module):
    def __init__(self, weights):
        self.weights = nnx.Param(jnp.asarray(weights))

    def __call__(self, x):
        return x.reshape(len(x), -1) @ self.weights[...]


def of_global():
    STATE["weights"] = OLD

    def model(x):
        return x.reshape(len(x), -1) @ STATE["weights"]

    return model, lambda: STATE.update(weights=NEW) or model


def of_method():
    owner = Bound(OLD)
    return owner.logits, lambda: setattr(owner, "weights", NEW) or owner.logits


def of_dataclass():
    model = Data(OLD)
    return model, lambda: setattr(model, "weights", NEW) or model


def of_equal_dataclass():
    return Hidden(OLD), lambda: Hidden(NEW)


def of_module():
    model = Module(OLD)

    def train():
        model.weights[...] = jnp.asarray(NEW)
        return model

    return lft_jax.models.from_nnx(model), lambda: train() and lft_jax.models.from_nnx(model)


def of_classifier():
    owner = Bound(OLD)
    model = lft_jax.models.from_function(lambda x: owner.logits(x), mean=0.0)
    return model, lambda: setattr(owner, "weights", NEW) or model


def of_compiled_part():
    """Compiled again in each call, so that JAX itself sees the change."""
    owner = Bound(OLD)

    def model(x):
        return jax.jit(lambda x: owner.logits(x))(x)

    return model, lambda: setattr(owner, "weights", NEW) or model


def of_large_array():
    """Of which a text shows the ends only."""
    weights = np.concatenate([OLD, np.ones((2000, 3), np.float32)])

    def model(x):
        return jnp.pad(x.reshape(len(x), -1), ((0, 0), (0, 2000))) @ weights

    def train():
        weights[: len(NEW)] = NEW
        return model

    return model, train


def of_callback():
    """Whose weights were read when JAX traced it."""
    owner = Bound(OLD)

    def model(x):
        weights, shape = owner.weights, jax.ShapeDtypeStruct((len(x), 3), jnp.float32)

        def on_numpy(x):
            return np.asarray(x).reshape(len(x), -1) @ weights

        @jax.custom_jvp
        def call(x):
            return jax.pure_callback(on_numpy, shape, x, vmap_method="sequential")

        call.defjvp(lambda x, t: (call(*x), t[0].reshape(len(t[0]), -1) @ jnp.asarray(weights)))
        return call(x)

    return model, lambda: setattr(owner, "weights", NEW) or model


KINDS = [of_global, of_method, of_dataclass, of_equal_dataclass, of_module, of_classifier]
KINDS += [of_compiled_part, of_large_array, of_callback]


@pytest.mark.parametrize("make", KINDS)
def test_the_present_weights_are_attacked(make):
    assert not np.allclose(expected(OLD), expected(NEW), atol=1e-3)
    model, train = make()
    np.testing.assert_allclose(attack(model), expected(OLD), atol=1e-6)
    np.testing.assert_allclose(attack(train()), expected(NEW), atol=1e-6)


@pytest.mark.parametrize("make", [of_global, of_method, of_equal_dataclass, of_classifier, of_module])
def test_the_present_weights_are_evaluated(make):
    """A family that is built once, and one that is built again."""
    model, train = make()
    if make is of_method:
        owner = model.__self__
        model, train = (lambda x: owner.logits(x)), (lambda train=train: train() and model)
    labels = np.arange(12) % 3
    learner, keys = learners.fixed("sgd", optax.sgd), jax.random.split(jax.random.key(0), 2)
    options = {"ways": 3, "query_shots": 2, "epsilon": 0.15}

    def measure(family):
        return evaluation.evaluate(learner, {"learning_rate": 0.1}, family, keys, num_steps=2, at=(2,))["loss"]

    def of(weights):
        return measure(lft_jax.uap_family(IMAGES, labels, lambda x: x.reshape(len(x), -1) @ weights, **options))

    family = lft_jax.uap_family(IMAGES, labels, model, **options)
    np.testing.assert_allclose(measure(family), of(OLD), rtol=1e-5)
    again = train()
    assert not np.allclose(of(OLD), of(NEW), rtol=1e-2)
    if again is model:
        np.testing.assert_allclose(measure(family), of(NEW), rtol=1e-5)
    np.testing.assert_allclose(measure(lft_jax.uap_family(IMAGES, labels, again, **options)), of(NEW), rtol=1e-5)


def test_a_family_of_a_module_has_its_present_weights():
    """Other than those that the family was built with."""
    module = Module(OLD)
    family = lft_jax.uap_family(
        IMAGES, np.arange(12) % 3, lft_jax.models.from_nnx(module), ways=3, query_shots=2, epsilon=0.1
    )
    module.weights[...] = jnp.asarray(NEW)
    theta, keys = jnp.zeros((4, 4, 1)), jax.random.split(jax.random.key(0), 2)
    found = evaluation.evaluate_fixed(theta, family, keys)
    options = {"ways": 3, "query_shots": 2, "epsilon": 0.1}
    fresh = lft_jax.uap_family(IMAGES, np.arange(12) % 3, lambda x: x.reshape(len(x), -1) @ NEW, **options)
    np.testing.assert_allclose(found["loss"], evaluation.evaluate_fixed(theta, fresh, keys)["loss"], rtol=1e-5)


def test_a_change_that_few_images_show_is_seen():
    STATE["bright"] = 0.0

    def model(x):
        bright = jnp.maximum(x - 0.76, 0).sum((1, 2, 3))
        return x.reshape(len(x), -1) @ OLD + STATE["bright"] * bright[:, None] * jnp.asarray([[1.0, 2.0, 3.0]])

    before = attack(model)
    STATE["bright"] = 50.0
    after = attack(model)
    assert not np.array_equal(before, after)
    np.testing.assert_allclose(after, attack(lambda x: model(x)), atol=1e-6)


def test_weights_that_are_arguments_are_compiled_once():
    traced = []

    def apply(weights, x):
        traced.append(1)
        return x.reshape(len(x), -1) @ weights

    attack(jax.tree_util.Partial(apply, jnp.asarray(OLD)))
    before = len(traced)
    attack(jax.tree_util.Partial(apply, jnp.asarray(NEW)))
    assert len(traced) == before + 1  # to see whether it has changed


def test_the_present_weights_are_judged():
    """By an audit, and by the accuracy of a victim."""
    owner = Bound(OLD)

    def model(x):
        return owner.logits(x)

    for weights in (OLD, NEW):
        owner.weights, expected = weights, IMAGES.reshape(len(IMAGES), -1) @ weights
        found = _model.Asked(lft_jax.models.from_function(model), True, 4, 12).logits(IMAGES, np.zeros((4, 4, 1)))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert clean_accuracy(model, IMAGES, expected.argmax(1)) == 1


@pytest.mark.parametrize("part", ["mask", "our layers", "callback"])
def test_an_unchanged_model_is_compiled_once(part):
    """Whatever else it holds: a mask is an array of booleans, layers have derivative rules of their own."""
    traced, weights = [], jnp.asarray(OLD)
    mask = jnp.asarray(np.arange(16) % 2 == 0)
    shape = jax.ShapeDtypeStruct((), jnp.float32)

    def model(x):
        traced.append(1)
        if part == "our layers":
            x = lft_jax._layers.conv(x, jnp.ones((3, 3, 1, 1)))
        if part == "callback":
            x = x * jax.pure_callback(lambda: np.float32(len(traced) > 0), shape)
        x = x.reshape(len(x), -1)
        return (jnp.where(mask[None], x, 0) if part == "mask" else x) @ weights

    attack(model)
    before = len(traced)
    attack(model)
    assert len(traced) == before + 1  # to see whether it has changed


def test_a_model_that_takes_another_shape_is_traced_again():
    state = {"side": 4}

    def model(x):
        assert x.shape[1] == state["side"]
        return x.reshape(len(x), -1)[:, :16] @ OLD

    attack(model)
    state["side"] = 5
    images = np.pad(IMAGES, ((0, 0), (0, 1), (0, 0), (0, 0)))
    recipe = lft_jax.AttackRecipe(augmentation=None)
    options = {"epsilon": 0.15, "steps": 1, "optimizer": OPTIMIZER, "recipe": recipe, "progress": False}
    assert lft_jax.universal_perturbation(model, images, **options).perturbation.shape == (5, 4, 1)


def test_a_victim_in_numpy_is_shown_how_to_be_called_back():
    labels = np.arange(12) % 3

    def model(x):
        return np.asarray(x).reshape(len(x), -1) @ OLD

    with pytest.raises(ValueError, match=r"(?s)cannot be traced .*jax.pure_callback\(.*estimator=lft_jax.ZerothOrder"):
        lft_jax.uap_family(IMAGES, labels, model, ways=3, query_shots=2, epsilon=0.1)
    num_classes = 3  # the recipe of the message, as it stands
    logits_fn = lambda x: jax.pure_callback(  # noqa: E731
        lambda x: np.asarray(model(np.asarray(x)), np.float32),
        jax.ShapeDtypeStruct((len(x), num_classes), np.float32), x, vmap_method="sequential")  # fmt: skip
    options = {"ways": 3, "query_shots": 2, "epsilon": 0.1, "estimator": lft_jax.ZerothOrder(num_directions=2)}
    learner, keys = learners.fixed("sgd", optax.sgd), jax.random.split(jax.random.key(0), 2)
    losses = []
    for victim in (logits_fn, lambda x: x.reshape(len(x), -1) @ OLD):
        family = lft_jax.uap_family(IMAGES, labels, victim, **options)
        found = evaluation.evaluate(learner, {"learning_rate": 0.1}, family, keys, num_steps=2, at=(2,))
        losses.append(found["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
