"""Proxies: jigsaws against the images that their cells come from, and the oracle that uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lft_jax
from lft_jax import AttackRecipe, Proxies
from lft_jax.tasks.perturbation import AttackLoss, Batch, Constraint, perturb
from lft_jax.tasks.recipe import attack_oracle, step_queries

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.2, 0.8, size=(4, 11, 9, 2)).astype(np.float32)
WEIGHTS = RNG.normal(size=(11 * 9 * 2, 3)).astype(np.float32)


def linear(x):
    return x.reshape(len(x), -1) @ WEIGHTS


def found_in(cell, image):
    """Whether a cell is a part of an image, or of its mirror image."""
    height, width = cell.shape[:2]
    parts = np.lib.stride_tricks.sliding_window_view(image, (height, width), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    return bool((parts == cell).all((2, 3, 4)).any() or (parts == cell[:, ::-1]).all((2, 3, 4)).any())


@pytest.mark.parametrize("grid", [2, 3, 4])
def test_each_cell_is_a_part_of_a_support_image(grid):
    batch = np.asarray(Proxies(size=12, grids=(grid,))(IMAGES, jax.random.key(grid), scale=0.1))
    assert batch.shape == (12, 11, 9, 2)
    rows, columns = (np.arange(side) * grid // side for side in (11, 9))
    sources = []
    for image in batch:
        for i in range(grid):
            for j in range(grid):
                cell = image[rows == i][:, columns == j]
                sources.append([number for number, whole in enumerate(IMAGES) if found_in(cell, whole)])
    assert all(sources)
    assert {number for found in sources for number in found} == set(range(4))


def test_whole_images_are_shifted_and_all_different():
    batch = np.asarray(Proxies(size=8, grids=(1,), shift=0.2, flip=False)(IMAGES, jax.random.key(0), scale=0.1))
    reach, shifts, sources = (2, 2), set(), []
    for image in batch:
        padded = np.pad(IMAGES, ((0, 0), *[(r, r) for r in reach], (0, 0)), mode="edge")
        matches = [
            (n, dy, dx)
            for n in range(4)
            for dy in range(5)
            for dx in range(5)
            if np.array_equal(padded[n, dy : dy + 11, dx : dx + 9], image)
        ]
        ((number, *shift),) = matches
        sources.append(number)
        shifts.add(tuple(shift))
    assert sorted(sources) == [0, 0, 1, 1, 2, 2, 3, 3] and len(shifts) > 3
    few = np.asarray(Proxies(size=2, grids=(1,), shift=0.0, flip=False)(IMAGES, jax.random.key(1), scale=0.1))
    assert len({image.tobytes() for image in few}) == 2  # a minibatch of different images


def test_grids_share_the_batch_and_noise_is_in_units_of_the_scale():
    proxies = Proxies(size=10, grids=(1, 2, 4))
    batch = proxies(IMAGES, jax.random.key(0), scale=0.1)
    assert batch.shape == (10, 11, 9, 2) and batch.dtype == jnp.float32
    noisy = Proxies(size=10, grids=(1, 2, 4), noise=0.5)(IMAGES, jax.random.key(0), scale=0.1)
    change = np.abs(np.asarray(noisy - batch))
    assert 0.045 < change.max() <= 0.05 + 1e-6
    assert not np.array_equal(batch, proxies(IMAGES, jax.random.key(1), scale=0.1))
    jitted = jax.jit(lambda x, key: proxies(x, key, scale=0.1))(jnp.asarray(IMAGES), jax.random.key(0))
    np.testing.assert_array_equal(jitted, batch)


def test_one_image_and_double_precision():
    one = Proxies(size=3, grids=(1, 3))(IMAGES[:1], jax.random.key(0), scale=0.1)
    assert one.shape == (3, 11, 9, 2)
    with jax.enable_x64():
        double = Proxies(noise=0.1)(jnp.asarray(IMAGES, jnp.float64), jax.random.key(0), scale=jnp.float64(0.1))
        assert double.dtype == jnp.float64


def test_the_oracle_takes_predictions_as_labels_and_counts_them():
    proxies, theta, key = Proxies(size=6), jnp.full((11, 9, 2), 0.01), jax.random.key(3)
    loss, constraint = AttackLoss("cross_entropy"), Constraint("linf", 0.1)
    recipe = AttackRecipe(loss=loss, augmentation=proxies)
    support = Batch(jnp.asarray(IMAGES), jnp.zeros(4, jnp.int32))
    answer = attack_oracle(linear, support, recipe, constraint)(theta, key)
    batch = proxies(IMAGES, jax.random.split(key)[1], scale=0.1)
    labels = jnp.argmax(linear(batch), -1).astype(jnp.int32)
    assert len(set(labels.tolist())) > 1
    value, grads = jax.value_and_grad(lambda t: jnp.mean(loss(linear(perturb(batch, t)), labels)))(theta)
    np.testing.assert_allclose(answer.value, value, rtol=1e-5)
    np.testing.assert_allclose(answer.grads, grads, rtol=1e-4, atol=1e-6)
    assert int(answer.queries) == step_queries(recipe, 4) == 12
    np.testing.assert_allclose(answer.extras["periods"][0].mean, grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("oracle", ["gradient", lft_jax.ZerothOrder(num_directions=2, per_example=True)])
def test_an_attack_counts_what_it_asks_for(oracle):
    """A host model is asked for as many images as the history says."""
    asked = []

    def values(x):
        asked.append(len(x))
        return linear(x)

    def pull_back(x):
        return values(x), lambda cotangent: (cotangent @ WEIGHTS.T).reshape(x.shape)

    host = lft_jax.models.host_classifier(lft_jax.models.HostModel(values, pull_back))
    options = {"epsilon": 0.1, "steps": 3, "optimizer": optax.sgd(0.1), "oracle": oracle}
    options["recipe"] = AttackRecipe(augmentation=Proxies(size=6))
    found = lft_jax.universal_perturbation(host, IMAGES, **options)
    per_step = 6 + 6 * (1 if oracle == "gradient" else 4) + 4
    assert sum(asked) == found.queries == 4 + 3 * per_step
    same = lft_jax.universal_perturbation(linear, IMAGES, **options)
    np.testing.assert_allclose(found.perturbation, same.perturbation, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "proxies: size must be at least 1, got 0"),
        ({"grids": ()}, r"proxies: grids must be numbers of at least 1, got \(\)"),
        ({"grids": (0, 1)}, "proxies: grids must be"),
        ({"shift": 1.0}, r"proxies: shift must be in \[0, 1\), got 1.0"),
        ({"noise": -1}, "proxies: noise must be at least 0, got -1"),
    ],
)
def test_fields_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttackRecipe(augmentation=Proxies(**options)).check()
