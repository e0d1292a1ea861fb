"""Classification data: every format gives the same rows, and all splits share their classes."""

import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from stream_rows import NAMES, huggingface, make_rows, picture, write_folders, write_splits

from tract_transfer.build.data import build_data
from tract_transfer.data.classification import (
    ClassificationDataset,
    check_same_classes,
    hold_out,
)
from tract_transfer.data.huggingface import load_huggingface
from tract_transfer.data.images import UndecodableImage
from tract_transfer.run.check_data import check_data

SHARED = Path(__file__).parents[3] / "shared/data"
pytestmark = pytest.mark.usefixtures("offline_cache")


def save(kind, folder):
    """Write four rows as split train of a format; return the path to load."""
    labels, rows = [0, 0, 1, 2], make_rows([0, 0, 1, 2])
    if kind in ("dict", "dataset"):
        (datasets.DatasetDict(train=rows) if kind == "dict" else rows).save_to_disk(folder)
    elif kind == "parquet":
        rows.to_parquet(folder / "train.parquet")
    elif kind == "shards":
        (folder / "data").mkdir()
        for shard in range(2):
            file = folder / f"data/train-{shard:05d}-of-00002.parquet"
            rows.shard(2, shard, contiguous=True).to_parquet(file)
    elif kind == "file":
        rows.to_parquet(folder / "some.parquet")
        return str(folder / "some.parquet")
    else:
        write_folders(folder / "train" if kind == "split folders" else folder, labels)
    return str(folder)


@pytest.mark.parametrize(
    "kind", ["dict", "dataset", "parquet", "shards", "file", "images", "split folders"]
)
def test_every_format_gives_the_same_rows(kind, tmp_path):
    (tmp_path / "pets").mkdir()
    path = save(kind, tmp_path / "pets")
    dataset = load_huggingface(path, "train")
    assert dataset.class_names == NAMES
    assert dataset.labels.tolist() == [0, 0, 1, 2]
    assert dataset.labels.dtype == np.int64
    assert dataset.class_counts.tolist() == [2, 1, 1]
    assert [dataset.image(i)[0, 0, 0].item() for i in range(4)] == [0, 1, 2, 3]
    assert dataset.target(3) == 2
    assert dataset.item(3) == f"{path} split train row 3"
    assert load_huggingface(path, "train[:50%]").labels.tolist() == [0, 0]


def test_rows_stay_encoded_and_memory_mapped_and_can_be_pickled(tmp_path):
    make_rows(2).save_to_disk(tmp_path / "d")
    dataset = load_huggingface(str(tmp_path / "d"), "train")
    assert dataset._source._rows.cache_files
    assert isinstance(dataset.encoded(0), bytes)
    sent = pickle.loads(pickle.dumps(dataset))  # as to a spawned worker
    assert torch.equal(sent.image(1), dataset.image(1))


def test_a_named_column_is_used(tmp_path):
    other = (datasets.Image(), [picture(9)] * 2)
    coarse = (datasets.ClassLabel(names=["a", "b"]), [1, 0])
    make_rows(2, other=other, coarse=coarse).save_to_disk(tmp_path / "d")
    load = {"image_column": "other", "label_column": "coarse"}
    dataset = load_huggingface(str(tmp_path / "d"), "train", **load)
    assert dataset.class_names == ["a", "b"]
    assert dataset.labels.tolist() == [1, 0]
    assert dataset.image(0)[0, 0, 0] == 9


def test_a_broken_row_names_its_file(tmp_path):
    path = write_folders(tmp_path / "d")
    (tmp_path / "d/cat/1.png").write_bytes(b"broken")
    with pytest.raises(UndecodableImage, match=r"split train row 1 .*cat/1\.png"):
        load_huggingface(path, "train").image(1)


@pytest.mark.skipif(not SHARED.exists(), reason="no sample data")
@pytest.mark.parametrize(
    ("name", "split", "count", "classes"),
    [
        ("cifar10", "train", 10000, 10),
        ("cifar100", "test", 2000, 100),
        ("flowers102", "train", 728, 102),
        ("stanford_cars", "train", 1568, 196),
    ],
)
def test_real_samples(name, split, count, classes):
    dataset = load_huggingface(str(SHARED / name), split)
    assert (len(dataset), len(dataset.class_names)) == (count, classes)
    if name == "flowers102":
        assert (dataset.class_counts > 0).sum() == 89
    else:
        assert (dataset.class_counts == count // classes).all()
    assert dataset.image(count - 1).shape[0] == 3


# Classes of several splits.


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "uint64"])
def test_integers_have_the_classes_of_all_splits(dtype, tmp_path, load_tiny, caplog):
    (tmp_path / "pets").mkdir()
    feature, train = datasets.Value(dtype), [0, 1, 3, 1, 0, 1]
    write_splits(tmp_path / "pets", train, [0, 4, 4], feature=feature)
    words = huggingface(tmp_path / "pets", "data.batch_size=2", label_column="label")
    config = load_tiny(tmp_path, *words, "data.val={source: train, fraction: 0.5}")
    data = build_data(config)
    assert [d.class_names for d in data.splits.values()] == [["0", "1", "2", "3", "4"]] * 3
    assert sorted([*data.train.labels, *data.val.labels]) == sorted(train)
    assert data.test.labels.tolist() == [0, 4, 4]
    assert "test has examples of 1 classes that train never shows: 4" in caplog.text
    assert check_data(config).is_clean


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([10, 20], [30, 10], r"label_column: .*show 3 classes between 10 and 30, so 28 of 31"),
        ([7, 7], [7], r"label_column: .*show 1 classes between 7 and 7, so 7 of 8"),
    ],
)
def test_integers_that_are_no_class_numbers_are_refused(train, test, message, tmp_path, load_tiny):
    (tmp_path / "pets").mkdir()
    write_splits(tmp_path / "pets", train, test, names=None)
    words = huggingface(tmp_path / "pets", "data.batch_size=2", label_column="label")
    config = load_tiny(tmp_path, *words)
    with pytest.raises(ValueError, match=message):
        build_data(config)
    assert any("label_column" in problem for problem in check_data(config).problems)


def test_booleans_are_two_classes_and_integers_keep_their_values(tmp_path):
    feature, numbers = datasets.Value("bool"), np.random.default_rng(0).integers(0, 5, 40).tolist()
    write_splits(tmp_path, [True, True], [False], feature=feature)
    dataset = load_huggingface(str(tmp_path), "train", label_column="label")
    assert (dataset.class_names, dataset.labels.tolist()) == (["False", "True"], [1, 1])
    assert dataset.origin.label_key is None
    make_rows(numbers, feature=datasets.Value("int16")).save_to_disk(tmp_path / "d")
    dataset = load_huggingface(str(tmp_path / "d"), "train", label_column="label")
    assert dataset.labels.tolist() == numbers
    assert dataset.origin.label_key == "data.train.label_column"


class Numbers:
    """Images that show their row."""

    def encoded(self, row):
        return bytes([row])

    def image(self, row):
        return torch.full((3, 2, 2), row, dtype=torch.uint8)

    def item(self, row):
        return f"row {row}"


def numbers(labels, names=NAMES):
    return ClassificationDataset("numbers", names, np.array(labels), Numbers())


def test_splits_must_have_the_same_classes():
    full = numbers([0, 1, 2])
    assert check_same_classes({"train": full, "test": full}) == []
    assert check_same_classes({"train": numbers([0, 1]), "test": numbers([0, 2])}) == [
        "train has no example of 1 of 3 classes: eel",
        "test has no example of 1 of 3 classes: dog",
        "test has examples of 1 classes that train never shows: eel",
    ]
    lacking, other = numbers([0], ["cat", "eel"]), numbers([0], ["dog", "cat", "eel"])
    for train, test, message in (
        (full, lacking, r"test lacks 1 that train has \(dog\)"),
        (lacking, full, r"train lacks 1 that test has \(dog\)"),
        (full, other, "class 0 is 'cat' in train and 'dog' in test"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_classes({"train": train, "test": test})


# Parts.


def test_selections_compose():
    once = numbers([0, 1, 2, 0, 1]).select([4, 2, 0], "x").select([2, 0], "y")
    assert once.labels.tolist() == [0, 1]
    assert [once.image(i)[0, 0, 0].item() for i in range(2)] == [0, 4]
    assert once.item(1) == "row 4"
    assert once.fingerprint() != numbers([0, 1]).fingerprint()


@pytest.mark.parametrize("fraction", [0.1, 0.34, 0.9])
def test_a_held_out_part_is_stratified_disjoint_complete_and_deterministic(fraction):
    dataset = numbers([0] * 20 + [1] * 2 + [2])
    parts = hold_out(dataset, fraction, seed=3)
    rest, held_out = ({part.item(i) for i in range(len(part))} for part in parts)
    assert not rest & held_out
    assert len(rest | held_out) == len(dataset)
    assert parts[1].class_counts.tolist() == [round(20 * fraction), 1, 0]
    assert hold_out(dataset, fraction, seed=3)[1].fingerprint() == parts[1].fingerprint()
    other = hold_out(dataset, 0.34, 4)[1].fingerprint()
    assert other != hold_out(dataset, 0.34, 3)[1].fingerprint()
