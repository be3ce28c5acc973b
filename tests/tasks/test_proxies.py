"""Proxies: jigsaws against the images that their cells come from, and the oracle that uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lft_jax
from lft_jax import AttackRecipe, Proxies
from lft_jax.tasks.perturbation import AttackLoss, Batch, Constraint, perturb
from lft_jax.tasks.proxies import _alike_by_place
from lft_jax.tasks.recipe import attack_oracle, step_queries

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.2, 0.8, size=(4, 31, 29, 2)).astype(np.float32)
WEIGHTS = 0.1 * RNG.normal(size=(31 * 29 * 2, 3)).astype(np.float32)


def linear(x):
    return x.reshape(len(x), -1) @ WEIGHTS


def found_in(cell, image):
    """Whether a cell is a part of an image, or of its mirror image."""
    height, width = cell.shape[:2]
    parts = np.lib.stride_tricks.sliding_window_view(image, (height, width), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    return bool((parts == cell).all((2, 3, 4)).any() or (parts == cell[:, ::-1]).all((2, 3, 4)).any())


@pytest.mark.parametrize("grid", [2, 3, 4])
def test_each_cell_is_a_part_of_a_support_image(grid):
    proxies = Proxies(size=12, grids=(grid,), flip=True, noise=0.0)
    batch, sources = proxies(IMAGES, jax.random.key(grid), scale=0.1)
    assert batch.shape == (12, 31, 29, 2) and sources.shape == (0,) and proxies.jigsaws((31, 29, 2)) == 12
    rows, columns = (np.arange(side) * grid // side for side in (31, 29))
    found_sources = []
    for image in np.asarray(batch):
        for i in range(grid):
            for j in range(grid):
                cell = image[rows == i][:, columns == j]
                found_sources.append([number for number, whole in enumerate(IMAGES) if found_in(cell, whole)])
    assert all(found_sources)
    assert {number for found in found_sources for number in found} == set(range(4))


def correlation(images):
    """The mean over pairs of the covariance of two images, over the mean of their variances, by loops."""
    changes = np.asarray(images, np.float64) - np.mean(images, (1, 2), keepdims=True, dtype=np.float64)
    pairs = [np.sum(a * b) for i, a in enumerate(changes) for j, b in enumerate(changes) if i != j]
    return np.mean(pairs) / np.mean(np.sum(changes**2, (1, 2, 3)))


@pytest.mark.parametrize("count", [2, 5, 40])
def test_images_are_alike_by_place_from_a_correlation_on(count):
    shared, own = RNG.normal(size=(1, 12, 10, 2)), RNG.normal(size=(count, 12, 10, 2))
    brightness = RNG.uniform(size=(count, 1, 1, 2))  # makes no difference
    found = {}
    for weight in np.linspace(0, 3, 25):
        images = (weight * shared + own + brightness).astype(np.float32)
        found[correlation(images)] = bool(jax.jit(_alike_by_place)(jnp.asarray(images)))
    assert found == {value: value > 0.1 + 0.7 / count for value in found} and set(found.values()) == {False, True}


def test_what_counts_as_alike_by_place():
    assert not _alike_by_place(jnp.asarray(IMAGES))
    assert not _alike_by_place(jnp.zeros((4, 8, 8, 1)))
    assert not _alike_by_place(jnp.asarray(IMAGES[:1]))
    many = np.repeat(IMAGES, 30, axis=0)  # copies of four images: pairs of equal ones are a quarter
    assert _alike_by_place(jnp.asarray(many, jnp.bfloat16)) and correlation(many) > 0.2
    digits = lft_jax.data.load_source("digits", "train")
    assert _alike_by_place(lft_jax.data.unit_range(jnp.asarray(digits.images[:10])))


@pytest.mark.parametrize("grid", [2, 3, 4])
def test_parts_of_images_that_are_alike_keep_their_places(grid):
    alike = np.clip(IMAGES * 0.2 + IMAGES[:1], 0, 1)
    proxies = Proxies(size=12, grids=(1, grid), noise=0.0)
    made = jax.vmap(lambda images: proxies(images, jax.random.key(1), scale=0.1)[0])
    both = np.asarray(made(jnp.stack([alike, IMAGES])))  # both kinds in one program
    np.testing.assert_array_equal(both[1], proxies(IMAGES, jax.random.key(1), scale=0.1)[0])
    rows, columns = (np.arange(side) * grid // side for side in (31, 29))
    used = set()
    for number, image in enumerate(both[0, 6:]):
        for i in range(grid):
            for j in range(grid):
                at = np.ix_(rows == i, columns == j)
                sources = [source for source, whole in enumerate(alike) if np.array_equal(whole[at], image[at])]
                assert len(sources) == 1, number
                used.update(sources)
    assert used == set(range(4))
    moved = both[1, 6:]
    assert not any(np.array_equal(whole[:7, :7], image[:7, :7]) for image in moved for whole in IMAGES)


def test_whole_images_are_shifted_and_all_different():
    proxies = Proxies(size=8, grids=(1,), shift=0.1, noise=0.0)
    batch, sources = proxies(IMAGES, jax.random.key(0), scale=0.1)
    shifts, reach = set(), 3
    padded = np.pad(IMAGES, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    for image, source in zip(np.asarray(batch), sources.tolist(), strict=True):
        places = [(dy, dx) for dy in range(7) for dx in range(7)]
        (shift,) = [p for p in places if np.array_equal(padded[source, p[0] : p[0] + 31, p[1] : p[1] + 29], image)]
        shifts.add(shift)
    assert sorted(sources.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3] and len(shifts) > 3
    _, few = Proxies(size=2, grids=(1,))(IMAGES, jax.random.key(1), scale=0.1)
    assert len(set(few.tolist())) == 2  # a minibatch of different images


def test_grids_share_the_batch_and_noise_is_in_units_of_the_scale():
    proxies = Proxies(size=10, noise=0.0)
    batch, sources = proxies(IMAGES, jax.random.key(0), scale=0.1)
    assert batch.shape == (10, 31, 29, 2) and batch.dtype == jnp.float32
    assert len(sources) == 4 and proxies.jigsaws((31, 29, 2)) == 6  # 4, 3 and 3 of each grid
    noisy, _ = Proxies(size=10, noise=0.5)(IMAGES, jax.random.key(0), scale=0.1)
    change = np.abs(np.asarray(noisy - batch))
    assert 0.049 < change.max() <= 0.05 + 1e-6
    assert not np.array_equal(batch, proxies(IMAGES, jax.random.key(1), scale=0.1)[0])
    jitted, _ = jax.jit(lambda x, key: proxies(x, key, scale=0.1))(jnp.asarray(IMAGES), jax.random.key(0))
    np.testing.assert_array_equal(jitted, batch)


@pytest.mark.parametrize(("side", "jigsaws"), [(8, 0), (14, 15), (20, 15), (28, 20), (224, 20)])
def test_cells_have_seven_pixels_or_more(side, jigsaws):
    assert Proxies(size=30).jigsaws((side, 40 * side, 1)) == jigsaws
    images = IMAGES[:, :8, :8]
    batch, sources = Proxies(size=6, grids=(2, 4), shift=0.0, noise=0.0)(images, jax.random.key(0), scale=0.1)
    np.testing.assert_array_equal(batch, images[np.asarray(sources)])


def test_one_image_and_double_precision():
    one, _ = Proxies(size=3, grids=(1, 3))(IMAGES[:1], jax.random.key(0), scale=0.1)
    assert one.shape == (3, 31, 29, 2)
    with jax.enable_x64():
        double, sources = Proxies()(jnp.asarray(IMAGES, jnp.float64), jax.random.key(0), scale=jnp.float64(0.1))
        assert (double.dtype, sources.dtype) == (jnp.float64, jnp.int32)


def test_the_oracle_takes_predictions_as_labels_of_jigsaws_and_counts_them():
    proxies, theta, key = Proxies(size=6), jnp.full((31, 29, 2), 0.01), jax.random.key(3)
    loss, constraint = AttackLoss("cross_entropy"), Constraint("linf", 0.1)
    recipe = AttackRecipe(loss=loss, augmentation=proxies)
    support = Batch(jnp.asarray(IMAGES), jnp.asarray([2, 0, 1, 1]))
    answer = attack_oracle(linear, support, recipe, constraint)(theta, key)
    batch, sources = proxies(IMAGES, jax.random.split(key)[1], scale=np.float32(0.1))
    assert len(sources) == 2  # whole images keep their labels
    labels = jnp.concatenate([support.labels[sources], jnp.argmax(linear(batch[2:]), -1)]).astype(jnp.int32)
    value, grads = jax.value_and_grad(lambda t: jnp.mean(loss(linear(perturb(batch, t)), labels)))(theta)
    np.testing.assert_allclose(answer.value, value, rtol=1e-5)
    np.testing.assert_allclose(answer.grads, grads, rtol=1e-4, atol=1e-6)
    assert int(answer.queries) == step_queries(recipe, IMAGES.shape) == 4 + 6
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
    per_step = 4 + 6 * (1 if oracle == "gradient" else 4) + 4
    assert sum(asked) == found.queries == 4 + 3 * per_step
    same = lft_jax.universal_perturbation(linear, IMAGES, **options)
    np.testing.assert_allclose(found.perturbation, same.perturbation, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "proxies: size must be at least 1, got 0"),
        ({"size": 2.5}, "proxies: size must be a whole number of at least 1, got 2.5"),
        ({"grids": ()}, r"proxies: grids must be different numbers, at least one, got \(\)"),
        ({"grids": (1, 2, 1)}, "proxies: grids must be different numbers"),
        ({"grids": (0, 1)}, "proxies: grids must be at least 1, got 0"),
        ({"shift": 1.0}, r"proxies: shift must be in \[0, 1\), got 1.0"),
        ({"noise": -1}, "proxies: noise must be at least 0, got -1"),
    ],
)
def test_fields_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttackRecipe(augmentation=Proxies(**options)).check()
