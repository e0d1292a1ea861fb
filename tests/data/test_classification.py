import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tract_transfer.data.classification import (
    ClassificationDataset,
    check_same_classes,
    hold_out,
)
from tract_transfer.data.huggingface import load_huggingface
from tract_transfer.data.images import UndecodableImage

datasets = pytest.importorskip("datasets")
SHARED = Path(__file__).parents[2] / "../shared/data"
NAMES = ["cat", "dog", "eel"]


pytestmark = pytest.mark.usefixtures("offline_cache")


def picture(value):
    return Image.fromarray(np.full((4, 5, 3), value, dtype=np.uint8))


def make_rows(labels, feature=None, **columns):
    features = {"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=NAMES)}
    for name in columns:
        features[name] = datasets.Value("string")
    content = {"image": [picture(10 * i) for i in range(len(labels))], "label": labels, **columns}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def save(rows, kind, folder):
    """Write rows as split train of the given kind; return the path to load."""
    if kind == "dict":
        datasets.DatasetDict({"train": rows}).save_to_disk(folder)
    elif kind == "dataset":
        rows.save_to_disk(folder)
    elif kind == "parquet":
        rows.to_parquet(folder / "train.parquet")
    elif kind == "shards":
        for shard in range(2):
            rows.shard(2, shard, contiguous=True).to_parquet(
                folder / f"data/train-{shard:05d}-of-00002.parquet"
            )
    elif kind == "file":
        rows.to_parquet(folder / "some.parquet")
        return str(folder / "some.parquet")
    else:
        base = folder / "train" if kind == "split folders" else folder
        for index, row in enumerate(rows):
            place = base / NAMES[row["label"]]
            place.mkdir(parents=True, exist_ok=True)
            row["image"].save(place / f"{index}.png")
    return str(folder)


KINDS = ["dict", "dataset", "parquet", "shards", "file", "images", "split folders"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same(kind, tmp_path):
    folder = tmp_path / "pets"
    folder.mkdir()
    (folder / "data").mkdir() if kind == "shards" else None
    dataset = load_huggingface(save(make_rows([0, 0, 1, 2]), kind, folder), "train")
    assert dataset.class_names == NAMES
    assert dataset.labels.tolist() == [0, 0, 1, 2]
    assert dataset.labels.dtype == np.int64
    assert [dataset.image(i)[0, 0, 0].item() for i in range(4)] == [0, 10, 20, 30]
    assert dataset.target(3) == 2
    assert "split train row 3" in dataset.item(3)
    assert load_huggingface(dataset.name, "train[:50%]").labels.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"no split 'trein'. Did you mean 'train'"):
        load_huggingface(dataset.name, "trein")


def test_memory_stays_mapped_and_encoded(tmp_path):
    make_rows([0, 1]).save_to_disk(tmp_path / "d")
    dataset = load_huggingface(str(tmp_path / "d"), "train")
    assert dataset._source._rows.cache_files
    assert isinstance(dataset._source.encoded(0), bytes)
    sent = pickle.loads(pickle.dumps(dataset))  # as to a spawned worker
    assert torch.equal(sent.image(1), dataset.image(1))


def test_a_named_file_is_its_own_split(tmp_path):
    make_rows([0]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"no split 'train'.*\['test'\]"):
        load_huggingface(str(tmp_path / "test.parquet"), "train")


def test_a_missing_shard_is_an_error(tmp_path, refused):
    make_rows([0]).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    with refused(
        "parquet shards of which one is missing",
        ValueError,
        match="all 2 files of split 'train', but has 1",
    ):
        load_huggingface(str(tmp_path), "train")


@pytest.mark.parametrize("path", ["./absent", "~/absent-folder", "/absent/folder"])
def test_what_looks_local_never_goes_to_the_hub(path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(FileNotFoundError, match=r"does not exist. Set data.val.path"):
        load_huggingface(path, "train", key="data.val")


def test_an_unreachable_hub_says_how_to_use_a_copy():
    with pytest.raises(ConnectionError, match=r"save_to_disk.*data.train.path"):
        load_huggingface("owner/absent", "train")


INTEGERS = datasets.Value("int64")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({"labels": [0, -1]}, {}, r"row 1: label -1 .* 0\.\.2 .*unlabelled.*k\.split"),
        ({"labels": [0, None]}, {}, r"row 1: label -1"),
        ({"labels": [0, 7], "feature": INTEGERS}, {}, r"k\.label_column. .*label \(int64\)"),
        ({"labels": [0], "more": ["a"]}, {"label_column": "more"}, "class_encode_column"),
        ({"labels": [0]}, {"label_column": "lable"}, r"Did you mean 'label'.*image \(Image\)"),
        ({"labels": [0]}, {"image_column": "label"}, r"k\.image_column.*feature Image"),
        (
            {"labels": [-3], "feature": INTEGERS},
            {"label_column": "label"},
            "row 0: label -3",
        ),
    ],
)
def test_wrong_columns_and_labels_name_the_fix(rows, options, message, tmp_path):
    make_rows(**rows).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        load_huggingface(str(tmp_path / "d"), "train", key="k", **options)


def test_a_slice_without_rows_is_refused(tmp_path, refused):
    make_rows([0, 1]).save_to_disk(tmp_path / "d")
    with refused(
        "a slice of a split without rows", ValueError, match=r"has no rows. Set data.train.split"
    ):
        load_huggingface(str(tmp_path / "d"), "train[:0]")


def test_split_folders_share_their_classes(tmp_path):
    for name in ("train/cat", "train/dog", "train/eel", "test/cat", "test/eel"):
        (tmp_path / name).mkdir(parents=True)
        picture(1).save(tmp_path / name / "0.png")
    test = load_huggingface(str(tmp_path), "test")
    assert test.class_names == NAMES
    assert test.labels.tolist() == [0, 2]
    alone = load_huggingface(str(tmp_path / "test"), "test")
    with pytest.raises(ValueError, match=r"test lacks 1 that train has \(dog\)"):
        check_same_classes({"train": load_huggingface(str(tmp_path), "train"), "test": alone})


def test_two_image_columns_must_be_told_apart(tmp_path, refused):
    rows = make_rows([0])
    rows = datasets.concatenate_datasets(
        [rows, rows.select_columns("image").rename_column("image", "other")], axis=1
    )
    rows.save_to_disk(tmp_path / "d")
    with refused(
        "two image columns",
        ValueError,
        match=r"2 have: set data.train.image_column.*other \(Image\)",
    ):
        load_huggingface(str(tmp_path / "d"), "train")
    assert len(load_huggingface(str(tmp_path / "d"), "train", image_column="image")) == 1


def test_named_integers_are_classes(tmp_path):
    make_rows([2, 0], feature=INTEGERS).save_to_disk(tmp_path / "d")
    dataset = load_huggingface(str(tmp_path / "d"), "train", label_column="label")
    assert dataset.class_names == ["0", "1", "2"]


def test_a_broken_row_is_named_and_caching_defers_it(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(9).save(tmp_path / "d" / name)
    (tmp_path / "d/a/1.png").write_bytes(b"broken")
    dataset = load_huggingface(str(tmp_path / "d"), "train")
    dataset.cache_images()
    assert torch.equal(dataset.image(2), torch.full((3, 4, 5), 9, dtype=torch.uint8))
    with pytest.raises(UndecodableImage, match=r"split train row 1 .*a/1\.png"):
        dataset.image(1)
    with pytest.raises(UndecodableImage):
        dataset.select([2, 1], "part").image(1)


class Numbers:
    """Images that say their row."""

    def encoded(self, row):
        return bytes([row])

    def image(self, row):
        return torch.full((3, 2, 2), row, dtype=torch.uint8)

    def item(self, row):
        return f"row {row}"


def numbers(labels, names=NAMES):
    return ClassificationDataset("numbers", names, np.array(labels), Numbers())


def test_select_composes():
    once = numbers([0, 1, 2, 0, 1]).select([4, 2, 0], "x").select([2, 0], "y")
    assert once.labels.tolist() == [0, 1]
    assert [once.image(i)[0, 0, 0].item() for i in range(2)] == [0, 4]
    assert once.item(1) == "row 4"
    assert once.fingerprint() != numbers([0, 1]).fingerprint()


@pytest.mark.parametrize("fraction", [0.1, 0.34, 0.9])
def test_carve_is_stratified_disjoint_complete_and_deterministic(fraction):
    dataset = numbers([0] * 20 + [1] * 2 + [2])
    parts = hold_out(dataset, fraction, seed=3)
    rest, carved = ({part.item(i) for i in range(len(part))} for part in parts)
    assert not rest & carved
    assert len(rest | carved) == len(dataset)
    counts = np.bincount(parts[1].labels, minlength=3)
    assert counts.tolist() == [round(20 * fraction), 1, 0]
    again = hold_out(dataset, fraction, seed=3)[1]
    assert again.fingerprint() == parts[1].fingerprint()
    assert (
        hold_out(dataset, 0.34, 4)[1].fingerprint() != hold_out(dataset, 0.34, 3)[1].fingerprint()
    )


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_carve_wants_a_proper_fraction(fraction):
    with pytest.raises(ValueError, match="fraction"):
        hold_out(numbers([0, 0]), fraction, 0)


def test_same_classes():
    full = numbers([0, 1, 2])
    assert check_same_classes({"train": full, "test": full}) == []
    warnings = check_same_classes({"train": numbers([0, 1]), "test": numbers([0, 2])})
    assert warnings == [
        "train has no example of 1 of 3 classes: eel",
        "test has no example of 1 of 3 classes: dog",
        "test has examples of 1 classes that train never shows: eel",
    ]
    with pytest.raises(ValueError, match=r"test lacks 1 that train has \(dog\)"):
        check_same_classes({"train": full, "test": numbers([0], ["cat", "eel"])})
    with pytest.raises(ValueError, match=r"train lacks 1 that test has \(dog\)"):
        check_same_classes({"train": numbers([0], ["cat", "eel"]), "test": full})
    with pytest.raises(ValueError, match="class 0 is 'cat' in train and 'dog' in test"):
        check_same_classes({"train": full, "test": numbers([0], ["dog", "cat", "eel"])})


@pytest.mark.skipif(not SHARED.exists(), reason="no sample data")
@pytest.mark.parametrize(
    ("name", "split", "count", "classes"),
    [
        ("cifar10", "train", 10000, 10),
        ("cifar100", "test", 2000, 100),
        ("flowers102", "train", 728, 102),
        ("flowers102", "validation", 706, 102),
        ("stanford_cars", "train", 1568, 196),
    ],
)
def test_real_samples(name, split, count, classes):
    dataset = load_huggingface(str(SHARED / name), split)
    assert len(dataset) == count
    assert len(dataset.class_names) == classes
    per_class = np.bincount(dataset.labels, minlength=classes)
    assert (per_class > 0).sum() == (89 if name == "flowers102" else classes)
    if name != "flowers102":
        assert (per_class == count // classes).all()
    assert dataset.image(count - 1).shape[0] == 3
