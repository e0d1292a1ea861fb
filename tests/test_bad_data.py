"""Data that cannot be used: the error names file or row, and the fix, before training starts."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from tract_transfer.data.images import UndecodableImage
from tract_transfer.run import run

NAMES = ["cat", "dog", "eel"]


@pytest.fixture(autouse=True)
def offline_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def picture(value):
    return Image.fromarray(np.full((16, 16, 3), value, dtype=np.uint8))


def write_folder(folder, classes=NAMES, count=12):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture(40 * number + index).save(folder / name / f"{index}.png")


def write_parquet(folder, count=40, **columns):
    """Write train.parquet and test.parquet of the columns given, each name -> (feature, cells)."""
    folder.mkdir(exist_ok=True)
    given = {
        "image": (datasets.Image(), [picture(index) for index in range(count)]),
        "label": (datasets.ClassLabel(names=NAMES), [index % 3 for index in range(count)]),
        **columns,
    }
    given = {name: column for name, column in given.items() if column is not None}
    features = datasets.Features({name: feature for name, (feature, _) in given.items()})
    cells = {name: cells for name, (_, cells) in given.items()}
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict(cells, features=features)
        rows = rows if split == "train" else rows.select(range(count - 1))  # other data
        rows.to_parquet(folder / f"{split}.parquet")


def from_files(path, *more):
    """Overrides that read both splits from one folder."""
    sources = [
        f"data.{split}={{source: huggingface, path: {path}, split: {split}}}"
        for split in ("train", "test")
    ]
    return [*sources, "data.batch_size=8", *more]


def write_devkit(folder, count=8):
    devkit = folder / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (devkit / name).mkdir(parents=True)
    ids = [f"{index:06d}" for index in range(count)]
    for image_id in ids:
        Image.new("RGB", (64, 48), (90, 9, 9)).save(devkit / f"JPEGImages/{image_id}.jpg")
        write_annotation(devkit, image_id)
    for split, named in (("train", ids), ("test", ids[:-1])):
        (devkit / f"ImageSets/Main/{split}.txt").write_text("\n".join(named))
    return devkit


def write_annotation(devkit, image_id, name="dog", corners=(5, 6, 40, 30)):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    (devkit / f"Annotations/{image_id}.xml").write_text(
        "<annotation><size><width>64</width><height>48</height></size>"
        f"<object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
    )


def from_devkit(root, *more):
    sources = [
        f"data.{split}={{source: voc, root: {root}, sets: [2007/{split}]}}"
        for split in ("train", "test")
    ]
    return [*sources, *more]


# What makes bad data in a folder, and returns the overrides that lead to it.
def no_path(folder):
    return from_files(folder / "nowhere")


def no_image_column(folder):
    write_parquet(folder / "pets", image=None, text=(datasets.Value("string"), ["x"] * 40))
    return from_files(folder / "pets")


def no_label_column(folder):
    write_parquet(folder / "pets", label=None)
    return from_files(folder / "pets")


def wrong_label_column(folder):
    write_parquet(folder / "pets")
    columns = [f"data.{split}.label_column=labell" for split in ("train", "test")]
    return from_files(folder / "pets", *columns)


def string_labels(folder):
    write_parquet(folder / "pets", label=(datasets.Value("string"), ["cat", "dog"] * 20))
    columns = [f"data.{split}.label_column=label" for split in ("train", "test")]
    return from_files(folder / "pets", *columns)


def unlabelled(folder):
    labels = [-1] * 40
    write_parquet(folder / "pets", label=(datasets.ClassLabel(names=NAMES), labels))
    return from_files(folder / "pets")


def no_split(folder):
    write_parquet(folder / "pets")
    return from_files(folder / "pets", "data.test.split=tset")


def class_missing_in_test(folder):
    write_folder(folder / "train")
    write_folder(folder / "test", ["cat", "eel"])
    return from_files(
        folder, f"data.train.path={folder / 'train'}", f"data.test.path={folder / 'test'}"
    )


def empty_folder(folder):
    (folder / "pets").mkdir()
    return from_files(folder / "pets")


def no_devkit(folder):
    return from_devkit(folder / "nowhere")


def no_split_file(folder):
    write_devkit(folder)
    return from_devkit(folder, "data.train.sets=[2007/trian]")


def blank_split_file(folder):
    (write_devkit(folder) / "ImageSets/Main/train.txt").write_text("\n")
    return from_devkit(folder)


def malformed_split_file(folder):
    (write_devkit(folder) / "ImageSets/Main/train.txt").write_text("000001 1 1\n")
    return from_devkit(folder)


def unknown_id(folder):
    (write_devkit(folder) / "ImageSets/Main/train.txt").write_text("000001\n000077\n")
    return from_devkit(folder)


def broken_xml(folder):
    (write_devkit(folder) / "Annotations/000003.xml").write_text("<annotation><object>")
    return from_devkit(folder)


def unknown_class(folder):
    write_annotation(write_devkit(folder), "000003", name="dgo")
    return from_devkit(folder)


def box_outside(folder):
    write_annotation(write_devkit(folder), "000003", corners=(5, 6, 80, 30))
    return from_devkit(folder)


def box_inverted(folder):
    write_annotation(write_devkit(folder), "000003", corners=(50, 6, 20, 30))
    return from_devkit(folder)


def size_differs(folder):
    Image.new("RGB", (50, 50)).save(write_devkit(folder) / "JPEGImages/000000.jpg")
    return from_devkit(folder)


C, D = "classification", "detection"
TABLE = {
    # classification data
    "no path": (C, no_path, FileNotFoundError, ["nowhere does not exist. Set data.train.path"]),
    "no image column": (C, no_image_column, ValueError,
        ["feature Image, but 0 have: set data.train.image_column", "text (string)"]),
    "no label column": (C, no_label_column, ValueError,
        ["feature ClassLabel, but 0 have: set data.train.label_column", "image (Image)"]),
    "wrong label column": (C, wrong_label_column, ValueError,
        ["data.train.label_column: no column 'labell'. Did you mean 'label'?"]),
    "label column of strings": (C, string_labels, ValueError,
        ["data.train.label_column: 'label' must hold integers, booleans or a ClassLabel, not "
         "string",
         "class_encode_column('label')"]),
    "unlabelled split": (C, unlabelled, ValueError,
        ["split train row 0: label -1 in column 'label'", "set data.train.split to another"]),
    "no such split": (C, no_split, ValueError,
        ["pets has no split 'tset'. Did you mean 'test'? Set data.test.split to one of"]),
    "class missing in a split": (C, class_missing_in_test, ValueError,
        ["test lacks 1 that train has (dog), which shifts its labels. Add them to test"]),
    "empty folder": (C, empty_folder, ValueError, ["pets", "data.train", "<class>/x.png"]),
    "digit that is none": (C, lambda _: ["data.train.classes=[1, 12]"], ValueError,
        ["data.train.classes must be different digits in 0..9, got [1, 12]"]),
    # detection data
    "no devkit": (D, no_devkit, FileNotFoundError,
        ["No VOC devkit for '2007'", "nowhere/VOC2007/Annotations", "Set data.train.root."]),
    "no split file": (D, no_split_file, FileNotFoundError,
        ["trian.txt does not exist. Did you mean 'train'?", "Set data.train.sets"]),
    "blank split file": (D, blank_split_file, ValueError,
        ["train.txt names no image. Set data.train.sets"]),
    "malformed split file": (D, malformed_split_file, ValueError,
        ["train.txt line 1 must be an id, or an id and 1, 0 or -1, not '000001 1 1'"]),
    "unknown image id": (D, unknown_id, FileNotFoundError,
        ["train.txt line 2 needs", "000077.xml, which does not exist"]),
    "broken XML": (D, broken_xml, ValueError,
        ["000003.xml is not a readable XML file", "Repair it."]),
    "unknown class": (D, unknown_class, ValueError,
        ["000003.xml object 1 (dgo): unknown class. Did you mean 'dog'?", "data.train.classes"]),
    "box outside": (D, box_outside, ValueError,
        ["000003.xml object 1 (dog): the box must lie in the image of 64x48 pixels", "xmax 80",
         "Correct it, or set data.invalid_boxes: clip."]),
    "box inverted": (D, box_inverted, ValueError,
        ["000003.xml object 1 (dog): the box is empty or inverted", "xmin 50", "Correct it"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_bad_data_is_told_before_training(name, tmp_path, load_tiny, refused):
    task, prepare, kind, wanted = TABLE[name]
    with refused(name, kind) as caught:
        run(load_tiny(tmp_path, *prepare(tmp_path), task=task))
    message = str(caught.value)
    assert [part for part in wanted if part not in message] == [], message
    assert not (tmp_path / "run").exists()


def undecodable(folder, task):
    """Break one training and one test image of twenty; return overrides and what names them."""
    if task == "detection":
        devkit = write_devkit(folder)
        for index in (2, 5):
            (devkit / f"JPEGImages/{index:06d}.jpg").write_bytes(b"no image")
        (devkit / "ImageSets/Main/train.txt").write_text("000001\n000002\n000003\n000004\n")
        (devkit / "ImageSets/Main/test.txt").write_text("000005\n000006\n")
        return from_devkit(folder), ["000002.jpg", "000005.jpg"]
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


@pytest.mark.parametrize(
    ("task", "num_workers"), [("classification", 0), ("classification", 1), ("detection", 0)]
)
def test_an_image_that_does_not_decode_ends_the_run(
    tmp_path, load_tiny, task, num_workers, refused
):
    words, (name, _) = undecodable(tmp_path, task)
    config = load_tiny(tmp_path, *words, f"data.num_workers={num_workers}", task=task)
    with pytest.raises(
        UndecodableImage,
        match="cannot be decoded: its 8 bytes are no",
    ) as caught:
        run(config)
    assert name in str(caught.value)
    assert "Repair or remove it, or set data.undecodable: skip." in str(caught.value)
    assert not (tmp_path / "run/results.json").exists()


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("classification", ()),
        ("classification", ("data.cache=ram", "data.num_workers=1")),
        ("probe", ()),
        ("detection", ()),
    ],
)
def test_or_is_skipped_and_listed(tmp_path, load_tiny, task, more):
    words, names = undecodable(tmp_path, task)
    config = load_tiny(tmp_path, *words, "data.undecodable=skip", *more, task=task)
    results = run(config)
    assert json.loads((tmp_path / "run/results.json").read_text())["skipped"] == results["skipped"]
    assert len(results["skipped"]) == 2
    for name in names:
        (entry,) = [entry for entry in results["skipped"] if name in entry]
        assert "its 8 bytes are no image of" in entry


def test_an_image_of_another_size_than_annotated_is_named(tmp_path, load_tiny, refused):
    Image.new("RGB", (50, 50)).save(write_devkit(tmp_path) / "JPEGImages/000000.jpg")
    config = load_tiny(tmp_path, *from_devkit(tmp_path), "data.batch_size=8", task="detection")
    with refused(
        "an image of another size than annotated",
        ValueError,
        match=r"000000.jpg has 50x50 pixels .* says 64x48.*Correct",
    ):
        run(config)
