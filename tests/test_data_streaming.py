"""Streams: rows read in groups, their order, and batches that do not depend on who reads them."""

from itertools import chain, islice

import numpy as np
import pytest
import torch
from PIL import Image

from tract_transfer.data.classification import ClassificationDataset, load_huggingface
from tract_transfer.data.huggingface_streaming import stream_huggingface
from tract_transfer.data.loader import eval_loader, stream_loader
from tract_transfer.data.streaming_batches import StreamBatches, StreamEvalBatches
from tract_transfer.data.streaming_order import StreamOrder
from tract_transfer.data.transforms import classification_train

datasets = pytest.importorskip("datasets")
NAMES = ["cat", "dog", "eel"]
CROP = classification_train(8, "pad", 2, (0.08, 1.0), 0.5, "bilinear")


@pytest.fixture(autouse=True)
def offline_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def make_rows(count, names=NAMES, first=0):
    pixels = [np.full((8, 8, 3), value % 256, np.uint8) for value in range(first, first + count)]
    feature = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    columns = {
        "image": [Image.fromarray(each) for each in pixels],
        "label": [value % 3 for value in range(first, first + count)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def write_shards(folder, sizes=(23, 7, 40), rows_of_group=5, names=NAMES):
    """Parquet shards of row groups of five; return the folder."""
    first = 0
    for shard, size in enumerate(sizes):
        name = f"train-{shard:05d}-of-{len(sizes):05d}.parquet"
        make_rows(size, names, first).to_parquet(folder / name, batch_size=rows_of_group)
        first += size
    return str(folder)


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "shards").mkdir()
    return write_shards(tmp_path / "shards")


def indices_of(batches, count):
    return [[one.sample.index for one in batch] for batch in islice(batches, count)]


def joined(batches):
    return list(chain.from_iterable(batches))


def order_of(stream, batch_size=8, **options):
    options = {"shuffle_rows": 24, "readers": 4, **options}
    return StreamOrder(stream.groups.counts, batch_size, 3, **options)


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


def test_an_image_that_cannot_be_decoded_is_named_or_skipped(tmp_path):
    rows = make_rows(6).cast_column("image", datasets.Image(decode=False))
    broken = rows.map(lambda row: {"image": {"bytes": b"no image", "path": None}})
    broken = broken.cast_column("image", datasets.Image(decode=False))
    path = str(tmp_path / "train.parquet")
    datasets.concatenate_datasets([rows, broken]).cast_column("image", datasets.Image()).to_parquet(
        path
    )
    stream = stream_huggingface(path, "train")
    batches = StreamEvalBatches(stream, 12)
    with pytest.raises(ValueError, match=r"split train row 6 cannot be decoded"):
        list(stream_loader(stream.title, CROP, batches, seed=0, num_workers=0))
    skipping = stream_loader(stream.title, CROP, batches, seed=0, num_workers=0, undecodable="skip")
    (batch,) = skipping
    assert len(batch.images) == len(batch.skipped) == 6


def test_readers_and_batches_must_divide(shards):
    stream = stream_huggingface(shards, "train")
    with pytest.raises(ValueError, match=r"data.readers must divide .* 3 does not divide 8"):
        order_of(stream, readers=3)
    with pytest.raises(ValueError, match=r"data.batch_size must lie in 1..70"):
        order_of(stream, batch_size=72)
    with pytest.raises(ValueError, match=r"data.readers must be a multiple of .* 8, got 4"):
        StreamBatches(stream, order_of(stream), 0, 0, 8)
    with pytest.raises(ValueError, match=r"divisible by processes x engine.accumulate"):
        StreamBatches(stream, order_of(stream), 0, 0, 1, 3)
    assert StreamOrder(stream.groups.counts, 6, 0).readers == 2


def test_labels_are_checked_before_the_training(tmp_path):
    write_shards(tmp_path, names=None)
    path = str(tmp_path)
    columns = {"label_column": "label"}
    with pytest.raises(ValueError, match=r"data.train.num_classes: 'label' holds integers"):
        stream_huggingface(path, "train", **columns)
    with pytest.raises(ValueError, match=r"row 2: label 2 must be in 0..1"):
        stream_huggingface(path, "train", num_classes=2, **columns)
    assert stream_huggingface(path, "train", num_classes=3, **columns).class_names == [
        "0", "1", "2",
    ]  # fmt: skip


def test_what_does_not_stream_says_so(tmp_path, shards):
    with pytest.raises(ValueError, match=r"split: train\[:10%\] is a slice"):
        stream_huggingface(shards, "train[:10%]")
    with pytest.raises(ValueError, match=r"no split 'trein'\. Did you mean 'train'"):
        stream_huggingface(shards, "trein")
    with pytest.raises(ValueError, match=r"num_classes: 'label' has its own classes"):
        stream_huggingface(shards, "train", num_classes=3)
    with pytest.raises(ValueError, match=r"has one class, \['cat'\]"):
        write_shards(tmp_path, sizes=(1,), names=["cat"])
        stream_huggingface(str(tmp_path), "train")
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match="no whole parquet file"):
        stream_huggingface(str(tmp_path), "train")


def test_shards_of_other_classes_are_refused(tmp_path, refused):
    make_rows(3).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    make_rows(3, ["dog", "cat", "eel"]).to_parquet(tmp_path / "train-00001-of-00002.parquet")
    with refused(
        "streamed shards of other classes",
        ValueError,
        match=r"same columns and classes, and .*00001-of-00002",
    ):
        stream_huggingface(str(tmp_path), "train")


class Builder:
    """What `datasets` finds on the hub."""

    def __init__(self, files):
        self.config = type("Config", (), {"data_files": files})
        self.info = datasets.DatasetInfo(features=None)


def test_the_hub_is_read_by_url(shards, tmp_path, monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in sorted(tmp_path.glob("shards/*.parquet")):
        memory.pipe(f"/hub@5e1f/{file.name}", file.read_bytes())
    files = [f"memory://{name}" for name in sorted(memory.ls("/hub@5e1f", detail=False))]
    builder = Builder({datasets.Split.TRAIN: files})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    stream = stream_huggingface("owner/pets", "train")
    assert stream.origin.hub_id == "owner/pets"
    assert stream.class_counts is None
    whole = stream_huggingface(shards, "train")
    ours, theirs = (indices_of(StreamBatches(each, order_of(each)), 12) for each in (stream, whole))
    assert ours == theirs
    assert torch.equal(stream.image(33), whole.image(33))
    builder.config.data_files = {datasets.Split.TRAIN: ["hf://datasets/owner/pets@0/a.tar"]}
    with pytest.raises(ValueError, match=r"Streaming from the hub reads parquet.*\.tar"):
        stream_huggingface("owner/pets", "train")
    with pytest.raises(ValueError, match=r"no split 'test'"):
        stream_huggingface("owner/pets", "test")


def test_an_image_folder_is_listed_and_shuffled_whole(tmp_path):
    for index, row in enumerate(make_rows(9)):
        for split in ("train", "test"):
            place = tmp_path / split / NAMES[row["label"]]
            place.mkdir(parents=True, exist_ok=True)
            if split == "train" or row["label"] < 2:
                row["image"].save(place / f"{index}.png")
    (tmp_path / "train/.DS_Store").write_text("")
    for split in ("train", "test"):
        ours = stream_huggingface(str(tmp_path), split)
        theirs = load_huggingface(str(tmp_path), split)
        assert isinstance(ours, ClassificationDataset)
        assert ours.class_names == theirs.class_names == NAMES
        assert ours.fingerprint() == theirs.fingerprint()
    (tmp_path / "train/cat/deeper").mkdir()
    with pytest.raises(ValueError, match="a folder in the folder of a class"):
        stream_huggingface(str(tmp_path), "train")


def test_an_image_of_too_many_pixels_is_refused(shards):
    stream = stream_huggingface(shards, "train", max_pixels=4)
    batches = StreamEvalBatches(stream, 12)
    loader = stream_loader(
        stream.title, CROP, batches, seed=0, num_workers=0, max_pixels=stream.max_pixels
    )
    with pytest.raises(ValueError, match=r"data\.max_pixels 4"):
        list(loader)
    with pytest.raises(ValueError, match=r"data\.max_pixels 4"):
        stream.image(0)
