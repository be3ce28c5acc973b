"""Few-shot classification against NumPy, brute force and finite differences."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from lft_jax._layers import conv_by_patches
from lft_jax.evaluation.metrics import evaluate
from lft_jax.meta import learners
from lft_jax.meta.trainer import meta_trainer
from lft_jax.optimizers.rules import coordinate_lstm
from lft_jax.tasks._networks import apply_network
from lft_jax.tasks.classification import classification_family
from lft_jax.tasks.perturbation import Batch

RNG = np.random.default_rng(0)
# Every image encodes its index, and so its label, also after resizing.
NUMBERS = np.arange(60)
LABELS = np.repeat([0, 2, 3, 7, 9], 12)
IMAGES = np.broadcast_to(NUMBERS.astype(np.uint8)[:, None, None, None] * 4, (60, 4, 4, 1))
OPTIONS = {"ways": 3, "shots": 2, "query_shots": 4, "architecture": "linear"}
BATCH = Batch(jnp.asarray(RNG.uniform(size=(6, 9, 8, 2)), jnp.float32), jnp.asarray([0, 1, 2, 0, 1, 2], jnp.int32))


def numbers(batch):
    return np.round(np.asarray(batch.images)[:, 0, 0, 0] * 255 / 4).astype(int)


DRAW = jax.jit(lambda family, key: family.sample(key))


@given(st.integers(0, 10_000), st.sampled_from([None, (7, 0, 3)]))
def test_tasks_have_distinct_images_of_random_classes_labelled_from_0(seed, classes):
    episode = DRAW(classification_family(IMAGES, LABELS, classes=classes, **OPTIONS), jax.random.key(seed))
    support, query = (numbers(batch) for batch in episode)
    assert (len(support), len(query)) == (6, 12)
    assert len({*support, *query}) == 18
    for found, batch in ((support, episode.support), (query, episode.query)):
        real = LABELS[found]
        assert set(real) <= set(LABELS if classes is None else classes)
        # Labels and classes correspond one to one, with as many images of each.
        pairs = set(zip(np.asarray(batch.labels).tolist(), real.tolist(), strict=True))
        assert {name for name, _ in pairs} == {0, 1, 2} and len(pairs) == len({label for _, label in pairs}) == 3
        assert set(np.bincount(batch.labels)) == {len(found) // 3}
    assert {*LABELS[support]} == {*LABELS[query]}


def test_every_class_gets_every_label():
    family = classification_family(IMAGES, LABELS, **OPTIONS)
    episodes = jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(0), 300))
    labels = LABELS[numbers(Batch(episodes.query.images.reshape(-1, 4, 4, 1), None))].reshape(300, 12)[:, ::4]
    found = [[np.sum(labels[:, name] == label) for name in range(3)] for label in np.unique(LABELS)]
    # Binomial, of mean 60 and standard deviation 7.
    assert np.abs(np.asarray(found) - 60).max() < 5 * 7


def reference_logits(theta, images):
    """The networks with XLA's convolution and flax's normalization and pooling."""
    x = images
    for layer in theta["body"]:
        if "strided_kernel" in layer:
            x = jax.lax.conv_general_dilated(
                x, layer["strided_kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            norm = nn.BatchNorm(use_running_average=False, epsilon=1e-5, use_fast_variance=False)
            weights = {name: layer[name] for name in ("scale", "bias")}
            zeros = jnp.zeros(x.shape[-1])
            stats = {"mean": zeros, "var": zeros}
            x = norm.apply({"params": weights, "batch_stats": stats}, x, mutable=["batch_stats"])[0]
            x = nn.relu(x)
            continue
        if "kernel" in layer:
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = nn.max_pool(x, (2, 2), (2, 2)) if min(x.shape[1:3]) > 1 else x
            norm = nn.LayerNorm(epsilon=1e-5, reduction_axes=(1, 2, 3), feature_axes=(-1,), use_fast_variance=False)
            x = norm.apply({"params": {"scale": layer["scale"], "bias": layer["bias"]}}, x)
            x = nn.relu(x)
        else:
            x = nn.relu(x.reshape(len(x), -1) @ layer["weight"] + layer["bias"])
    x = x.mean((1, 2)) if theta["body"] and "strided_kernel" in theta["body"][-1] else x.reshape(len(x), -1)
    return x @ theta["head"]["weight"] + theta["head"]["bias"]


def network(architecture, images=BATCH.images, **options):
    """A three-way family on images of this shape, and weights of which none are 0."""
    data = np.broadcast_to(np.asarray(images)[:1], (30, *images.shape[1:]))
    options = {**OPTIONS, "architecture": architecture, **options}
    family = classification_family(data, np.arange(30) % 3, **options)
    theta = family.init(jax.random.key(0))
    return family, jax.tree.map(lambda x: x + jnp.asarray(RNG.normal(0, 0.1, x.shape), x.dtype), theta)


@pytest.mark.parametrize(("architecture", "width"), [("linear", None), ("mlp", 5), ("conv4", 3), ("conv4_strided", 3)])
def test_the_loss_is_the_networks_cross_entropy(architecture, width):
    family, theta = network(architecture, width=width)
    with jax.numpy_rank_promotion("allow"):
        logits = np.asarray(jax.jit(reference_logits)(theta, BATCH.images), np.float64)
    np.testing.assert_allclose(jax.jit(apply_network)(theta, BATCH.images), logits, rtol=1e-4, atol=1e-5)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.mean(np.log(chances[np.arange(6), BATCH.labels]))
    metrics = jax.jit(family.metrics)(theta, BATCH)
    np.testing.assert_allclose([jax.jit(family.loss)(theta, BATCH), metrics["loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(logits.argmax(1) == BATCH.labels))
    assert metrics.keys() == {"loss", "accuracy"}
    assert family.project(theta) is theta


@pytest.mark.parametrize(("architecture", "width"), [("mlp", 5), ("conv4", 3), ("conv4_strided", 3)])
def test_gradients_are_finite_differences(x64, architecture, width):
    batch = BATCH._replace(images=BATCH.images.astype(jnp.float64))
    family, theta = network(architecture, batch.images, width=width)
    assert {x.dtype for x in jax.tree.leaves(theta)} == {jnp.dtype("float64")}
    estimate = jax.jit(family.oracle(batch))(theta, jax.random.key(0))
    flat, unflatten = jax.flatten_util.ravel_pytree(theta)
    loss = jax.jit(lambda flat: family.loss(unflatten(flat), batch))
    np.testing.assert_allclose(estimate.value, loss(flat))
    assert estimate.queries == 6
    grads = jax.flatten_util.ravel_pytree(estimate.grads)[0]
    for _ in range(5):
        direction = jnp.asarray(RNG.normal(size=flat.shape))
        slope = (loss(flat + 1e-6 * direction) - loss(flat - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose(slope, grads @ direction, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["conv4", "conv4_strided"])
def test_gradients_of_blank_images_are_finite(architecture):
    family, theta = network(architecture, width=3)
    blank = BATCH._replace(images=jnp.zeros_like(BATCH.images))
    theta = {**theta, "body": [{**layer, "bias": jnp.zeros(3)} for layer in theta["body"]]}

    def after_a_step(theta):
        grads = jax.grad(family.loss)(theta, blank)
        return family.loss(jax.tree.map(lambda x, g: x - 0.1 * g, theta, grads), blank)

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.jit(jax.grad(after_a_step))(theta)))


def test_the_logits_of_an_image_do_not_depend_on_its_batch():
    _, theta = network("conv4", width=3)
    apply = jax.jit(apply_network)
    np.testing.assert_allclose(apply(theta, BATCH.images)[2:3], apply(theta, BATCH.images[2:3]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("architecture", "name"), [("conv4", "kernel"), ("conv4_strided", "strided_kernel")])
@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_conv4_takes_images_of_any_size(side, architecture, name):
    _, theta = network(architecture, jnp.zeros((2, side, side, 3)), width=2)
    assert [layer[name].shape for layer in theta["body"]] == [(3, 3, 3, 2), *[(3, 3, 2, 2)] * 3]
    assert jax.eval_shape(apply_network, theta, jnp.zeros((2, side, side, 3))).shape == (2, 3)


def test_weights_have_the_variance_of_their_initializer():
    data = np.zeros((60, 10, 10, 3), np.uint8)
    theta = classification_family(data, LABELS, **{**OPTIONS, "architecture": "mlp"}, width=400).init(jax.random.key(0))
    np.testing.assert_allclose(theta["body"][0]["weight"].var(), 2 / 300, rtol=0.05)
    np.testing.assert_allclose(theta["head"]["weight"].var(), 1 / 400, rtol=0.15)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (1, 1)])
def test_convolution_by_patches_matches_xla(shape, stride):
    kernel = jnp.asarray(RNG.normal(size=(*shape, 2, 3)), jnp.float32)
    expected = jax.lax.conv_general_dilated(
        BATCH.images, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(conv_by_patches(BATCH.images, kernel, stride=stride), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="kernel must have odd height and width"):
        conv_by_patches(BATCH.images, kernel[:, :0])


def test_images_are_resized():
    family = classification_family(IMAGES, LABELS, **OPTIONS, size=2)
    assert family.images.shape == (60, 2, 2, 1) and family.images.dtype == jnp.uint8
    np.testing.assert_array_equal(family.images[:, 1, 1, 0], NUMBERS * 4)


@pytest.mark.standard_promotion
def test_adam_learns_the_labels():
    images = RNG.uniform(0, 0.3, (80, 6, 6, 1)).astype(np.float32)
    labels = np.arange(80) % 4
    for label in range(4):  # a bright row
        images[labels == label, label] += 0.6
    family = classification_family(images, labels, ways=3, shots=3, query_shots=5, architecture="conv4", width=4)
    keys = jax.random.split(jax.random.key(1), 5)
    # Under vmap, where NaNs came from an elementwise result that XLA recomputed after pooling.
    options = {"num_steps": 40, "at": (1, 40)}
    found = evaluate(learners.fixed("adam", optax.adam), {"learning_rate": 0.02}, family, keys, **options)
    assert np.isfinite(found["loss"]).all()
    assert found["loss"][:, 1].mean() < 0.6 * found["loss"][:, 0].mean()
    assert found["accuracy"][:, 1].mean() > 0.7
    np.testing.assert_array_equal(found["queries"][:, 1], 40 * 9)


def test_incongruous_families_can_be_meta_trained_together_but_not_by_maml():
    linear = classification_family(IMAGES, LABELS, **OPTIONS)
    mlp = classification_family(IMAGES, LABELS, **{**OPTIONS, "architecture": "mlp"}, width=3, size=3)
    rule = coordinate_lstm(3, 1, features="raw")
    options = {"num_steps": 2, "tasks_per_family": 1, "meta_optimizer": optax.sgd(0.1)}
    trainer = meta_trainer(learners.lft(rule), (linear, mlp), **options)
    _, metrics = trainer.step(trainer.init(jax.random.key(0)))
    assert np.isfinite(metrics["family_loss"]).all() and metrics["skipped"] == 0
    assert metrics["grad_norm"] > 0
    with pytest.raises(ValueError, match="maml needs congruous tasks"):
        meta_trainer(learners.maml(optax.sgd(0.1)), (linear, mlp), **options).init(jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 6}, "ways: a task needs 6 classes, but there are only 5"),
        ({"ways": 1}, "ways must be at least 2, got 1"),
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"query_shots": 11}, r"shots \+ query_shots: class 0 has 12 images, but a task needs 13 per class"),
        ({"architecture": "conv3"}, "architecture: unknown name 'conv3'. Did you mean 'conv4'"),
        ({"width": 3}, "width: 'linear' has no hidden layer, got 3"),
        ({"architecture": "mlp", "width": 0}, "width must be at least 1, got 0"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"classes": (0, 1, 2, 3)}, r"classes: no image has the labels \[1\]"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        classification_family(IMAGES, LABELS, **{**OPTIONS, **options})
