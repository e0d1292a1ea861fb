"""Labels of every type: which classes they make, or why they make none."""

import datasets
import numpy as np
import pytest
from PIL import Image

from tract_transfer.build.data import build_data
from tract_transfer.data.huggingface import load_huggingface
from tract_transfer.run.check_data import check_data

pytestmark = pytest.mark.usefixtures("offline_cache")


def save(path, feature, labels, shade=0, **columns):
    """Write a parquet file of one image a label; `columns` name -> (feature, cells)."""
    cells = {
        "image": [Image.new("RGB", (8, 8), (shade + i, 0, 0)) for i in range(len(labels))],
        "label": labels,
    }
    features = {"image": datasets.Image(), "label": feature}
    for name, (kind, values) in columns.items():
        features[name], cells[name] = kind, values
    path.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(cells, features=datasets.Features(features)).to_parquet(path)
    return str(path)


def config_of(load_tiny, folder, *more):
    splits = [
        f"data.{split}={{source: huggingface, path: {folder / 'pets'}, split: {split}, "
        "label_column: label}"
        for split in ("train", "test")
    ]
    return load_tiny(folder, *splits, "data.batch_size=2", *more)


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "uint64"])
def test_integers_have_the_classes_of_all_splits_together(dtype, tmp_path, load_tiny, caplog):
    feature = datasets.Value(dtype)
    save(tmp_path / "pets/train.parquet", feature, [0, 1, 3, 1])
    save(tmp_path / "pets/test.parquet", feature, [0, 4, 4], shade=100)
    config = config_of(load_tiny, tmp_path)
    data = build_data(config)
    assert data.class_names == data.test.class_names == ["0", "1", "2", "3", "4"]
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1, 3, 1], [0, 4, 4])
    assert "train has no example of 2 of 5 classes: 2, 4" in caplog.text
    assert "test has examples of 1 classes that train never shows: 4" in caplog.text
    assert check_data(config).is_clean


def test_a_carved_split_shares_them(tmp_path, load_tiny):
    feature = datasets.Value("int32")
    save(tmp_path / "pets/train.parquet", feature, [0, 1, 1, 0])
    save(tmp_path / "pets/test.parquet", feature, [0, 2], shade=100)
    data = build_data(config_of(load_tiny, tmp_path, "data.val={source: train, fraction: 0.5}"))
    assert [d.class_names for d in data.splits.values()] == [["0", "1", "2"]] * 3


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([10, 20], [30, 10], r"label_column: .*show 3 classes between 10 and 30, so 28 of 31"),
        ([7, 7], [7], r"label_column: all splits together show one class, \[7\]"),
        ([0, 5_000_000_000], [1], r"train.label_column: its integers reach 5000000000"),
    ],
)
def test_integers_that_are_no_class_numbers_are_refused(train, test, message, tmp_path, load_tiny):
    feature = datasets.Value("int64")
    save(tmp_path / "pets/train.parquet", feature, train)
    save(tmp_path / "pets/test.parquet", feature, test, shade=100)
    config = config_of(load_tiny, tmp_path)
    with pytest.raises(ValueError, match=message):
        build_data(config)
    report = check_data(config)
    told = [*report.problems, *(p for split in report.splits.values() for p in split.problems)]
    assert any("label_column" in problem for problem in told)


def test_booleans_are_two_classes(tmp_path):
    path = save(tmp_path / "pets/train.parquet", datasets.Value("bool"), [True, True])
    dataset = load_huggingface(path, "train", label_column="label")
    assert (dataset.class_names, dataset.labels.tolist()) == (["False", "True"], [1, 1])
    assert dataset.origin.label_key is None


def test_an_integer_column_without_a_label_is_unlabelled(tmp_path, refused):
    path = save(tmp_path / "pets/train.parquet", datasets.Value("uint8"), [1, None, 0])
    with refused("a row without a label", ValueError, match=r"row 1: label -1 .*unlabelled"):
        load_huggingface(path, "train", label_column="label")


@pytest.mark.parametrize(
    ("feature", "labels", "dtype"),
    [
        (datasets.Value("string"), ["b", "a"], "string"),
        (datasets.Value("float32"), [0.0, 1.0], "float32"),
        (datasets.Sequence(datasets.Value("int64")), [[0, 1], [1]], "List"),
    ],
)
def test_other_types_are_refused_with_the_way_out(feature, labels, dtype, tmp_path, refused):
    path = save(tmp_path / "pets/train.parquet", feature, labels)
    with refused(
        f"labels of type {dtype}",
        ValueError,
        match=rf"k\.label_column.*not {dtype}.*class_encode_column",
    ):
        load_huggingface(path, "train", label_column="label", key="k")


def test_one_named_class_is_refused(tmp_path, refused):
    feature = datasets.ClassLabel(names=["cat"])
    path = save(tmp_path / "pets/train.parquet", feature, [0, 0])
    with refused(
        "a dataset of one class",
        ValueError,
        match=r"one class, \['cat'\].*Set data.train.label_column",
    ):
        load_huggingface(path, "train")


def test_two_label_columns_must_be_told_apart(tmp_path, refused):
    coarse = (datasets.ClassLabel(names=["a", "b"]), [0, 1])
    feature = datasets.ClassLabel(names=["x", "y"])
    path = save(tmp_path / "pets/train.parquet", feature, [1, 0], coarse=coarse)
    with refused(
        "two label columns",
        ValueError,
        match=r"2 have: set data.train.label_column.*coarse \(Class",
    ):
        load_huggingface(path, "train")
    assert load_huggingface(path, "train", label_column="coarse").class_names == ["a", "b"]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_an_empty_split_is_refused(kind, tmp_path, refused):
    feature = datasets.ClassLabel(names=["x", "y"])
    path = save(tmp_path / "pets/train.parquet", feature, [] if kind == "parquet" else [0])
    if kind == "saved":
        datasets.Dataset.from_parquet(path).select([]).save_to_disk(tmp_path / "saved")
        path = str(tmp_path / "saved")
    with refused(f"a split without rows ({kind})", ValueError, match=r"data\.val"):
        load_huggingface(path, "train", key="data.val")


def test_labels_stay_what_they_are(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 5, 40).tolist()
    path = save(tmp_path / "pets/train.parquet", datasets.Value("int16"), numbers)
    assert load_huggingface(path, "train", label_column="label").labels.tolist() == numbers
