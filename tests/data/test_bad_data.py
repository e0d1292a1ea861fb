"""Classification data that cannot be used: the error names file or row, and the fix, in time."""

import json

import datasets
import pytest
from bad_data import (
    class_missing_in_test,
    empty_folder,
    from_files,
    no_image_column,
    no_label_column,
    no_path,
    no_split,
    string_labels,
    unlabelled,
    write_parquet,
    wrong_label_column,
)

from tract_transfer.data.images import UndecodableImage
from tract_transfer.run.run import run

pytestmark = pytest.mark.usefixtures("offline_cache")


TABLE = {
    "no path": (no_path, FileNotFoundError, ["nowhere does not exist. Set data.train.path"]),
    "no image column": (no_image_column, ValueError,
        ["feature Image, but 0 have: set data.train.image_column", "text (string)"]),
    "no label column": (no_label_column, ValueError,
        ["feature ClassLabel, but 0 have: set data.train.label_column", "image (Image)"]),
    "wrong label column": (wrong_label_column, ValueError,
        ["data.train.label_column: no column 'labell'. Did you mean 'label'?"]),
    "label column of strings": (string_labels, ValueError,
        ["data.train.label_column: 'label' must hold integers, booleans or a ClassLabel, not "
         "string",
         "class_encode_column('label')"]),
    "unlabelled split": (unlabelled, ValueError,
        ["split train row 0: label -1 in column 'label'", "set data.train.split to another"]),
    "no such split": (no_split, ValueError,
        ["pets has no split 'tset'. Did you mean 'test'? Set data.test.split to one of"]),
    "class missing in a split": (class_missing_in_test, ValueError,
        ["test lacks 1 that train has (dog), which shifts its labels. Add them to test"]),
    "empty folder": (empty_folder, ValueError, ["pets", "data.train", "<class>/x.png"]),
    "digit that is none": (lambda _: ["data.train.classes=[1, 12]"], ValueError,
        ["data.train.classes must be different digits in 0..9, got [1, 12]"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_bad_data_is_told_before_training(name, tmp_path, load_tiny, refused):
    prepare, kind, wanted = TABLE[name]
    with refused(name, kind) as caught:
        run(load_tiny(tmp_path, *prepare(tmp_path)))
    message = str(caught.value)
    assert [part for part in wanted if part not in message] == [], message
    assert not (tmp_path / "run").exists()


def undecodable(folder):
    """Break one training and one test image; return overrides and what names them."""
    write_parquet(folder / "pets")
    for split in ("train", "test"):
        rows = datasets.load_dataset(
            "parquet", data_files=str(folder / f"pets/{split}.parquet"), split="train"
        )
        cells = rows.cast_column("image", datasets.Image(decode=False))[:]
        cells["image"][7] = {"bytes": b"no image", "path": None}
        broken = datasets.Dataset.from_dict(cells, features=rows.features)
        broken.to_parquet(folder / f"pets/{split}.parquet")
    names = [f"split {split} row 7" for split in ("train", "test")]
    return from_files(folder / "pets"), names


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_does_not_decode_ends_the_run(tmp_path, load_tiny, num_workers):
    words, (name, _) = undecodable(tmp_path)
    config = load_tiny(tmp_path, *words, f"data.num_workers={num_workers}")
    with pytest.raises(UndecodableImage, match="cannot be decoded: its 8 bytes are no") as caught:
        run(config)
    assert name in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "Repair or remove it, or set data.undecodable: skip." in str(caught.value)
    assert not (tmp_path / "run/results.json").exists()


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("classification", ()),
        ("classification", ("data.cache=ram", "data.num_workers=1")),
        ("probe", ()),
    ],
)
def test_or_is_skipped_and_listed(tmp_path, load_tiny, task, more, caplog):
    words, names = undecodable(tmp_path)
    config = load_tiny(tmp_path, *words, "data.undecodable=skip", *more, task=task)
    results = run(config)
    assert json.loads((tmp_path / "run/results.json").read_text())["skipped"] == results["skipped"]
    assert len(results["skipped"]) == 2
    assert "cannot be decoded (data.undecodable: skip): 2. " in caplog.text
    for name in names:
        (entry,) = [entry for entry in results["skipped"] if name in entry]
        assert "its 8 bytes are no image of" in entry
