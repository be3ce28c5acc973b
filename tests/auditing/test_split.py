import numpy as np
import pytest

from lft_jax.auditing import stratified_rows
from lft_jax.auditing._split import split_images, support_order

RNG = np.random.default_rng(0)
LABELS = RNG.permutation(np.repeat([0, 1, 2, 7], [100, 60, 30, 10]))


def shares(labels):
    return np.asarray([np.mean(labels == label) for label in (0, 1, 2, 7)])


@pytest.mark.parametrize("seed", [0, 1])
def test_parts_are_disjoint_and_stratified(seed):
    split = split_images(LABELS, 100, 1000, seed)
    assert [len(rows) for rows in split] == [50, 30, 120]
    assert sorted(np.concatenate(split)) == list(range(200))
    for rows in split:
        off = len(rows) * (shares(LABELS[rows]) - shares(LABELS))
        assert np.abs(off).max() <= 1 + 1e-9  # of each class within one image


def test_a_split_is_a_function_of_the_seed():
    first, again, other = (split_images(LABELS, 100, 1000, seed) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert set(a.tolist()) != set(c.tolist())


def test_parts_have_largest_sizes():
    split = split_images(np.zeros(5000, int), 100, 1000, 0)
    assert [len(rows) for rows in split] == [100, 200, 1000]
    with pytest.raises(ValueError, match=r"images: an audit splits them .* at least 20, got 19"):
        split_images(np.zeros(19, int), 100, 1000, 0)


def test_a_sample_is_stratified():
    rows = stratified_rows(LABELS, 20, seed=5)
    assert len(set(rows.tolist())) == 20
    assert np.bincount(LABELS[rows], minlength=8)[[0, 1, 2, 7]].tolist() == [10, 6, 3, 1]
    assert len(stratified_rows(LABELS, 1000)) == 200


def test_support_images_come_from_as_many_classes_as_possible_and_are_nested():
    order = support_order(LABELS, seed=0, draw=0)
    assert sorted(order) == list(range(200))
    for count in (1, 3, 4, 8, 11, 40):
        found = np.bincount(LABELS[order[:count]], minlength=8)[[0, 1, 2, 7]]
        assert found.max() - found.min() <= 1
    assert not np.array_equal(order, support_order(LABELS, 0, 1))
    first = {int(LABELS[support_order(LABELS, 0, draw)[0]]) for draw in range(30)}
    assert first == {0, 1, 2, 7}  # no class is always the first
