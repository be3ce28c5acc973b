"""The layers, compared with the convolution of XLA, autodiff, and the pooling of flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from lft_jax._layers import conv, depthwise_conv, max_pool
from lft_jax.victims.models import Conv


def reference(images, kernel, stride):
    return jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def sample(shape, kernel_shape, dtype=np.float64, seed=0):
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.normal(size=s), dtype) for s in (shape, kernel_shape)]


def objective(convolution, stride):
    # Neither linear nor quadratic, so that second derivatives depend on every argument.
    return lambda images, kernel: jnp.sum(jnp.sin(convolution(images, kernel, stride)))


def ours(images, kernel, stride):
    return conv(images, kernel, stride=stride)


def value_and_gradients(convolution, stride):
    @jax.jit
    def both(images, kernel):
        gradients = jax.grad(objective(convolution, stride), argnums=(0, 1))(images, kernel)
        return convolution(images, kernel, stride), gradients

    return both


@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    size=st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 3)]),
    stride=st.sampled_from([1, 2]),
    channels=st.sampled_from([1, 2, 4]),  # few (twice) and many
)
def test_value_and_gradients_equal_autodiff(height, width, size, stride, channels):
    with jax.enable_x64(True):
        arguments = sample((2, height, width, channels), (*size, channels, 3))
        found, expected = (value_and_gradients(f, stride)(*arguments) for f in (ours, reference))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), found, expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("shape", [(6, 13), (7, 8)])  # wider than the blocks of `_conv_by_blocks`
def test_rows_of_several_blocks(x64, shape, channels, stride):
    arguments = sample((2, *shape, channels), (5, 5, channels, 3))
    found, expected = (value_and_gradients(f, stride)(*arguments) for f in (ours, reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), found, expected)


def depthwise_reference(images, kernel, stride):
    numbers, groups = ("NHWC", "HWIO", "NHWC"), images.shape[-1]
    return jax.lax.conv_general_dilated(
        images, kernel[:, :, None], (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def depthwise(images, kernel, stride):
    return depthwise_conv(images, kernel, stride=stride)


@settings(max_examples=8, deadline=None)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    size=st.sampled_from([(3, 3), (5, 5), (1, 3)]),
    stride=st.sampled_from([1, 2]),
)
def test_depthwise_value_and_gradients_equal_autodiff(height, width, size, stride):
    with jax.enable_x64(True):
        arguments = sample((2, height, width, 3), (*size, 3))
        found, expected = (value_and_gradients(f, stride)(*arguments) for f in (depthwise, depthwise_reference))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), found, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_second_gradients_equal_autodiff(x64, stride):
    images, kernel = sample((2, 5, 6, 3), (3, 3, 3))

    def penalty(convolution):
        inner = jax.grad(objective(convolution, stride))
        return jax.jit(jax.grad(lambda images, kernel: jnp.sum(jnp.cos(inner(images, kernel))), argnums=(0, 1)))

    found, expected = (penalty(f)(images, kernel) for f in (depthwise, depthwise_reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), found, expected)


@pytest.mark.parametrize(("stride", "channels"), [(1, 1), (2, 2), (1, 4), (2, 4)])
def test_second_gradients_equal_autodiff(x64, stride, channels):
    images, kernel = sample((2, 5, 6, channels), (3, 3, channels, 3))

    def penalty(convolution):
        inner = jax.grad(objective(convolution, stride), argnums=(0, 1))

        def norm(images, kernel):
            return sum(jnp.sum(jnp.cos(g)) for g in inner(images, kernel))

        return jax.jit(jax.grad(norm, argnums=(0, 1)))(images, kernel)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), penalty(ours), penalty(reference))


def test_max_pool_finds_its_maxima_in_a_convolution_that_xla_may_fuse():
    images, kernel = sample((4, 8, 8, 1), (5, 5, 1, 16), np.float32)

    def pooled(convolution):
        return jax.jit(jax.grad(lambda images: jnp.sum(jnp.sin(max_pool(convolution(images, kernel, 1))))))(images)

    np.testing.assert_allclose(pooled(ours), pooled(reference), atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_vmap_over_tasks_equals_a_loop(x64, stride):
    images, kernel = sample((3, 2, 6, 5, 2), (3, 3, 2, 4))
    gradient = jax.grad(objective(ours, stride))
    mapped = jax.vmap(gradient, in_axes=(0, None))(images, kernel)
    np.testing.assert_allclose(mapped, [gradient(task, kernel) for task in images], atol=1e-12)
    outside = jax.grad(lambda k: jnp.sum(jax.vmap(objective(ours, stride), (0, None))(images, k)))(kernel)
    expected = sum(jax.grad(objective(ours, stride), argnums=1)(task, kernel) for task in images)
    np.testing.assert_allclose(outside, expected, atol=1e-11)


def test_vmap_merges_tasks_into_one_convolution():
    images, kernel = sample((3, 2, 6, 5, 4), (3, 3, 4, 5), np.float32)
    jaxpr = str(jax.make_jaxpr(jax.vmap(lambda x: ours(x, kernel, 1)))(images))
    assert jaxpr.count("conv_general_dilated") == 1
    assert "feature_group_count=1" in jaxpr


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_keeps_its_dtype_and_is_close(dtype):
    images, kernel = sample((2, 6, 6, 2), (3, 3, 2, 4), np.float32)
    expected = jax.grad(objective(reference, 1), argnums=(0, 1))(images, kernel)
    grads = jax.grad(objective(ours, 1), argnums=(0, 1))(images.astype(dtype), kernel.astype(dtype))
    for grad, value in zip(grads, expected, strict=True):
        assert grad.dtype == dtype
        tolerance = 16 * float(jnp.finfo(dtype).eps) * float(jnp.max(jnp.abs(value)))
        np.testing.assert_allclose(grad.astype(jnp.float32), value, atol=tolerance)


def test_max_pool_equals_flax_away_from_ties(x64):
    for shape in ((2, 6, 4, 3), (1, 5, 7, 2)):
        images = jnp.asarray(np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape) / 7.0)
        weights = jnp.cos(jnp.arange(np.prod((shape[0], shape[1] // 2, shape[2] // 2, shape[3])) * 1.0))

        def pooled(x, pool, weights=weights):
            return jnp.sum(weights * jnp.sin(pool(x)).ravel())

        def flax_pool(x):
            return nn.max_pool(x, (2, 2), (2, 2))

        np.testing.assert_array_equal(max_pool(images), flax_pool(images))
        grads = [jax.grad(pooled)(images, pool) for pool in (max_pool, flax_pool)]
        np.testing.assert_allclose(*grads, atol=1e-14)


def test_module_equals_flax_conv():
    images, _ = sample((2, 7, 6, 3), (1,), np.float32)
    ours_module, theirs = Conv(4, 5, stride=2), nn.Conv(4, (5, 5), (2, 2), "SAME")
    variables = ours_module.init(jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, theirs.init(jax.random.key(0), images))
    found, expected = (jnp.asarray(module.apply(variables, images)) for module in (ours_module, theirs))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel_shape", "stride", "argument"), [((2, 3, 1, 1), 1, "kernel"), ((3, 3, 1, 1), 3, "stride")]
)
def test_bad_arguments_are_named(kernel_shape, stride, argument):
    with pytest.raises(ValueError, match=f"^{argument} must"):
        conv(jnp.zeros((1, 4, 4, 1)), jnp.zeros(kernel_shape), stride=stride)


def test_max_pool_of_one_pixel_is_an_error():
    with pytest.raises(ValueError, match="images: height and width"):
        max_pool(jnp.zeros((1, 1, 4, 1)))
