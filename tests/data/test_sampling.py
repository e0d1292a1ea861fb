"""The order of images is a function of seed and epoch, for every kind of sampling."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from tract_transfer.data.sampling import (
    EpochOrder,
    TrainBatchSampler,
    aspect_groups,
    repeat_factors,
)

TALL = np.arange(30) % 3 == 0  # 10 of 30
FACTORS = np.where(np.arange(30) < 6, 2.4, 1.0) + np.where(np.arange(30) == 29, 1.5, 0)
# 24 * 1 + 6 * 2.4 + 1.5 = 39.9; of the tall: 10 + 2 * 1.4 = 12.8, of the others 27.1
KINDS = {
    "plain": {},
    "grouped": {"groups": TALL.astype(np.int64)},
    "repeated": {"factors": FACTORS},
    "both": {"groups": TALL.astype(np.int64), "factors": FACTORS},
    "copied": {"repeats": 2},
}


def epoch(order, number):
    return [sample for batch in order.batches(number) for sample in batch]


@pytest.mark.parametrize("kind", KINDS)
def test_order_depends_on_seed_and_epoch_alone(kind):
    order, same, other = (EpochOrder(30, 6, seed, **KINDS[kind]) for seed in (1, 1, 2))
    orders = [tuple(epoch(order, number)) for number in range(5)]
    assert [tuple(epoch(same, number)) for number in (4, 0)] == [orders[4], orders[0]]
    assert len({tuple(sample[1:] for sample in one) for one in orders}) == 5
    assert tuple(epoch(other, 0)) != orders[0]
    for number, one in enumerate(orders):
        assert {sample.epoch for sample in one} == {number}
        assert len(one) == 6 * order.iters_per_epoch


def test_no_batch_mixes_shapes_and_none_is_seen_twice():
    order = EpochOrder(30, 4, seed=0, **KINDS["grouped"])
    assert order.iters_per_epoch == 10 // 4 + 20 // 4
    shapes = []
    for number in range(20):
        batches = list(order.batches(number))
        assert all(len({TALL[sample.index] for sample in batch}) == 1 for batch in batches)
        assert len({sample.index for batch in batches for sample in batch}) == 28
        shapes.append(tuple(TALL[batch[0].index] for batch in batches))
    assert len(set(shapes)) > 5  # shapes alternate at random


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_factor_is_the_mean_number_of_showings(batch_size):
    order = EpochOrder(30, batch_size, seed=0, factors=FACTORS)
    assert order.iters_per_epoch == 40 // batch_size
    epochs = [Counter(sample.index for sample in epoch(order, e)) for e in range(400)]
    shown = np.array([[counts[index] for index in range(30)] for counts in epochs])
    assert (shown.sum(axis=1) == 40).all()
    scaled = FACTORS * 40 / FACTORS.sum()
    assert (shown >= np.floor(scaled)).all()
    assert (shown <= np.ceil(scaled)).all()
    assert np.abs(shown.mean(axis=0) - scaled).max() < 5 * 0.5 / np.sqrt(400)


def test_factors_of_one_change_nothing_but_the_order():
    order = EpochOrder(30, 5, 0, factors=np.ones(30))
    for number in range(50):
        assert sorted(epoch(order, number)) == [(number, index, 0) for index in range(30)]


@pytest.mark.parametrize("kind", ["repeated", "both"])
def test_repetitions_of_an_image_are_numbered_and_keep_the_lengths_of_groups(kind):
    order = EpochOrder(30, 1, seed=0, **KINDS[kind])
    for number in range(10):
        samples = epoch(order, number)
        counts = Counter(sample.index for sample in samples)
        assert set(samples) == {(number, i, copy) for i in counts for copy in range(counts[i])}
        assert len(samples) == 40
        assert kind == "repeated" or sum(TALL[sample.index] for sample in samples) == 13


def test_tall_images_are_those_higher_than_wide():
    assert aspect_groups(np.array([[3, 2], [2, 3], [2, 2], [0, 0]])).tolist() == [1, 0, 0, 0]


def test_repeat_factors_are_the_papers():
    # Class 0 is in all four images, 1 in two (thrice in one of them), 2 in one; image 4 is empty.
    first = np.array([0, 1, 3, 7, 8, 8])
    labels = np.array([0, 0, 1, 0, 1, 1, 2, 0])
    factors = repeat_factors(first, labels, 4, threshold=0.8)
    of_class = [1.0, np.sqrt(0.8 / 0.4), np.sqrt(0.8 / 0.2)]
    expected = [of_class[0], of_class[1], of_class[2], of_class[0], 1.0]
    assert np.allclose(factors, expected)
    assert (repeat_factors(first, labels, 4, threshold=0.2) == 1).all()


@pytest.mark.parametrize(("count", "batch_size"), [(29, 6), (14, 12), (41, 10), (100, 16)])
def test_a_batch_has_all_copies_of_its_images_except_at_its_ends(count, batch_size):
    order = EpochOrder(count, batch_size, 1, repeats=3)
    assert order.iters_per_epoch == count // batch_size  # an epoch shows as many images
    samples = epoch(order, 0)
    assert len(set(samples)) == len(samples) == count // batch_size * batch_size
    copies = Counter(sample.index for sample in samples).values()
    assert sorted(copies)[1:] == [3] * (len(copies) - 1)  # the epoch ends within one of them
    assert {sample.copy for sample in samples} == {0, 1, 2}
    for batch in order.batches(0):
        counts = Counter(sample.index for sample in batch)
        complete = sum(count == 3 for count in counts.values())
        assert complete >= (batch_size // 3 if batch_size % 3 == 0 else (batch_size - 4) // 3)


@pytest.mark.parametrize("batch_size", [6, 7, 12, 20])
def test_neighbors_and_processes_have_different_images(batch_size):
    order = EpochOrder(60, batch_size, 1, repeats=3)
    for batch in order.batches(0):
        indices = [sample.index for sample in batch]
        same = sum(a == b for a, b in zip(indices, indices[1:] + indices[:1], strict=True))
        assert same <= (batch_size % 3 > 0)  # the first and the last, of a batch cut within copies
    for rank in range(3):
        parts = TrainBatchSampler(EpochOrder(60, 12, 1, repeats=3), 0, rank, 3)
        assert all(len({sample.index for sample in part}) == 4 for part in islice(parts, 5))
