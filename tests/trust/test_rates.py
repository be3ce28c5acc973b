"""Rates against brute force in NumPy, one image at a time."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from lft_jax import attack_success_rate, fooling_rate
from lft_jax.tasks import AttackLoss, Constraint
from lft_jax.tasks.uap import attack_metrics
from tests.trust.cases import for_all

SHAPE = (2, 2, 1)
CLASSES = st.integers(2, 5)
SEED = st.integers(0, 2**32 - 1)


def scores(weights, ties, images):
    """Logits of few values, so that some are equal; images that are dark at one corner have NaN."""
    found = np.asarray(images).reshape(len(images), -1) @ weights
    found = np.round(found) if ties else found
    found[np.asarray(images)[:, 0, 0, 0] < 0.1, 0] = np.nan
    return found.astype(np.float32)


def one_by_one(model, images, theta):
    """The classes of each image, clean and perturbed; None if a logit is NaN."""
    pairs = []
    for image in images:
        image = image / np.float32(255) if image.dtype == np.uint8 else image
        pair = []
        for x in (image, np.minimum(np.maximum(image + theta, 0), 1)):
            logits = model(x[None])[0]
            pair.append(None if np.isnan(logits).any() else int(np.argmax(logits)))
        pairs.append(pair)
    return pairs


@for_all(
    seed=SEED,
    count=st.sampled_from([1, 4, 9]),
    classes=CLASSES,
    batch_size=st.sampled_from([None, 1, 4]),
    target=st.integers(-3, 4),
    levels=st.booleans(),
    ties=st.booleans(),
)
def test_rates_are_those_of_single_images(seed, count, classes, batch_size, target, levels, ties):
    rng, target = np.random.default_rng(seed), None if target < 0 else target % classes
    weights = 3 * rng.normal(size=(4, classes))
    images = rng.uniform(0.05 * (rng.random() < 0.5), 1, size=(count, *SHAPE)).astype(np.float32)
    images = np.rint(255 * images).astype(np.uint8) if levels else images
    labels, theta = rng.integers(0, classes, count), rng.uniform(-0.6, 0.6, SHAPE).astype(np.float32)

    def model(x):
        return scores(weights, ties, x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of NaN, and of a clean accuracy as by chance
        rate = attack_success_rate(model, images, labels, theta, target=target, batch_size=batch_size)
        fooled = fooling_rate(model, images, theta, batch_size=batch_size)
    counted = hits = changed = 0
    for (clean, attacked), label in zip(one_by_one(model, images, theta), labels, strict=True):
        changed += attacked is not None and attacked != clean if clean is not None else attacked not in (None, 0)
        right = clean == label if clean is not None else label == 0  # NaN is the largest number to argmax
        if right and label != target:
            counted += 1
            hits += attacked is not None and (attacked != label if target is None else attacked == target)
    np.testing.assert_allclose(rate, hits / counted if counted else np.nan)
    np.testing.assert_allclose(fooled, changed / count)


@jax.jit
def metrics(clean, attacked, labels, loss):
    return attack_metrics(clean, attacked, labels, jnp.zeros(SHAPE), loss, Constraint("linf", 0.1))


@for_all(seed=SEED, classes=st.sampled_from([2, 4]), target=st.integers(-2, 3), ties=st.booleans())
def test_metrics_of_tasks_are_those_of_single_images(seed, classes, target, ties):
    rng, target = np.random.default_rng(seed), None if target < 0 else target % classes
    clean, attacked = rng.normal(size=(2, 6, classes)).astype(np.float32)
    clean, attacked = (np.round(x) if ties else x for x in (clean, attacked))
    attacked[rng.random(6) < 0.2, 0] = np.nan
    labels = np.argmax(clean, -1) if seed % 2 else rng.integers(0, classes, 6)
    found = metrics(clean, attacked, labels.astype(np.int32), AttackLoss(target=target))
    right = [i for i in range(6) if int(np.argmax(clean[i])) == labels[i]]
    counted = [i for i in right if labels[i] != target]
    goal = [None if np.isnan(attacked[i]).any() else int(np.argmax(attacked[i])) for i in range(6)]
    hits = [
        i for i in counted if goal[i] is not None and (goal[i] != labels[i] if target is None else goal[i] == target)
    ]
    changed = [i for i in range(6) if goal[i] is not None and goal[i] != int(np.argmax(clean[i]))]
    np.testing.assert_allclose(found["asr"], len(hits) / max(len(counted), 1), rtol=1e-6)
    np.testing.assert_allclose(found["clean_accuracy"], len(right) / 6, rtol=1e-6)
    np.testing.assert_allclose(found["fooling_rate"], len(changed) / 6, rtol=1e-6)
