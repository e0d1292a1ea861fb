"""Laws of the order of images, for any number of processes and micro-batches, resumed anywhere."""

from itertools import islice, pairwise

import numpy as np
from fuzzing import fuzzed
from hypothesis import assume, given
from hypothesis import strategies as st

from tract_transfer.data.sampling import EpochOrder, EvalSampler, TrainBatchSampler
from tract_transfer.data.streaming import StreamOrder

shares = st.tuples(st.integers(1, 4), st.integers(1, 3))  # processes, micro-batches


@st.composite
def orders(draw):
    """An order of any kind, in how many processes and micro-batches."""
    world_size, accumulate = draw(shares)
    batch_size = world_size * accumulate * draw(st.integers(1, 3))
    count = draw(st.integers(batch_size, 60))
    kind = draw(st.sampled_from(["plain", "grouped", "repeated", "copied"]))
    options = {}
    if kind == "grouped":
        tall = draw(st.integers(batch_size, max(batch_size, count // 2)))
        assume(count - tall >= batch_size)
        options = {"groups": (np.arange(count) < tall).astype(np.int64)}
    if kind == "repeated":
        options = {"factors": 1 + np.arange(count) % 4 / 2}
    if kind == "copied" and batch_size >= 4:
        options = {"repeats": 2}
    seed = draw(st.integers(0, 2**63))
    return EpochOrder(count, batch_size, seed, **options), kind, count, world_size, accumulate


def drawn(order, count, *where):
    return list(islice(TrainBatchSampler(order, *where), count))


@fuzzed
@given(made=orders(), start=st.integers(0, 40))
def test_processes_share_an_epoch_and_any_resume_is_the_tail(made, start):
    order, kind, count, world_size, accumulate = made
    length = start + 2 * order.iters_per_epoch
    whole = drawn(order, length)
    ranks = [
        drawn(order, (length - start) * accumulate, start, rank, world_size, accumulate)
        for rank in range(world_size)
    ]
    for number, batch in enumerate(whole[start:]):
        micro = range(number * accumulate, (number + 1) * accumulate)
        assert [sample for part in micro for rank in ranks for sample in rank[part]] == batch
    for epoch in range(length // order.iters_per_epoch):
        part = whole[epoch * order.iters_per_epoch : (epoch + 1) * order.iters_per_epoch]
        samples = [sample for batch in part for sample in batch]
        assert len(set(samples)) == len(samples) == order.iters_per_epoch * order.batch_size
        assert {sample.epoch for sample in samples} == {epoch}
        assert all(0 <= sample.index < count for sample in samples)
        if kind in ("plain", "grouped"):
            assert len({sample.index for sample in samples}) == len(samples)


@fuzzed
@given(count=st.integers(0, 50), world_size=st.integers(1, 9))
def test_an_evaluation_sees_every_image_once_over_the_processes(count, world_size):
    parts = [list(EvalSampler(count, rank, world_size)) for rank in range(world_size)]
    assert sorted(index for part in parts for index in part) == list(range(count))
    assert [len(EvalSampler(count, rank, world_size)) for rank in range(world_size)] == [
        len(part) for part in parts
    ]


@fuzzed
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    share=st.integers(1, 3),
    readers=st.integers(1, 4),
    shuffle_rows=st.integers(1, 40),
    epoch=st.integers(0, 5),
)
def test_the_readers_of_a_stream_share_its_rows_and_any_resume_is_the_tail(
    counts, share, readers, shuffle_rows, epoch
):
    assume(sum(counts) >= share * readers)
    order = StreamOrder(
        np.array(counts), share * readers, 7, shuffle_rows=shuffle_rows, readers=readers
    )

    def read(reader, block):
        spans = order.spans(epoch, reader, block)
        assert all(span.length > 0 for span in spans)
        return [(s.group, row) for s in spans for row in range(s.first, s.first + s.length)]

    streams = [read(reader, 0) for reader in range(readers)]
    seen = [row for stream in streams for row in stream]
    assert len(set(seen)) == len(seen) == order.iters_per_epoch * order.batch_size
    assert all(row < counts[group] for group, row in seen)
    blocks = -(-order.iters_per_epoch // order.block_iters)
    for reader, stream in enumerate(streams):
        tails = [read(reader, block) for block in range(blocks + 1)]
        assert all(stream[len(stream) - len(tail) :] == tail for tail in tails)
        for block, (tail, after) in enumerate(pairwise(tails)):
            places = order.places(epoch, reader, block)
            assert len(tail) - len(after) == places.numel()
            assert sorted(places.flatten().tolist()) == list(range(places.numel()))
