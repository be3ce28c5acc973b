"""Architectures: shapes, sizes, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax.victims import MODELS, apply_function, build_model


def abstract(architecture, shape, num_classes=10):
    model = build_model(architecture, num_classes)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0), images)
    return variables, jax.eval_shape(model.apply, variables, images)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("architecture", sorted(MODELS))
@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (3, 28, 28, 1), (1, 32, 32, 3), (1, 9, 13, 2)])
def test_logits_have_one_row_per_image(architecture, shape):
    _, logits = abstract(architecture, shape, num_classes=7)
    assert (logits.shape, logits.dtype) == ((shape[0], 7), jnp.float32)


@pytest.mark.parametrize(
    ("architecture", "shape", "parameters"),
    [
        # Counted by hand: kernels and biases of the convolutions, hidden layer, logits.
        ("small_cnn", (1, 8, 8, 1), 240 + 10416 + (2 * 2 * 48 * 64 + 64) + 650),
        ("lenet", (1, 28, 28, 1), 416 + 12832 + (7 * 7 * 32 * 64 + 64) + 650),
        # 9 times the products of neighbouring widths, scale and bias of each batch norm, logits.
        ("vgg", (1, 32, 32, 3), 9 * (72 + 576 + 1152 + 2304 + 4608 + 9216) + 2 * 2 * 168 + 970),
        # Table 6 of arXiv 1512.03385 says 0.27 million.
        (
            "resnet20",
            (1, 32, 32, 3),
            9 * (48 + 6 * 256 + 512 + 5 * 1024 + 2048 + 5 * 4096) + 2 * (7 * 16 + 6 * 96) + 650,
        ),
        # The same with two blocks and three quarters of the width.
        (
            "resnet14",
            (1, 32, 32, 3),
            9 * (36 + 4 * 144 + 288 + 3 * 576 + 1152 + 3 * 2304) + 2 * (5 * 12 + 4 * 72) + 490,
        ),
        # First convolution, products of neighbouring widths, 9 and a batch norm for each input of a depthwise
        # convolution, a batch norm for each output of a convolution, logits.
        (
            "mobilenet",
            (1, 32, 32, 3),
            864 + 2048 + 8192 + 16384 + 32768 + 2 * 65536 + (9 + 2) * 864 + 2 * (32 + 1088) + 2570,
        ),
        # Two convolutions, a batch norm, positions; a block: two layer norms, 4 products of attention, 2 more; logits.
        (
            "vit",
            (1, 28, 28, 1),
            (9 * 48 + 96) + (9 * 48 * 96 + 96) + 49 * 96 + 5 * (2 * 192 + 6 * (96 * 96 + 96)) + 192 + 970,
        ),
    ],
)
def test_numbers_of_parameters(architecture, shape, parameters):
    assert count(abstract(architecture, shape)[0]) == parameters


@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_too_small_images_are_refused(architecture):
    with pytest.raises(ValueError, match=r"images must be .* at least 4"):
        abstract(architecture, (1, 3, 8, 1))


def test_integer_images_are_refused():
    model = build_model("small_cnn", 10)
    with pytest.raises(ValueError, match="images must be floating-point"):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1), jnp.uint8))


def test_unknown_architectures_get_near_matches():
    with pytest.raises(ValueError, match=r"architecture: unknown name 'le_net'. Did you mean 'lenet'"):
        build_model("le_net", 10)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        build_model("lenet", 1)


@pytest.mark.parametrize("architecture", ["vgg", "mobilenet", "vit"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_the_dtype_is_that_of_the_images(x64, dtype, architecture):
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 4, 4, 1)), jnp.float32)
    variables, _ = abstract(architecture, images.shape, num_classes=3)
    variables = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, jnp.float32), variables)
    apply = jax.jit(apply_function(architecture, 3))
    logits, cast = apply(variables, images), apply(variables, images.astype(dtype))
    assert cast.dtype == dtype
    np.testing.assert_allclose(cast.astype(jnp.float32), logits, rtol=0.05)


@pytest.mark.parametrize("architecture", ["vgg", "resnet14", "mobilenet"])
def test_batch_norm_uses_the_batch_only_in_training(architecture):
    model = build_model(architecture, 3)
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 1)), jnp.float32)
    variables, _ = abstract(architecture, images.shape, num_classes=3)
    generator = np.random.default_rng(1)
    variables = jax.tree.map(lambda x: jnp.asarray(generator.uniform(0.1, 1, x.shape), x.dtype), variables)
    apply = jax.jit(model.apply)
    alone = apply(variables, images[:1])
    np.testing.assert_allclose(apply(variables, images)[:1], alone, rtol=1e-5)
    trained, changed = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, images)
    assert not np.allclose(trained[:1], alone, rtol=0.1)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), variables["batch_stats"], changed["batch_stats"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_gradients_with_respect_to_images_are_finite_and_not_zero(architecture):
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 8, 8, 1)), jnp.float32)
    variables, _ = abstract(architecture, images.shape, num_classes=3)
    generator = np.random.default_rng(1)
    variables = jax.tree.map(lambda x: jnp.asarray(generator.uniform(-0.1, 0.3, x.shape), x.dtype), variables)
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables.get("batch_stats", {}))
    apply = apply_function(architecture, 3)
    gradients = jax.jit(jax.grad(lambda images: jnp.sum(apply(variables, images)[:, 0])))(images)
    assert jnp.all(jnp.isfinite(gradients))
    assert jnp.all(jnp.any(gradients, (1, 2, 3)))


def test_equal_architectures_share_one_function():
    assert apply_function("lenet", 10) is apply_function("lenet", 10)
    assert apply_function("lenet", 10) is not apply_function("lenet", 11)
