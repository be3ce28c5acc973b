"""Rewritten functions, compared with the functions themselves, as XLA computes them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.tree_util import Partial

import lft_jax
from lft_jax._rewriting import rewritten
from lft_jax.victims import apply_function, build_model

RNG = np.random.default_rng(0)
LAYOUTS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "OIHW", "NCHW"), ("CHWN", "IHWO", "NHWC")]


def normal(*shape, dtype=np.float64):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def measured(function):
    """A program of values, gradients, and gradients of a function of the gradients."""
    gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))))

    def second(*x):
        return jnp.sum(jnp.cos(gradient(*x)))

    return jax.jit(lambda *x: (function(*x), gradient(*x), jax.grad(second)(*x)))


def check(function, x, tolerance=1e-11):
    """The rewritten function has the same values, and the same first and second derivatives."""
    found, expected = (measured(f)(x) for f in (rewritten(Partial(function)), function))
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other, atol=tolerance)


def replaced(function, *x):
    """How many convolutions, pools and derivative rules a rewritten function traces to, `[plain ones, own ones]`."""
    text = str(jax.make_jaxpr(rewritten(Partial(function)))(*x))
    return [text.count(f"= {name}") for name in ("conv_general_dilated[", "reduce_window_max[", "custom_")]


def arranged(x, axes, to):
    return x.transpose([axes.index(axis) for axis in to])


@settings(max_examples=15, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(["dense", "dense", "depthwise", "grouped", "multiplied"]),
    stride=st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 3), (2, 1)]),
    dilations=st.sampled_from([((1, 1), (1, 1))] * 4 + [((1, 1), (2, 2)), ((2, 2), (1, 1)), ((1, 2), (1, 1))]),
    padding=st.sampled_from(["SAME", "VALID"]) | st.tuples(*[st.tuples(st.integers(-1, 5), st.integers(-1, 5))] * 2),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_convolution_has_the_values_and_derivatives_of_xla(
    sides, size, channels, kind, stride, dilations, padding, layout
):
    groups = {"dense": 1, "grouped": max(1, channels // 2)}.get(kind, channels)
    features = {"dense": 3, "depthwise": channels}.get(kind, 2 * channels)
    with jax.enable_x64(True):
        kernel = arranged(normal(*size, channels // groups, features), "HWIO", layout[1])
        images = arranged(normal(2, *sides, channels), "NHWC", layout[0])

        if isinstance(padding, str) and dilations[0] != (1, 1):
            padding = ((1, 2), (2, 0))  # no string has a meaning then

        def model(x):
            return lax.conv_general_dilated(x, kernel, stride, padding, *dilations, layout, feature_group_count=groups)

        check(model, images)


@pytest.mark.parametrize("stride", [1, 2])
def test_of_a_kernel_that_is_an_argument_too(x64, stride):
    images, kernel = normal(2, 6, 7, 2), normal(3, 3, 2, 4)

    def model(kernel, x):
        return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=LAYOUTS[0])

    def both(function):
        return jax.jit(jax.grad(lambda k, x: jnp.sum(jnp.sin(function(k, x))), argnums=(0, 1)))(kernel, images)

    found = both(lambda k, x: rewritten(Partial(model, k))(x))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-11), found, both(model))


@settings(max_examples=8, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    size=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    apart=st.sampled_from([True, True, False]),
    padding=st.sampled_from(["SAME", "VALID"]),
    axes=st.sampled_from([(1, 2), (2, 3)]),
)
def test_any_window_maximum_has_the_values_and_derivatives_of_xla(sides, size, apart, padding, axes):
    shape, window = [2, 3, 3, 3], [1, 1, 1, 1]
    for axis, side, k in zip(axes, sides, size, strict=True):
        shape[axis], window[axis] = side, k
    strides = window if apart else [1, 2, 2, 1]
    with jax.enable_x64(True):
        check(lambda x: jnp.sin(lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)), normal(*shape))


def test_the_first_of_equal_entries_has_the_gradient(x64):
    x = jnp.asarray(RNG.integers(0, 2, (3, 6, 6, 2)), jnp.float64)

    def model(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    gradients = [
        jax.jit(jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x)))))(x) for f in (model, rewritten(Partial(model)))
    ]
    np.testing.assert_array_equal(*gradients)
    assert replaced(model, x) == [0, 0, 1]


def test_maxima_of_nothing_and_of_no_number(x64):
    """Padding is below all entries; NaN is the largest."""
    x = jnp.asarray([[-jnp.inf, -1.0, jnp.nan], [2.0, 3.0, -jnp.inf]])[None, :, :, None]

    def model(x):
        return nn.max_pool(x, (1, 2), (1, 2), "SAME")

    np.testing.assert_array_equal(jax.jit(rewritten(Partial(model)))(x)[0, ..., 0], [[-1, jnp.nan], [3, -jnp.inf]])


KERNEL = RNG.normal(size=(3, 3, 2, 2))


def conv(x, **options):
    return lax.conv_general_dilated(x, jnp.asarray(KERNEL), (1, 1), "SAME", dimension_numbers=LAYOUTS[0], **options)


@jax.custom_vjp
def halved(x):
    return conv(x)


halved.defvjp(lambda x: (conv(x), x), lambda x, pull: (conv(pull) / 2,))


@jax.custom_jvp
def doubled(x):
    return conv(x)


doubled.defjvp(lambda primals, tangents: (conv(*primals), 2 * conv(*tangents)))


def of_scan(x):
    def body(carry, row):
        carry = jnp.tanh(conv(carry) + row[None])
        return carry, jnp.sum(carry, (0, 1, 2))

    carry, sums = lax.scan(body, x, jnp.ones((3, 5, 4, 2)) * jnp.arange(3.0)[:, None, None, None], reverse=True)
    return carry + sums.sum(0)[None, None, None]


#: `{kind: (function, [convolutions of XLA, window maxima of XLA, derivative rules of their own] of the result)}`.
NESTED = {
    "jit": (jax.jit(lambda x: jnp.sin(jax.jit(conv)(x))), [0, 0, 1]),
    "remat": (jax.checkpoint(lambda x: jnp.sin(conv(x)), policy=jax.checkpoint_policies.dots_saveable), [0, 0, 1]),
    "scan": (of_scan, [0, 0, 1]),
    "fori_loop": (lambda x: lax.fori_loop(0, 3, lambda _, x: jnp.tanh(conv(x)), x), [0, 0, 1]),
    "cond": (lambda x: lax.cond(jnp.sum(x) > 0, conv, lambda x: 2 * jnp.sin(conv(x)), x), [0, 0, 2]),
    "switch": (lambda x: lax.switch(jnp.int32(1), [conv, jnp.sin, jnp.cos], x), [0, 0, 1]),
    "custom_vjp": (lambda x: jnp.sin(halved(x)), [1, 0, 1]),
    "custom_jvp": (lambda x: jnp.sin(doubled(x)), [1, 0, 1]),
    "vmap": (jax.vmap(lambda x: conv(x[None])[0]), [0, 0, 1]),
    "gradient": (jax.grad(lambda x: jnp.sum(jnp.sin(conv(x)))), [0, 0, 2]),
    "nothing": (lambda x: jax.jit(jnp.sin)(x), [0, 0, 0]),
}


@pytest.mark.parametrize("kind", NESTED)
def test_inside_other_transformations(x64, kind):
    function, expected = NESTED[kind]
    x = normal(2, 5, 4, 2)
    check(function, x)
    assert replaced(function, x) == expected


def test_a_while_loop_is_left_alone(x64):
    def function(x):
        return lax.while_loop(lambda x: jnp.sum(x**2) > 1, lambda x: conv(x) / 20, x)

    x = normal(2, 5, 4, 2)
    np.testing.assert_array_equal(jax.jit(rewritten(Partial(function)))(x), jax.jit(function)(x))
    assert replaced(function, x) == [1, 0, 0]


def test_a_program_without_layers_stays_as_it_is():
    function, x = jax.jit(lambda x: jnp.tanh(jnp.sin(x))), jnp.ones((2, 3))
    texts = [str(jax.make_jaxpr(f)(x)) for f in (lambda x: function(x), rewritten(Partial(function)))]
    assert texts[0] == texts[1]


def test_vmap_over_tasks_equals_a_loop(x64):
    function, x = rewritten(Partial(of_scan)), normal(3, 2, 5, 4, 2)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(function(x)))))
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(x), [gradient(task) for task in x], atol=1e-12)


class LeNet(nn.Module):
    """As any user of Flax writes it."""

    @nn.compact
    def __call__(self, x):
        for features in (3, 5):
            x = nn.max_pool(nn.relu(nn.Conv(features, (5, 5))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


def of_flax(images):
    variables = LeNet().init(jax.random.key(0), images)
    return functools.partial(LeNet().apply, variables)


def of_equinox(images):
    keys = jax.random.split(jax.random.key(0), 3)
    layers = [eqx.nn.Conv2d(1, 3, 5, padding=2, key=keys[0]), jax.nn.relu, eqx.nn.MaxPool2d(2, 2)]
    layers += [eqx.nn.Conv2d(3, 5, 5, key=keys[1]), jax.nn.relu, eqx.nn.MaxPool2d(2, 2), jnp.ravel]
    model = eqx.nn.Sequential(
        [eqx.nn.Lambda(f) if callable(f) and not isinstance(f, eqx.Module) else f for f in layers]
    )
    return lambda x: jax.vmap(model)(jnp.moveaxis(x, -1, 1))


@pytest.mark.parametrize("make", [of_flax, of_equinox])
def test_models_of_frameworks_in_float32(make):
    with jax.numpy_rank_promotion("allow"):
        images = normal(3, 12, 12, 1, dtype=np.float32)
        model = make(images)
        found, expected = (measured(f)(images) for f in (rewritten(Partial(model)), model))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == jnp.float32
            np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.max(jnp.abs(other))))
        assert replaced(model, images)[:2] == [0, 0]


def test_layers_of_this_library_are_left_alone():
    images = jnp.ones((2, 12, 12, 1))
    variables = build_model("lenet", 10).init(jax.random.key(0), images)
    model = functools.partial(apply_function("lenet", 10), variables)
    values = [jax.jit(f)(images) for f in (model, rewritten(Partial(model)))]
    np.testing.assert_array_equal(*values)


def test_low_precision_keeps_its_dtype():
    kernel = normal(3, 3, 2, 2, dtype=jnp.bfloat16)
    images = normal(2, 5, 4, 2, dtype=jnp.bfloat16)

    def model(x, **options):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUTS[0], **options)

    assert jax.jit(rewritten(Partial(model)))(images).dtype == jnp.bfloat16
    wide = functools.partial(model, preferred_element_type=jnp.float32)
    assert jax.jit(rewritten(Partial(wide)))(images).dtype == jnp.float32
    assert replaced(wide, images) == [1, 0, 0]


def test_other_devices_and_eager_calls_have_the_function_itself(monkeypatch):
    seen = []

    def model(x):
        seen.append(isinstance(x, jax.core.Tracer))
        return nn.max_pool(x, (2, 2), (2, 2))

    x = jnp.ones((1, 4, 4, 1))
    rewritten(Partial(model))(x)
    assert seen == [False]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert replaced(model, x) == [0, 1, 0]


def test_a_family_of_a_flax_model_has_fast_layers_and_present_weights():
    images = RNG.uniform(size=(12, 8, 8, 1)).astype(np.float32)
    state = {"scale": 1.0}

    def model(x):
        return state["scale"] * nn.max_pool(x[:, :, :, :1], (4, 2), (4, 2)).reshape(len(x), -1)

    family = lft_jax.uap_family(images, np.arange(12) % 3, model, ways=3, query_shots=2, epsilon=0.1)
    text = str(jax.make_jaxpr(family.logits_fn)(images[:2]))
    assert "reduce_window" not in text
    run = jax.jit(lambda family, x: family.logits_fn(x))
    np.testing.assert_allclose(run(family, images[:2]), model(images[:2]), rtol=1e-6)
    state["scale"] = 3.0
    np.testing.assert_allclose(run(family.refreshed(), images[:2]), model(images[:2]), rtol=1e-6)


def test_weights_that_are_arguments_share_a_compiled_program():
    images, traced = RNG.uniform(size=(12, 8, 8, 1)).astype(np.float32), []

    def model(weights, x):
        if isinstance(x, jax.core.Tracer):
            traced.append(1)
        return nn.max_pool(x, (4, 4), (4, 4)).reshape(len(x), -1) @ weights

    @jax.jit
    def run(family, x):
        return family.logits_fn(x)

    for number in range(3):
        weights = normal(4, 3, dtype=np.float32)
        family = lft_jax.uap_family(
            images, np.arange(12) % 3, Partial(model, weights), ways=3, query_shots=2, epsilon=0.1
        )
        before = len(traced)
        np.testing.assert_allclose(run(family, images[:2]), model(weights, jnp.asarray(images[:2])), rtol=1e-5)
        assert len(traced) == before + (number == 0)
