"""Universal-perturbation tasks on 4x4 images whose first pixel encodes their index, against plain loops."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lft_jax import Augmentation, WaveSearch, oracles
from lft_jax.meta import learners
from lft_jax.meta.outer_loss import run_task
from lft_jax.optimizers import projected_gradient
from lft_jax.tasks.perturbation import AttackLoss, Constraint
from lft_jax.tasks.recipe import AttackRecipe
from lft_jax.tasks.uap import attack_metrics, uap_family

CLASSES, SIZES = 3, (9, 7, 8)
RNG = np.random.default_rng(0)
LABELS = RNG.permutation(np.repeat(np.arange(CLASSES), SIZES))
ROWS = np.arange(len(LABELS))
IMAGES = RNG.integers(0, 256, (len(LABELS), 4, 4, 1)).astype(np.uint8)
IMAGES[:, 0, 0, 0] = ROWS
WEIGHTS = RNG.normal(size=(16, CLASSES)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), 300)


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights.astype(images.dtype)


VICTIM = jax.tree_util.Partial(linear, jnp.asarray(WEIGHTS))


def build(images=IMAGES, labels=LABELS, victim=VICTIM, **options):
    """A family; fields of the recipe and the penalty may be given as options."""
    options = {"ways": 2, "shots": 2, "query_shots": 3, "epsilon": 0.2, **options}
    recipe = AttackRecipe(options.pop("support_loss", None), augmentation=None, start=options.pop("start", "zeros"))
    if "penalty" in options:
        options["constraint"] = Constraint(options.pop("norm"), options.pop("epsilon"), options.pop("penalty"))
    return uap_family(images, labels, victim, recipe=recipe, **options)


def rows_of(batch):
    return np.round(np.asarray(batch.images)[..., 0, 0, 0] * 255).astype(int)


@jax.jit
def draw(family):
    """The episodes of all keys, sampled under jit and vmap."""
    return jax.vmap(family.sample)(KEYS)


@pytest.fixture(scope="module")
def episodes():
    return draw(build())


@pytest.fixture(scope="module")
def support():
    return build().batch(np.arange(6))


THETA = jnp.asarray(RNG.uniform(-0.2, 0.2, (4, 4, 1)).astype(np.float32))


# ---- Episodes ----


def test_episodes_have_images_and_labels_of_the_source(episodes):
    assert episodes.support.images.shape == (300, 4, 4, 4, 1)
    assert episodes.query.images.shape == (300, 6, 4, 4, 1)
    for batch in episodes:
        rows = rows_of(batch)
        np.testing.assert_array_equal(batch.labels, LABELS[rows])
        np.testing.assert_allclose(batch.images, IMAGES[rows] / np.float32(255), rtol=1e-6)


def test_support_and_query_are_disjoint_and_of_the_same_classes(episodes):
    for support, query in zip(rows_of(episodes.support), rows_of(episodes.query), strict=True):
        assert len({*support, *query}) == 2 * (2 + 3)
        counts = [collections.Counter(LABELS[rows].tolist()) for rows in (support, query)]
        assert [sorted(count.values()) for count in counts] == [[2, 2], [3, 3]]
        assert counts[0].keys() == counts[1].keys()


def test_the_key_decides_the_episode(episodes):
    again = jax.jit(build().sample)(KEYS[5])  # not vmapped
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[5], rtol=1e-6), again, episodes)
    assert len({tuple(rows) for rows in rows_of(episodes.support).tolist()}) > 280


def test_classes_and_images_are_drawn_uniformly(episodes):
    classes = np.bincount(LABELS[rows_of(episodes.support)].ravel(), minlength=CLASSES) / 600
    np.testing.assert_allclose(classes, 2 / 3, atol=0.12)  # 4.4 standard deviations
    for batch, shots in ((episodes.support, 2), (episodes.query, 3)):
        counts = np.bincount(rows_of(batch).ravel(), minlength=len(LABELS))
        expected = 300 * 2 / 3 * shots / np.asarray(SIZES)[LABELS]
        assert np.sum((counts - expected) ** 2 / expected) < 60  # chi-square of about 23 degrees: p = 4e-5
        assert counts.min() > 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_floating_images_are_kept(dtype):
    images = (IMAGES / 255).astype(dtype)
    family = build(images)
    np.testing.assert_array_equal(family.batch(np.arange(3)).images, images[:3])
    assert family.init(KEYS[0]).dtype == dtype


@pytest.mark.parametrize(
    "options", [{"labels": np.where(LABELS == 1, 2, LABELS)}, {"loss": AttackLoss(target=1)}], ids=["absent", "target"]
)
def test_some_classes_are_never_drawn(options):
    drawn = draw(dataclasses.replace(build(**options), objective=AttackLoss()))
    assert set(np.unique(drawn.query.labels)) == {0, 2}


@pytest.mark.parametrize(("norm", "order"), [("linf", np.inf), ("l2", 2)])
def test_starts(norm, order):
    np.testing.assert_array_equal(build(norm=norm).init(KEYS[0]), np.zeros((4, 4, 1)))
    family = build(norm=norm, start="random")
    first, second = family.init(KEYS[0]), family.init(KEYS[1])
    assert not np.allclose(first, second)
    size = np.linalg.norm(np.ravel(first), order)
    assert 0.05 < size <= 0.2 * (1 + 1e-6)


# ---- Losses, gradients, metrics ----


def image_loss(theta, image, label, loss):
    logits = jnp.clip(image + theta, 0, 1).reshape(1, -1) @ WEIGHTS
    return loss(logits, label[None])[0]


@pytest.mark.parametrize(
    "options",
    [
        {"support_loss": AttackLoss("cross_entropy", beta=3.0)},
        {"norm": "l1", "epsilon": None, "penalty": 0.3},
        {"norm": "l2", "epsilon": None, "penalty": 0.3, "support_loss": AttackLoss("hinge", 0.5, target=2)},
    ],
    ids=["ball", "l1 penalty", "l2 penalty, targeted"],
)
def test_the_oracle_returns_mean_and_spread_of_the_image_gradients(support, options):
    family = build(**options)
    estimate = jax.jit(family.oracle(support))(THETA, KEYS[0])
    grad = jax.jit(jax.value_and_grad(functools.partial(image_loss, loss=family.recipe.loss)))
    values, grads = zip(*(grad(THETA, x, y) for x, y in zip(*support, strict=True)), strict=True)
    grads, theta = np.stack(grads), np.asarray(THETA)
    length = np.sqrt(np.sum(theta**2))
    cost, pull = {
        "linf": (0, 0 * theta),
        "l1": (0.3 * np.abs(theta).sum(), 0.3 * np.sign(theta)),
        "l2": (0.3 * length, 0.3 * theta / length),
    }[family.constraint.norm]
    np.testing.assert_allclose(estimate.value, np.mean(values) + cost, rtol=1e-5)
    np.testing.assert_allclose(estimate.grads, grads.mean(0) + pull, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(estimate.extras["spread"], grads.std(0), rtol=1e-4, atol=1e-5)
    images = np.asarray(support.images)
    np.testing.assert_allclose(estimate.extras["context"], [images.mean(0), images.std(0)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(estimate.extras["scale"], 0.2 if family.constraint.norm == "linf" else 0.1)
    assert estimate.queries == 6


@pytest.mark.parametrize("penalty", [None, 5.0])
def test_a_zeroth_order_estimator_differs_only_in_the_attack_gradient(support, penalty):
    options = {"norm": "l1", "epsilon": None, "penalty": penalty} if penalty else {}
    exact = build(support_loss="cross_entropy", **options)
    estimator = oracles.ZerothOrder(16, directions="coordinate")
    estimated = dataclasses.replace(exact, estimator=estimator)
    theta = jnp.where(jnp.abs(THETA) < 0.02, 0.02, THETA)  # away from the kink of the l1 norm
    theta = theta.at[0, 0, 0].set(0)  # where only an exact penalty gradient is 0
    a, b = (jax.jit(family.oracle(support))(theta, KEYS[0]) for family in (exact, estimated))
    np.testing.assert_allclose(a.grads, b.grads, rtol=0.02, atol=0.06)  # some differences cross the clipping of a pixel
    assert b.queries == 2 * 16 * 6
    assert "spread" not in b.extras


def test_the_loss_is_the_mean_attack_loss_plus_the_penalty(support):
    loss = AttackLoss("hinge", kappa=0.5)
    family = build(norm="l1", epsilon=None, penalty=0.3, loss=loss, support_loss="cross_entropy")
    expected = np.mean([image_loss(THETA, x, y, loss) for x, y in zip(*support, strict=True)])
    np.testing.assert_allclose(family.loss(THETA, support), expected + 0.3 * np.abs(THETA).sum(), rtol=1e-5)


@pytest.mark.parametrize("target", [None, 0])
def test_metrics_match_a_loop(target):
    theta = 4 * THETA
    family = build(loss=AttackLoss(target=target), norm="l2", epsilon=None, penalty=0.3)
    batch = family.batch(ROWS)
    images = IMAGES.reshape(-1, 16) / 255
    clean = images @ WEIGHTS
    logits = np.clip(images + np.ravel(theta), 0, 1) @ WEIGHTS
    fooled, counted, changed, margins = 0, 0, 0, []
    for before, after, label in zip(clean, logits, LABELS, strict=True):
        margins.append(after[label] - max(np.delete(after, label)))
        changed += before.argmax() != after.argmax()
        if before.argmax() == label and label != target:
            counted += 1
            fooled += after.argmax() != label if target is None else after.argmax() == target
    assert 0 < fooled < counted < len(LABELS)
    metrics = jax.jit(family.metrics)(theta, batch)
    expected = {
        "asr": fooled / counted,
        "fooling_rate": changed / len(LABELS),
        "clean_accuracy": np.mean(clean.argmax(1) == LABELS),
        "margin": np.mean(margins),
        "l1": np.abs(theta).sum(),
        "l2": np.sqrt(np.sum(theta**2)),
        "linf": np.abs(theta).max(),
        "loss": float(family.loss(theta, batch)),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_the_success_rate_is_zero_if_no_image_is_classified_correctly():
    logits, labels = jnp.eye(3), jnp.asarray([1, 2, 0])
    found = attack_metrics(logits, -logits, labels, THETA, AttackLoss(), Constraint("linf", 0.1))
    assert found["asr"] == 0


def test_projection_keeps_to_the_ball():
    np.testing.assert_allclose(build().project(5 * THETA), np.clip(5 * THETA, -0.2, 0.2))


# ---- Families as pytrees ----


def test_losses_radii_and_victims_share_a_compilation(support):
    traces = []

    @jax.jit
    def loss(family, theta):
        traces.append(family)
        return family.loss(theta, support)

    other = jax.tree_util.Partial(linear, jnp.asarray(2 * WEIGHTS))
    families = [build(), build(loss="cross_entropy"), build(epsilon=0.3), build(victim=other)]
    values = [float(loss(family, THETA)) for family in families]
    assert len(traces) == 1
    assert values[0] == values[2] != values[1]
    np.testing.assert_allclose(values[3], 2 * values[0], rtol=1e-5)


# ---- Refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": np.where(LABELS == 2, 3, LABELS)}, r"labels must be within \[0, 3\), got values from 0 to 3"),
        ({"labels": LABELS - 1}, "labels must be at least 0"),
        ({"labels": LABELS[:-1]}, "labels must be"),
        ({"labels": LABELS.astype(float)}, "labels must be integers"),
        ({"images": IMAGES / np.float32(200)}, r"images must lie in \[0, 1\]"),
        ({"images": np.full(IMAGES.shape, np.nan, np.float32)}, r"images must lie in \[0, 1\]"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "no axis of length 0"),
        ({"images": IMAGES[..., 0]}, "images must be"),
        ({"shots": 5}, "shots . query_shots: class 1 has 7 images, but a task needs 8 per class"),
        ({"ways": 4}, "ways: a task needs 4 classes, but there are only 3"),
        ({"ways": 3, "loss": AttackLoss(target=0)}, "ways: a task needs 3 classes, but there are only 2"),
        ({"ways": 0}, "ways must be at least 1"),
        ({"shots": 0}, "shots must be at least 1"),
        ({"query_shots": 0}, "query_shots must be at least 1"),
        ({"epsilon": 0}, "epsilon must be a finite number above 0"),
        ({"epsilon": math.nan}, "epsilon must be a finite number above 0"),
        ({"epsilon": None}, "exactly one of epsilon"),
        ({"start": "zero"}, "start: unknown name 'zero'. Did you mean 'zeros'"),
        ({"loss": "hing"}, "loss: unknown name 'hing'. Did you mean 'hinge'"),
        ({"support_loss": "crossentropy"}, "Did you mean 'cross_entropy'"),
        ({"norm": "inf"}, "norm: unknown name 'inf'. Did you mean 'linf'"),
        ({"loss": AttackLoss(target=3)}, "target: 3 is not one of the victim's 3 classes"),
        ({"support_loss": AttackLoss(target=7)}, "target: 7 is not one of the victim's 3 classes"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"queries": 2}, {"query_shots": 2}),
        ({"support_loss": "cross_entropy"}, {"recipe": AttackRecipe(AttackLoss("cross_entropy"), augmentation=None)}),
        ({"start": "random"}, {"recipe": AttackRecipe(start="random", augmentation=None)}),
        ({"waves": WaveSearch(2, 3)}, {"recipe": AttackRecipe(search=WaveSearch(2, 3), augmentation=None)}),
        ({"augmentation": Augmentation()}, {"recipe": AttackRecipe()}),
        (
            {"norm": "l1", "epsilon": None, "penalty": 0.3},
            {"epsilon": None, "constraint": Constraint("l1", penalty=0.3)},
        ),
    ],
    ids=lambda keywords: "-".join(keywords),
)
def test_old_keywords_make_the_family_of_the_new_ones(old, new):
    """Also where the objective has a target, which a support loss by name did not take over."""
    options = {"ways": 2, "shots": 2, "epsilon": 0.2, "loss": AttackLoss("hinge", target=2)}
    with pytest.warns(DeprecationWarning, match="uap_family: .*= is deprecated, write "):
        found = uap_family(IMAGES, LABELS, VICTIM, **{**options, **old})
    expected = uap_family(IMAGES, LABELS, VICTIM, **{**options, **new})
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(TypeError, match="not both"):
        uap_family(IMAGES, LABELS, VICTIM, **{**options, **old, **new})


def test_the_recipe_of_a_family_is_changed_with_checks():
    family = build(loss=AttackLoss("hinge", target=2))
    assert family.with_recipe(loss="cross_entropy").recipe.loss == AttackLoss("cross_entropy", target=2)
    with pytest.raises(ValueError, match="start: unknown name 'zero'"):
        family.with_recipe(start="zero")
    with pytest.raises(ValueError, match="loss: unknown name 'hinges'"):
        family.with_recipe(loss="hinges")


def test_each_task_has_a_radius_of_its_own():
    family = build(epsilon=0.1, radius_factor=2.0)
    radii = np.asarray(jax.vmap(lambda key: family.drawn(key).constraint.epsilon)(jax.random.split(KEYS[0], 300)))
    assert radii.min() >= 0.05 and radii.max() <= 0.2
    exponents = np.log2(radii / 0.1)  # uniform over [-1, 1]: mean 0, variance 1/3
    np.testing.assert_allclose((exponents.mean(), exponents.var()), (0, 1 / 3), atol=0.1)
    assert build(epsilon=0.1).drawn(KEYS[0]).constraint.epsilon == 0.1

    learner, start = learners.maml(projected_gradient(5.0)), jnp.zeros((4, 4, 1))
    run = jax.jit(lambda key: run_task(learner, start, family, key, num_steps=1)[1].thetas)
    reached = np.asarray([np.max(np.abs(run(key))) for key in KEYS[:20]])
    reached = reached[reached > 0]  # where the support images are not all misclassified already
    assert 0.05 <= reached.min() < 0.08 and 0.12 < reached.max() <= 0.2001


def test_a_radius_that_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"radius_factor must be at least 1, got 0\.5"):
        build(radius_factor=0.5)
    with pytest.raises(ValueError, match="radius_factor: a penalty has no radius"):
        build(norm="l1", penalty=0.1, epsilon=None, radius_factor=2.0)
