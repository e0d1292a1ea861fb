"""Streams: rows read in groups, their order, and batches that do not depend on who reads them."""

from itertools import chain, islice

import datasets
import numpy as np
import pytest
import torch
from stream_rows import CROP, NAMES, indices_of, make_rows, order_of

from tract_transfer.data.huggingface import load_huggingface
from tract_transfer.data.loader import eval_loader, stream_loader
from tract_transfer.data.streaming import (
    StreamBatches,
    StreamEvalBatches,
    StreamOrder,
    stream_huggingface,
)

pytestmark = pytest.mark.usefixtures("offline_cache")


def joined(batches):
    return list(chain.from_iterable(batches))


@pytest.mark.parametrize("kind", ["shards", "file", "saved", "dict"])
def test_a_stream_shows_what_the_loaded_rows_do(kind, tmp_path, shards):
    path = shards
    rows = load_huggingface(shards, "train")._source._rows
    if kind == "file":
        path = str(tmp_path / "some.parquet")
        make_rows(70).to_parquet(path, batch_size=5)
    elif kind != "shards":
        path = str(tmp_path / "saved")
        rows = datasets.concatenate_datasets([make_rows(70)])
        (rows if kind == "saved" else datasets.DatasetDict(train=rows)).save_to_disk(path)
    loaded, stream = load_huggingface(path, "train"), stream_huggingface(path, "train")
    assert len(stream) == len(loaded) == 70
    assert stream.class_names == NAMES
    assert stream.class_counts.tolist() == np.bincount(loaded.labels).tolist()
    assert stream.fingerprint() == loaded.fingerprint()
    for index in [0, 1, 2, 69, 23, 24, 22, 4]:
        assert torch.equal(stream.image(index), loaded.image(index))
        assert stream.target(index) == loaded.target(index)
        assert stream.item(index) == loaded.item(index)
    assert [index for index, _ in stream.read_from(21)] == list(range(21, 70))


def test_an_epoch_is_every_row_once_in_an_order_of_its_own(shards):
    stream = stream_huggingface(shards, "train")
    order = order_of(stream, batch_size=10, readers=2)
    assert order.iters_per_epoch == 7
    batches = indices_of(StreamBatches(stream, order), 14)
    first, second = joined(batches[:7]), joined(batches[7:])
    assert sorted(first) == sorted(second) == list(range(70))
    assert first != second != list(range(70))
    assert first != sorted(first)
    again = indices_of(StreamBatches(stream, order_of(stream, 10, readers=2)), 14)
    assert again == batches
    other = StreamOrder(stream.groups.counts, 10, 4, shuffle_rows=24, readers=2)
    assert indices_of(StreamBatches(stream, other), 14) != batches


@pytest.mark.parametrize("shuffle_rows", [8, 24, 1000])
def test_what_a_batch_drops_differs_from_epoch_to_epoch(shards, shuffle_rows):
    stream = stream_huggingface(shards, "train")
    order = order_of(stream, shuffle_rows=shuffle_rows)  # 8 batches of 8 of 70 rows
    shown = []
    for epoch in range(3):
        batches = StreamBatches(stream, order, epoch * order.iters_per_epoch)
        rows = joined(indices_of(batches, order.iters_per_epoch))
        assert len(set(rows)) == len(rows) == 64
        shown.append(set(rows))
    assert shown[0] != shown[1]


@pytest.mark.parametrize("start", [1, 3, 7, 8, 12])
def test_a_resumed_sequence_is_the_tail(shards, start):
    stream = stream_huggingface(shards, "train")
    order = order_of(stream)
    whole = indices_of(StreamBatches(stream, order), 20)
    assert indices_of(StreamBatches(stream, order, start), 20 - start) == whole[start:]


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_processes_and_micro_batches_share_the_same_batches(shards, world_size, accumulate):
    stream = stream_huggingface(shards, "train")
    order = order_of(stream)
    whole = indices_of(StreamBatches(stream, order), 10)
    shares = [
        indices_of(StreamBatches(stream, order, 0, rank, world_size, accumulate), 10 * accumulate)
        for rank in range(world_size)
    ]
    for iteration, batch in enumerate(whole):
        micro = range(iteration * accumulate, (iteration + 1) * accumulate)
        parts = [share[number] for share in shares for number in micro]
        assert {len(part) for part in parts} == {8 // world_size // accumulate}
        assert sorted(joined(parts)) == sorted(batch)


def test_a_reader_opens_its_own_rows_alone(shards, monkeypatch):
    stream = stream_huggingface(shards, "train")
    opened = []
    read = stream.groups.rows
    monkeypatch.setattr(
        stream.groups, "rows", lambda group, first: opened.append(group) or read(group, first)
    )
    order = order_of(stream)
    list(islice(StreamBatches(stream, order, 0, 0, 4), order.iters_per_epoch))
    own = {span.group for span in order.spans(0, 0, 0)} | {
        span.group
        for span in order.spans(1, 0, 0)  # the block ahead
    }
    assert set(opened) <= own
    assert len({span.group for span in order.spans(0, 0, 0)}) <= len(stream.groups.counts) // 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_no_bit(shards, num_workers):
    stream = stream_huggingface(shards, "train")
    loaded = load_huggingface(shards, "train")
    batches = StreamBatches(stream, order_of(stream), 1)
    loader = stream_loader(stream.title, CROP, batches, seed=3, num_workers=num_workers)
    plain = stream_loader(stream.title, CROP, batches, seed=3, num_workers=0)
    for ours, other in zip(islice(loader, 9), plain, strict=False):
        assert ours.images.shape == (8, 3, 8, 8)
        assert torch.equal(ours.images, other.images)
        assert ours.targets.tolist() == [loaded.target(index) for index in ours.indices]


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_evaluation_sees_each_image_once_in_order(shards, world_size):
    stream, loaded = stream_huggingface(shards, "train"), load_huggingface(shards, "train")
    images = []
    for rank in range(world_size):
        batches = StreamEvalBatches(stream, 9, rank, world_size)
        found = list(stream_loader(stream.title, CROP, batches, seed=0, num_workers=0))
        assert len(found) == len(batches)
        images += [image for batch in found for image in batch.images]
    whole = eval_loader(loaded, CROP, batch_size=70, num_workers=0)
    assert torch.equal(torch.stack(images), next(iter(whole)).images)
