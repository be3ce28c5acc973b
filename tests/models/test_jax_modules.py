"""`from_flax`, `from_nnx` and `from_equinox` against the frameworks themselves."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze

import lft_jax
from lft_jax.models import from_equinox, from_flax, from_nnx
from lft_jax.optimizers import projected_gradient

IMAGES = np.random.default_rng(0).uniform(size=(5, 6, 6, 3)).astype(np.float32)
PREPARED = (IMAGES * 255 - 3) / 2
OPTIONS = {"mean": 3.0, "std": 2.0, "input_range": (0, 255)}


class Linen(nn.Module):
    """Batch statistics and dropout, switched by an argument."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        self.sow("intermediates", "features", x)
        return nn.Dense(3)(x.reshape(len(x), -1))


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=False, use_running_average=False):
        x = nn.BatchNorm()(x, use_running_average=use_running_average)
        return nn.Dense(3)(nn.Dropout(0.5)(x, deterministic=deterministic).reshape(len(x), -1))


class ByField(nn.Module):
    train: bool = True
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic=None):
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        x = nn.BatchNorm(use_running_average=not self.train)(x)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=deterministic)(x).reshape(len(x), -1))


def linen_variables(module, seed=0, **options):
    variables = module.init({"params": jax.random.key(seed)}, IMAGES, **options)
    rng = np.random.default_rng(seed)
    statistics = {"mean": rng.normal, "var": lambda size: rng.uniform(1, 2, size)}  # other than those of the start
    found = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(statistics[path[-1].key](size=leaf.shape), leaf.dtype), variables["batch_stats"]
    )
    return {"params": variables["params"], "batch_stats": found}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_linen_module_is_in_evaluation_mode(jitted, frozen):
    module = Linen()
    variables = linen_variables(module, train=False)
    model = from_flax(module, freeze(variables) if frozen else variables, **OPTIONS)
    found = (jax.jit(model) if jitted else model)(IMAGES)
    np.testing.assert_allclose(found, module.apply(variables, PREPARED, train=False), rtol=1e-4, atol=1e-3)
    assert model.differentiable


@pytest.mark.parametrize(
    ("module", "evaluated", "options"),
    [
        (Deterministic(), Deterministic(), {"deterministic": True, "use_running_average": True}),
        (ByField(), ByField(train=False, deterministic=True), {}),
        (ByField(deterministic=False), ByField(train=False, deterministic=True), {}),
    ],
)
def test_arguments_and_fields_of_evaluation(module, evaluated, options):
    variables = linen_variables(evaluated, **options)
    expected = evaluated.apply(variables, IMAGES, **options)
    np.testing.assert_allclose(from_flax(module, variables)(IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_gradients_batches_channels_and_outputs():
    module = Linen()
    variables = linen_variables(module, train=False)

    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"scores": nn.Dense(3)(jnp.moveaxis(x, 1, -1).reshape(len(x), -1)), "inputs": x}

    def gradient(model):
        return jax.grad(lambda x: jnp.sum(jnp.sin(model(x))))(jnp.asarray(IMAGES))

    expected = gradient(lambda x: module.apply(variables, x, train=False))
    for batch_size in (None, 2):
        found = gradient(from_flax(module, variables, batch_size=batch_size))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    dense = Wrapped()
    weights = dense.init(jax.random.key(0), IMAGES.transpose(0, 3, 1, 2))
    found = from_flax(dense, weights, channels="first", output="scores")(IMAGES)
    kernel = weights["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(found, IMAGES.reshape(5, -1) @ kernel, rtol=1e-4, atol=1e-5)


class Nnx(nnx.Module):
    traces = 0  # of all instances

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.Linear(144, 3, rngs=rngs))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.norm.mean[...] = jax.random.normal(rngs(), 4)

    def __call__(self, x):
        Nnx.traces += 1
        self.calls[...] += 1
        return self.head(nnx.relu(self.norm(self.conv(x))).reshape(len(x), -1))


def nnx_logits(module, x):
    graphdef, state = nnx.split(module)
    copy = nnx.merge(graphdef, jax.tree.map(jnp.array, state))
    copy.eval()
    return copy(x)


def module_state(module):
    return nnx.as_pure(nnx.state(module))


@pytest.mark.parametrize("jitted", [False, True])
def test_an_nnx_module_is_in_evaluation_mode_and_stays_as_it_is(jitted):
    module = Nnx()
    before = module_state(module)
    model = from_nnx(module, **OPTIONS)
    for _ in range(2):
        found = (jax.jit(model) if jitted else model)(IMAGES)
        np.testing.assert_allclose(found, nnx_logits(module, jnp.asarray(PREPARED)), rtol=1e-4, atol=1e-3)
    after = module_state(module)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before, after))
    assert not module.head.layers[0].deterministic and not module.norm.use_running_average


def test_arguments_of_evaluation_of_an_nnx_module():
    class Switched(nnx.Module):
        def __init__(self):
            self.inner = Nnx()

        def __call__(self, x, *, training=True):
            return self.inner(x) * (jnp.nan if training else 1.0)

    module = Switched()
    found = from_nnx(module)(IMAGES)
    np.testing.assert_allclose(found, nnx_logits(module.inner, jnp.asarray(IMAGES)), rtol=1e-5, atol=1e-5)


def test_weights_that_changed_in_place_are_those_used():
    module = Nnx()
    model = from_nnx(module)
    first = model(IMAGES)
    kept = model.refresh()
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(module, nnx.grad(lambda m: jnp.mean(m(jnp.asarray(IMAGES)) ** 2))(module))
    second = model(IMAGES)
    assert float(jnp.abs(first - second).max()) > 1e-3
    np.testing.assert_allclose(second, nnx_logits(module, jnp.asarray(IMAGES)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(kept(jnp.asarray(IMAGES)), first)  # a run that has begun keeps its weights


def test_an_attack_after_training_is_that_on_a_fresh_module():
    module, options = Nnx(0), {"epsilon": 0.1, "steps": 2, "optimizer": projected_gradient(0.05)}
    model, traces = from_nnx(module), []

    def attacked(model):
        labels, before = np.asarray(model(IMAGES)).argmax(1), Nnx.traces
        found = lft_jax.universal_perturbation(model, IMAGES, labels, **options).perturbation
        traces.append(Nnx.traces - before)
        return found

    first = attacked(model)
    nnx.update(module, nnx.state(Nnx(1)))
    second = attacked(model)
    assert traces[1] < traces[0]  # its steps are not compiled again
    np.testing.assert_array_equal(second, attacked(from_nnx(Nnx(1))))
    assert np.abs(first - second).max() > 1e-3


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 2)
        self.conv = eqx.nn.Conv2d(3, 4, 3, key=keys[0])
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="ema")
        self.drop = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(64, 3, key=keys[1])

    def __call__(self, x, state, key=None):
        x, state = self.norm(self.conv(x), state)
        return self.head(self.drop(jax.nn.relu(x), key=key).ravel()), state


class Keyed(eqx.Module):
    mlp: eqx.nn.MLP
    drop: eqx.nn.Dropout
    offset: np.ndarray

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(108, 3, 8, 1, key=key)
        self.drop = eqx.nn.Dropout(0.5)
        self.offset = np.ones(3, np.float32)

    def __call__(self, x, key, train=True):
        first, second = jax.random.split(key)
        x = self.drop(x.ravel(), key=first)
        return {"scores": self.mlp(x, key=second) + self.offset + (jnp.nan if train else 0.0)}


def stateful(seed=0):
    module, state = eqx.nn.make_with_state(Equinox)(jax.random.key(seed))
    statistics = jnp.arange(4.0), jnp.arange(1.0, 5.0)
    return module, state.set(module.norm.ema_state_index, statistics)


@pytest.mark.parametrize("jitted", [False, True])
def test_an_equinox_module_with_state_is_in_evaluation_mode(jitted):
    module, state = stateful()
    model = from_equinox(module, state=state, **OPTIONS)
    evaluated = eqx.nn.inference_mode(module)
    expected = [evaluated(x, state)[0] for x in jnp.asarray(PREPARED.transpose(0, 3, 1, 2), jnp.float32)]
    np.testing.assert_allclose((jax.jit(model) if jitted else model)(IMAGES), jnp.stack(expected), rtol=1e-4, atol=1e-3)
    state.get(module.norm.ema_state_index)  # still valid
    found = jax.grad(lambda x: model(x).sum())(jnp.asarray(IMAGES))
    assert found.shape == IMAGES.shape and np.any(np.asarray(found))


def test_an_equinox_module_with_a_key_an_output_and_channels_last():
    module = Keyed(jax.random.key(0))
    evaluated = eqx.nn.inference_mode(module)
    expected = [evaluated(x, jax.random.key(5), train=False)["scores"] for x in IMAGES]
    for batch_size in (None, 2):
        found = from_equinox(module, channels="last", output="scores", batch_size=batch_size)(IMAGES)
        np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-5, atol=1e-5)


def test_an_equinox_sequential_and_one_number():
    module = eqx.nn.Sequential(
        [eqx.nn.Lambda(jnp.ravel), eqx.nn.Dropout(), eqx.nn.Linear(108, "scalar", key=jax.random.key(0))]
    )
    layer = module.layers[-1]
    expected = [layer(x.ravel()) for x in IMAGES.transpose(0, 3, 1, 2)]
    found = from_equinox(module)(IMAGES)
    np.testing.assert_allclose(found, jnp.stack([jnp.zeros(5), jnp.stack(expected)], 1), rtol=1e-5, atol=1e-5)


def linen_model(seed):
    return from_flax(nn.Sequential([nn.Conv(2, (3, 3)), nn.relu, Flat()]), FLAT_VARIABLES[seed])


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(len(x), -1))


FLAT_VARIABLES = [
    nn.Sequential([nn.Conv(2, (3, 3)), nn.relu, Flat()]).init(jax.random.key(seed), IMAGES) for seed in range(2)
]


RAVEL = eqx.nn.Lambda(jnp.ravel)
STATEFUL = stateful()  # a state belongs to its module, so other weights are those of the same one


def equinox_model(seed):
    module, state = jax.tree.map(lambda x: x + 0.1 * seed if eqx.is_inexact_array(x) else x, STATEFUL)
    return from_equinox(module, state=state)


@pytest.mark.parametrize(
    "make",
    [
        linen_model,
        lambda seed: from_nnx(Nnx(seed)),
        lambda seed: from_equinox(eqx.nn.Sequential([RAVEL, eqx.nn.MLP(108, 3, 8, 1, key=jax.random.key(seed))])),
        equinox_model,
    ],
)
def test_other_weights_need_no_compilation(make):
    compiled = []

    @jax.jit
    def logits(function, images):
        compiled.append(images.shape)
        return function(images)

    models = [make(seed) for seed in range(2)]
    found = [
        logits(model.function if model.refresh is None else model.refresh(), jnp.asarray(IMAGES)) for model in models
    ]
    assert len(compiled) == 1
    assert float(jnp.abs(found[0] - found[1]).max()) > 1e-3
    for logits_of_one, model in zip(found, models, strict=True):
        np.testing.assert_allclose(logits_of_one, model(IMAGES), rtol=1e-4, atol=1e-4)


def test_nnx_modes_of_the_user_need_no_compilation():
    module = Nnx()
    model = from_nnx(module)
    call = jax.jit(lambda function, images: function(images))
    call(model.refresh(), jnp.asarray(IMAGES))
    module.eval()
    call(model.refresh(), jnp.asarray(IMAGES))
    assert call._cache_size() == 1
    assert module.norm.use_running_average


class NoCall(nnx.Module):
    """Not callable."""


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: from_flax(Nnx(), {"params": {}}),
            TypeError,
            "must be a callable flax.linen.Module, got Nnx; from_nnx",
        ),
        (lambda: from_flax(Linen, {"params": {}}), TypeError, "got the class Linen"),
        (lambda: from_flax(Linen(), FLAT_VARIABLES[0]["params"]), ValueError, r"got \['layers_0', 'layers_2'\]; pass"),
        (lambda: from_flax(Linen(), [1]), ValueError, "with the collection 'params', got list"),
        (lambda: from_nnx(Linen()), TypeError, "must be a callable flax.nnx.Module, got Linen; from_flax"),
        (lambda: from_nnx(NoCall()), TypeError, "must be a callable flax.nnx.Module, got NoCall"),
        (lambda: from_equinox(Linen()), TypeError, "must be a callable equinox.Module, got Linen"),
        (lambda: from_equinox(Equinox), TypeError, "got the class Equinox"),
        (lambda: from_equinox(stateful()[0]), ValueError, "state: module takes a state, got None"),
        (lambda: from_equinox(eqx.nn.Sequential([stateful()[0].norm])), ValueError, "state: module takes a state"),
        (lambda: from_nnx(Nnx(), std=0.0), ValueError, "std must be a finite number above 0"),
        (lambda: from_nnx(Nnx(), batch_size=0), ValueError, "batch_size must be an integer, at least 1, got 0"),
        (lambda: from_flax(Linen(), {"params": {}}, channels="lst"), ValueError, "channels: unknown name 'lst'"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


class TwoAnswers(eqx.Module):
    def __call__(self, x, state):
        return jnp.zeros(3)


def test_a_module_that_returns_no_state_is_named():
    with pytest.raises(ValueError, match=r"module must return \(output, state\) where it gets a state, got "):
        from_equinox(TwoAnswers(), state=stateful()[1])(IMAGES)


@pytest.mark.parametrize("model", [Nnx(), Linen(), STATEFUL[0]])
def test_a_module_itself_is_told_its_adapter(model):
    with pytest.raises(TypeError, match=r"pass lft_jax\.models\.from_(flax|nnx|equinox)\("):
        lft_jax.models.as_classifier(model)


def test_equinox_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lft_jax\[equinox\]'"):
        from_equinox(stateful()[0])
