"""Streams: rows read in groups, and batches that depend neither on workers nor on processes."""

from itertools import chain, islice
from types import SimpleNamespace

import datasets
import pytest
import torch
from stream_rows import CROP, NAMES, indices_of, make_rows, order_of, picture, write_folders

from tract_transfer.data.classification import ClassificationDataset
from tract_transfer.data.huggingface import load_huggingface
from tract_transfer.data.loader import load_batches
from tract_transfer.data.streaming import (
    StreamBatches,
    StreamEvalBatches,
    StreamOrder,
    stream_huggingface,
)

COLUMNS = ("image", "label")
pytestmark = pytest.mark.usefixtures("offline_cache")


@pytest.fixture
def stream(shards):
    return stream_huggingface(shards, "train")


def joined(batches):
    return list(chain.from_iterable(batches))


@pytest.mark.parametrize("kind", ["shards", "file", "saved", "dict"])
def test_a_stream_shows_the_same_rows_as_loading_them(kind, tmp_path, shards):
    path = shards
    if kind == "file":
        path = str(tmp_path / "some.parquet")
        make_rows(70).to_parquet(path, batch_size=5)
    elif kind != "shards":
        path, rows = str(tmp_path / "saved"), make_rows(70)
        (rows if kind == "saved" else datasets.DatasetDict(train=rows)).save_to_disk(path)
    loaded, stream = load_huggingface(path, "train"), stream_huggingface(path, "train")
    assert len(stream) == 70
    assert stream.class_counts.tolist() == loaded.class_counts.tolist()
    assert stream.fingerprint() == loaded.fingerprint()  # of the length, classes and labels too
    for index in [0, 1, 2, 69, 23, 24, 22, 4]:
        assert torch.equal(stream.image(index), loaded.image(index))
        assert stream.target(index) == loaded.target(index)
        assert stream.item(index) == loaded.item(index)
    assert [index for index, _ in stream.read_from(21)] == list(range(21, 70))


def test_an_epoch_shows_every_row_once_in_its_own_order(stream):
    order = order_of(stream, batch_size=10, readers=2)
    assert order.iters_per_epoch == 7
    batches = indices_of(StreamBatches(stream, order), 14)
    first, second = joined(batches[:7]), joined(batches[7:])
    assert sorted(first) == sorted(second) == list(range(70))
    assert first != second != list(range(70)) != first
    assert indices_of(StreamBatches(stream, order_of(stream, 10, readers=2)), 14) == batches
    other = StreamOrder(stream.groups.counts, 10, 4, shuffle_rows=24, readers=2)
    assert indices_of(StreamBatches(stream, other), 14) != batches
    assert StreamOrder(stream.groups.counts, 6, 0).readers == 2


@pytest.mark.parametrize("shuffle_rows", [8, 24, 1000])
def test_each_epoch_drops_other_rows(stream, shuffle_rows):
    order = order_of(stream, shuffle_rows=shuffle_rows)  # 8 batches of 8 of 70 rows
    shown = []
    for epoch in range(3):
        batches = StreamBatches(stream, order, epoch * order.iters_per_epoch)
        rows = joined(indices_of(batches, order.iters_per_epoch))
        assert len(set(rows)) == len(rows) == 64
        shown.append(set(rows))
    assert shown[0] != shown[1]


@pytest.mark.parametrize("start", [1, 3, 7, 8, 12])
def test_a_resumed_sequence_is_the_tail(stream, start):
    order = order_of(stream)
    whole = indices_of(StreamBatches(stream, order), 20)
    assert indices_of(StreamBatches(stream, order, start), 20 - start) == whole[start:]


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_processes_and_micro_batches_share_the_same_batches(stream, world_size, accumulate):
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


def test_a_process_only_reads_the_groups_of_its_readers(stream, monkeypatch):
    opened, read = [], stream.groups.rows
    monkeypatch.setattr(
        stream.groups,
        "rows",
        lambda _, group, first: opened.append(group) or read(COLUMNS, group, first),
    )
    order = order_of(stream)
    list(islice(StreamBatches(stream, order, 0, 0, 4), order.iters_per_epoch))
    # The second epoch is read one block ahead.
    groups = [{span.group for span in order.spans(epoch, 0, 0)} for epoch in (0, 1)]
    assert set(opened) <= groups[0] | groups[1]
    assert len(groups[0]) <= len(stream.groups.counts) // 2


def test_workers_change_no_bit(shards, stream):
    loaded = load_huggingface(shards, "train")
    batches = StreamBatches(stream, order_of(stream), 1)
    loader = load_batches(stream, CROP, batches, seed=3, num_workers=2)
    plain = load_batches(stream, CROP, batches, seed=3, num_workers=0)
    for ours, other in zip(islice(loader, 9), plain, strict=False):
        assert ours.images.shape == (8, 3, 8, 8)
        assert torch.equal(ours.images, other.images)
        assert ours.targets.tolist() == [loaded.target(index) for index in ours.indices]


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_evaluation_sees_each_image_once_in_order(shards, stream, world_size):
    images = []
    for rank in range(world_size):
        batches = StreamEvalBatches(stream, 9, rank, world_size)
        part = list(load_batches(stream, CROP, batches, seed=0, num_workers=0))
        assert len(part) == len(batches)
        images += [image for batch in part for image in batch.images]
    loaded = load_huggingface(shards, "train")
    whole = load_batches(loaded, CROP, [list(range(70))], seed=0, num_workers=0)
    assert torch.equal(torch.stack(images), next(iter(whole)).images)


def test_an_undecodable_image_is_an_error_or_skipped(tmp_path):
    """Such as one of more than max_pixels. Integers are classes up to num_classes."""
    pictures = (datasets.Image(), [picture(0), picture(1, side=9), picture(2)])
    make_rows(3, None, image=pictures).to_parquet(tmp_path / "some.parquet")
    options = {"label_column": "label", "num_classes": 5, "max_pixels": 64}
    stream = stream_huggingface(str(tmp_path / "some.parquet"), "train", **options)
    assert stream.class_names == ["0", "1", "2", "3", "4"]

    def load(undecodable):
        options = {"seed": 0, "num_workers": 0, "undecodable": undecodable}
        return next(iter(load_batches(stream, CROP, StreamEvalBatches(stream, 12), **options)))

    for read in (lambda: load("error"), lambda: stream.image(1)):
        with pytest.raises(ValueError, match=r"split train row 1 .*data\.max_pixels 64"):
            read()
    batch = load("skip")
    assert (batch.indices, len(batch.skipped)) == ([0, 2], 1)


def test_the_hub_is_read_by_url(stream, tmp_path, monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in sorted(tmp_path.glob("shards/*.parquet")):
        memory.pipe(f"/hub@5e1f/{file.name}", file.read_bytes())
    files = [f"memory://{name}" for name in sorted(memory.ls("/hub@5e1f", detail=False))]
    config = SimpleNamespace(data_files={datasets.Split.TRAIN: files})
    builder = SimpleNamespace(config=config, info=datasets.DatasetInfo(features=None))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    remote = stream_huggingface("owner/pets", "train")
    assert remote.origin.hub_id == "owner/pets"
    assert remote.class_counts is None
    assert len(remote.fingerprint()) == 64
    ours, local = (indices_of(StreamBatches(s, order_of(s)), 12) for s in (remote, stream))
    assert ours == local
    assert torch.equal(remote.image(33), stream.image(33))
    remote.class_names = NAMES[:2]
    with pytest.raises(ValueError, match=r"row 2: label 2 in column 'label' must be in 0\.\.1"):
        remote.image(2)
    config.data_files = {datasets.Split.TRAIN: ["hf://datasets/owner/pets@0/a.tar"]}
    with pytest.raises(ValueError, match=r"Streaming from the hub reads parquet.*\.tar"):
        stream_huggingface("owner/pets", "train")
    with pytest.raises(ValueError, match=r"no split 'test'"):
        stream_huggingface("owner/pets", "test")


def test_a_streamed_image_folder_is_loaded_as_usual(tmp_path):
    for split, labels in (("train", [0, 1, 2, 0]), ("test", [0, 1])):
        write_folders(tmp_path / split, labels)
    (tmp_path / "train/.DS_Store").write_text("")
    for split in ("train", "test"):
        ours = stream_huggingface(str(tmp_path), split)
        assert isinstance(ours, ClassificationDataset)
        assert ours.class_names == NAMES
        assert ours.fingerprint() == load_huggingface(str(tmp_path), split).fingerprint()
