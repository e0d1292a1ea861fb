"""Laws that hold for any input: merging of configs, boxes, evaluation, and the order of images."""

import copy
import string
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from fuzzing import fuzzed
from hypothesis import assume, given
from hypothesis import strategies as st

from tract_transfer.config.file import dump_yaml, merge, read_config_file
from tract_transfer.data.findings import Findings
from tract_transfer.data.sampling import EpochOrder, TrainBatchSampler
from tract_transfer.data.streaming import StreamOrder
from tract_transfer.engine.run_folder import flatten
from tract_transfer.evaluation.classification import label_ranks
from tract_transfer.evaluation.voc import average_precision, paired_iou
from tract_transfer.models.detection.two_stage import mirror

# Merging of configs.

plain = st.none() | st.booleans() | st.integers() | st.text(string.printable, max_size=6)
finite = st.floats(allow_nan=False, allow_infinity=False)  # the floats that a config may have
section = st.recursive(
    plain | finite | st.lists(plain, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3),
    max_leaves=6,
)
config = st.dictionaries(st.sampled_from("abcd"), section, max_size=4)


def nested(one, other):
    """Whether one of two keys is the other, or in its section."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


@fuzzed
@given(base=config, over=config)
def test_a_merged_key_is_from_over_if_it_has_one_and_else_from_base(base, over):
    before = copy.deepcopy((base, over))
    changed, unchanged = flatten(over), flatten(base)
    kept = {k: v for k, v in unchanged.items() if not any(nested(k, other) for other in changed)}
    assert flatten(merge(base, over)) == {**kept, **changed}
    assert (base, over) == before


@fuzzed
@given(base=config, one=config, two=config)
def test_merging_is_associative(base, one, two):
    """Unless a key is a section in one and a value in two, or the other way round."""
    assume(not any(a != b and nested(a, b) for a in flatten(one) for b in flatten(two)))
    assert merge(merge(base, one), two) == merge(base, merge(one, two))


@fuzzed
@given(base=config, over=config, tags=st.tuples(*[st.sampled_from(["x", "y"])] * 2))
def test_another_source_keeps_nothing_of_the_previous_one(base, over, tags):
    one, two = ({**part, "source": tag} for part, tag in zip((base, over), tags, strict=True))
    expected = two if tags[0] != tags[1] else {**merge(base, over), "source": tags[0]}
    assert merge({"data": one}, {"data": two}) == {"data": expected}


@fuzzed
@given(tree=config)
def test_a_written_config_reads_back_the_same(tmp_path_factory, tree):
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(dump_yaml(tree), encoding="utf-8")
    assert read_config_file(file)[0] == tree


# Boxes.

side = st.floats(-60, 160, width=32)
start, length = st.integers(0, 4), st.integers(1, 4)
pixels = st.tuples(start, start, length, length).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
)


@fuzzed
@given(
    box=st.tuples(side, side, side, side), size=st.tuples(st.integers(1, 99), st.integers(1, 99))
)
def test_a_clipped_box_is_the_part_in_the_image_and_stays_the_same(box, size):
    height, width = size
    clipped = Findings("clip").check_box(box, size, "x", "y")
    x1, x2 = max(box[0], 0), min(box[2], width)
    y1, y2 = max(box[1], 0), min(box[3], height)
    assert clipped == ((x1, y1, x2, y2) if min(x2 - x1, y2 - y1) >= 0.01 else None)
    if clipped is not None:
        assert Findings().check_box(clipped, size, "x", "y") == clipped


@fuzzed
@given(one=pixels, two=pixels)
def test_the_overlap_is_that_of_counted_pixels(one, two):
    grid = np.zeros((2, 8, 8), bool)
    for mask, (x1, y1, x2, y2) in zip(grid, (one, two), strict=True):
        mask[y1:y2, x1:x2] = True
    expected = (grid[0] & grid[1]).sum() / (grid[0] | grid[1]).sum()
    first, second = np.array([one], float), np.array([two], float)
    assert paired_iou(first, second, 0)[0] == pytest.approx(expected, abs=1e-12)
    assert paired_iou(second, first, 0)[0] == paired_iou(first, second, 0)[0]


@fuzzed
@given(box=pixels, width=st.integers(8, 99))
def test_mirroring_twice_is_the_identity(box, width):
    detections = {"boxes": torch.tensor([box]).float()}
    once = mirror(detections, width)
    (x1, _, x2, _) = once["boxes"][0].tolist()
    assert 0 <= x1 < x2 <= width
    assert torch.equal(mirror(once, width)["boxes"], detections["boxes"])


# Evaluation.


@fuzzed
@given(
    hits=st.lists(st.booleans(), max_size=12),
    more=st.integers(0, 5),
    method=st.sampled_from(["11point", "11point_float", "area"]),
)
def test_average_precision_is_a_fraction_that_no_false_detection_raises(hits, more, method):
    npos = sum(hits) + more
    assume(npos)

    def ap(flags):
        true = np.cumsum(np.array(flags, int))
        return average_precision(true / npos, true / np.arange(1, len(flags) + 1), method)

    assert 0 <= ap(hits) <= 1 + 1e-12
    for at in range(len(hits) + 1):
        assert ap([*hits[:at], False, *hits[at:]]) <= ap(hits) + 1e-12
    assert ap([*hits, False]) == pytest.approx(ap(hits))


@fuzzed
@given(data=st.data(), num_classes=st.integers(1, 6))
def test_the_rank_of_a_label_is_its_place_in_the_sorted_scores(data, num_classes):
    row = st.lists(st.integers(-3, 3).map(float), min_size=num_classes, max_size=num_classes)
    logits = np.array(data.draw(st.lists(row, min_size=5, max_size=5)))
    labels = np.array(data.draw(st.lists(st.integers(0, num_classes - 1), min_size=5, max_size=5)))
    order = [sorted(range(num_classes), key=lambda k: (-row[k], k)) for row in logits.tolist()]
    ranks = [row.index(label) for row, label in zip(order, labels.tolist(), strict=True)]
    assert label_ranks(logits, labels).tolist() == ranks


# The order of images.


@st.composite
def orders(draw):
    """An order of any kind, and the numbers of processes and micro-batches."""
    world_size, accumulate = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    batch_size = world_size * accumulate * draw(st.integers(1, 3))
    count = draw(st.integers(batch_size, 60))
    kind, options = draw(st.sampled_from(["plain", "grouped", "repeated", "both", "copied"])), {}
    if kind in ("grouped", "both"):
        tall = draw(st.integers(batch_size, max(batch_size, count // 2)))
        assume(count - tall >= batch_size)
        options["groups"] = (np.arange(count) < tall).astype(np.int64)
    if kind in ("repeated", "both"):
        options["factors"] = 1 + np.arange(count) % 4 / 2
    if kind == "copied" and batch_size >= 4:
        options["repeats"] = 2
    seed = draw(st.integers(0, 2**63))
    return EpochOrder(count, batch_size, seed, **options), kind, count, world_size, accumulate


@fuzzed
@given(made=orders(), start=st.integers(0, 40))
def test_processes_share_an_epoch_and_any_resume_is_the_tail(made, start):
    order, kind, count, world_size, accumulate = made
    total = start + 2 * order.iters_per_epoch
    batches = list(islice(TrainBatchSampler(order), total))
    ranks = [
        list(islice(TrainBatchSampler(order, start, *where), (total - start) * accumulate))
        for where in ((rank, world_size, accumulate) for rank in range(world_size))
    ]
    for number, batch in enumerate(batches[start:]):
        micro = range(number * accumulate, (number + 1) * accumulate)
        assert [sample for part in micro for rank in ranks for sample in rank[part]] == batch
    for epoch in range(total // order.iters_per_epoch):
        part = batches[epoch * order.iters_per_epoch : (epoch + 1) * order.iters_per_epoch]
        samples = [sample for batch in part for sample in batch]
        assert len(set(samples)) == len(samples) == order.iters_per_epoch * order.batch_size
        assert {sample.epoch for sample in samples} == {epoch}
        assert all(0 <= sample.index < count for sample in samples)
        if kind in ("plain", "grouped"):
            assert len({sample.index for sample in samples}) == len(samples)


@fuzzed
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    share=st.integers(1, 3),
    readers=st.integers(1, 4),
    shuffle_rows=st.integers(1, 40),
    epoch=st.integers(0, 5),
)
def test_readers_share_the_rows_of_a_stream_and_any_resume_is_the_tail(
    counts, share, readers, shuffle_rows, epoch
):
    assume(sum(counts) >= share * readers)
    options = {"shuffle_rows": shuffle_rows, "readers": readers}
    order = StreamOrder(np.array(counts), share * readers, 7, **options)

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
