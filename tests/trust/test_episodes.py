"""Support and query images of a task: disjoint, balanced, of the right classes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lft_jax import uap_family
from lft_jax.data import TaskSize
from lft_jax.tasks import AttackLoss, classification_family
from lft_jax.tasks.perturbation import LOSSES
from tests.trust.cases import for_all

IMAGES, CLASSES, MOST = 40, 5, 40
SIZES = ((2, 1, 3), (3, 2, 1), (2, 2, 2))
SEED = st.integers(0, 2**32 - 1)


def data(seed, per_class):
    """Images whose only pixel is their number; classes of random sizes, of which three are large enough."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate(
        [np.repeat(np.arange(3), per_class + 1), rng.integers(0, CLASSES, IMAGES - 3 * (per_class + 1))]
    )
    return (np.arange(IMAGES)[:, None, None, None] / 64).astype(np.float32), rng.permutation(labels)


def padded(family):
    """The family with a class table of one size, whatever the sizes of the classes."""
    return dataclasses.replace(family, table=jnp.pad(family.table, ((0, 0), (0, MOST - family.table.shape[1]))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def sampled(kind, size, family, key):
    return family.sample(key)


def numbers(batch):
    return np.rint(64 * np.asarray(batch.images)[:, 0, 0, 0]).astype(int)


def flat(images):
    return jnp.tile(images.reshape(len(images), 1), (1, CLASSES))


FLAT = jax.tree_util.Partial(flat)


@for_all(seed=SEED, size=st.sampled_from(SIZES), target=st.sampled_from([None, 0, 1, 4]))
def test_images_of_an_attack_are_disjoint_and_balanced(seed, size, target):
    ways, shots, query_shots = size
    images, labels = data(seed, shots + query_shots)
    if target is not None and ways > 2:
        ways = 2
    sizes = np.bincount(labels, minlength=CLASSES)
    kept = np.isin(labels, np.flatnonzero(sizes >= shots + query_shots))  # smaller classes are refused
    images, labels = images[kept], labels[kept]
    family = uap_family(
        images,
        labels,
        FLAT,
        ways=ways,
        shots=shots,
        query_shots=query_shots,
        epsilon=0.1,
        loss=AttackLoss(target=target),
    )
    rows = np.zeros((IMAGES - len(images), 1, 1, 1), np.float32)
    family = dataclasses.replace(
        padded(family),
        images=jnp.concatenate([family.images, rows]),
        labels=jnp.concatenate([family.labels, jnp.full(len(rows), -1, jnp.int32)]),
        objective=AttackLoss(),
        recipe=dataclasses.replace(family.recipe, loss=AttackLoss()),
    )
    episode = sampled("uap", TaskSize(ways, shots, query_shots), family, jax.random.key(seed))
    of = dict(zip(np.rint(64 * images[:, 0, 0, 0]).astype(int), labels, strict=True))
    assert_balanced(episode, of, ways, shots, query_shots)
    assert target not in episode.support.labels.tolist() + episode.query.labels.tolist()
    for batch in episode:
        assert batch.labels.tolist() == [of[number] for number in numbers(batch)]


@for_all(seed=SEED, size=st.sampled_from(SIZES))
def test_images_of_a_classification_task_are_disjoint_and_balanced(seed, size):
    ways, shots, query_shots = size
    images, labels = data(seed, shots + query_shots)
    large = np.flatnonzero(np.bincount(labels, minlength=CLASSES) >= shots + query_shots)[:3]
    options = {"ways": ways, "shots": shots, "query_shots": query_shots, "architecture": "linear", "classes": large}
    family = padded(classification_family(images, labels, **options))
    kept = np.zeros((IMAGES - len(family.images), 1, 1, 1), np.float32)
    family = dataclasses.replace(family, images=jnp.concatenate([family.images, kept]))
    episode = sampled("classification", family.size, family, jax.random.key(seed))
    of = dict(enumerate(labels))
    assert_balanced(episode, of, ways, shots, query_shots)
    # New labels: one for each class, the same in both sets.
    pairs = {
        (int(new), of[number]) for batch in episode for new, number in zip(batch.labels, numbers(batch), strict=True)
    }
    assert len(pairs) == ways and {new for new, _ in pairs} == set(range(ways))


def assert_balanced(episode, of, ways, shots, query_shots):
    support, query = numbers(episode.support), numbers(episode.query)
    assert len({*support, *query}) == len(support) + len(query) == ways * (shots + query_shots)
    counts = [np.unique([of[number] for number in part], return_counts=True) for part in (support, query)]
    assert counts[0][0].tolist() == counts[1][0].tolist() and len(counts[0][0]) == ways
    assert set(counts[0][1]) == {shots} and set(counts[1][1]) == {query_shots}


@pytest.mark.parametrize("kind", LOSSES)
def test_attack_tasks_are_traced_in_float64_under_strict_promotion(kind, x64):
    images, labels = (np.arange(12)[:, None, None, None] / 64.0), np.arange(12) % 3
    family = uap_family(images, labels, FLAT, ways=2, query_shots=2, epsilon=0.1, loss=kind)

    def loss(key):
        episode = family.sample(key)
        return family.loss(family.init(key), episode.query), family.oracle(episode.support)(family.init(key), key)

    value, estimate = jax.eval_shape(loss, jax.random.key(0))
    assert value.dtype == estimate.grads.dtype == jnp.float64
