"""Streams of the hub and of image folders, and what streams refuse."""

import datasets
import pytest
import torch
from stream_rows import CROP, NAMES, indices_of, make_rows, order_of, write_shards

from tract_transfer.data.classification import ClassificationDataset
from tract_transfer.data.huggingface import load_huggingface
from tract_transfer.data.streaming import stream_huggingface
from tract_transfer.data.loader import stream_loader
from tract_transfer.data.streaming import StreamBatches, StreamEvalBatches, StreamOrder

pytestmark = pytest.mark.usefixtures("offline_cache")


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


def test_readers_and_batches_must_divide(shards, refused):
    stream = stream_huggingface(shards, "train")
    with refused(
        "data.readers that do not divide the batch",
        ValueError,
        match=r"data.readers must divide .* 3 does not divide 8",
    ):
        order_of(stream, readers=3)
    with refused(
        "a streamed batch larger than the data",
        ValueError,
        match=r"data.batch_size must lie in 1..70",
    ):
        order_of(stream, batch_size=72)
    with refused(
        "fewer readers than processes",
        ValueError,
        match=r"data.readers must be a multiple of .* 8, got 4",
    ):
        StreamBatches(stream, order_of(stream), 0, 0, 8)
    with refused(
        "a streamed batch that does not divide",
        ValueError,
        match=r"divisible by processes x engine.accumulate",
    ):
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


def test_what_does_not_stream_says_so(tmp_path, shards, refused):
    with refused("a slice of a stream", ValueError, match=r"split: train\[:10%\] is a slice"):
        stream_huggingface(shards, "train[:10%]")
    with refused(
        "a split that a stream has not",
        ValueError,
        match=r"no split 'trein'\. Did you mean 'train'",
    ):
        stream_huggingface(shards, "trein")
    with refused(
        "num_classes beside named classes",
        ValueError,
        match=r"num_classes: 'label' has its own classes",
    ):
        stream_huggingface(shards, "train", num_classes=3)
    with refused("a stream of one class", ValueError, match=r"has one class, \['cat'\]"):
        write_shards(tmp_path, sizes=(1,), names=["cat"])
        stream_huggingface(str(tmp_path), "train")
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 cut")
    with refused("a parquet file cut short", ValueError, match="no whole parquet file"):
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
