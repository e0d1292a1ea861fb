"""What a folder holds: its kind, its splits and its classes, and that the sources load."""

from pathlib import Path
from types import SimpleNamespace

import image_folders as make
import pytest

from tract_transfer.build.data import load_split
from tract_transfer.config.data import ClassificationData, DetectionData
from tract_transfer.data.findings import Findings
from tract_transfer.data.folder import describe_folder, split_of

pytestmark = pytest.mark.usefixtures("offline_cache")
TRANSFORMS = {
    "classification": {"size_px": 8},
    "detection": {"short_sides_px": [8], "max_side_px": 8},
}
# Name -> how to write a folder, and what must be found: kind, images of each split, classes.
FOLDERS = {
    "flat": (make.classes, "class folders", {"train": 12}, ["ant", "bee", "cow"]),
    "litter": (lambda f: make.litter(make.classes(f)), "class folders", {"train": 12},
        ["ant", "bee", "cow"]),
    "splits": (lambda f: make.split_classes(f, train=12, valid=6, test=3), "class folders",
        {"train": 12, "val": 6, "test": 3}, ["ant", "bee", "cow"]),
    "other spellings": (lambda f: make.split_classes(f, Training_Set=12, Testing=3),
        "class folders", {"train": 12, "test": 3}, ["ant", "bee", "cow"]),
    "a folder in a folder": (lambda f: make.split_classes(f / "unpacked", train=12, test=3).parent,
        "class folders", {"train": 12, "test": 3}, ["ant", "bee", "cow"]),
    "parquet": (lambda f: make.parquet(f, "train", "validation"), "parquet",
        {"train": 12, "val": 12}, ["cat", "dog", "eel"]),
    "parquet file": (lambda f: make.parquet(f, "train") / "train.parquet", "parquet",
        {"train": 12}, ["cat", "dog", "eel"]),
    "parquet of another name": (lambda f: make.parquet(f, "pets"), "parquet", {"train": 12},
        ["cat", "dog", "eel"]),
    "saved": (lambda f: make.saved(f, "train", "test"), "saved dataset",
        {"train": 12, "test": 12}, ["cat", "dog", "eel"]),
    "metadata": (make.metadata, "images with metadata", {"train": 6}, None),
    "rows with boxes": (make.boxes, "parquet", {"train": 3}, ["cat", "dog", "eel"]),
    "devkit": (lambda f: make.devkit(f, ("train", "val")), "VOC devkit", {"train": 3, "val": 3},
        20),
    "devkit with trainval and test": (lambda f: make.devkit(f, ("train", "trainval", "test")),
        "VOC devkit", {"train": 3, "test": 3}, 20),
    "devkit of another name": (lambda f: make.devkit(f, ("train",), "pets"), "VOC devkit",
        {"train": 3}, ["cat", "dog"]),
    "a devkit itself": (lambda f: make.devkit(f) / "VOC2007", "VOC devkit", {"train": 3}, 20),
    "coco": (lambda f: make.coco(f, "train2017", "val2017"), "COCO", {"train": 3, "val": 3},
        ["cat", "dog"]),
    "coco export": (lambda f: make.coco_export(f, "train", "valid", "test"), "COCO",
        {"train": 3, "val": 3, "test": 3}, ["cat", "dog"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_described_and_its_sources_load(name, tmp_path):
    write, kind, counts, class_names = FOLDERS[name]
    data = describe_folder(write(tmp_path / "given"))
    assert data.kind == kind
    assert {split: part.num_images for split, part in data.splits.items()} == counts
    names = len(data.class_names) if isinstance(class_names, int) else data.class_names
    assert names == class_names
    assert len(data.sizes) == counts["train"]
    section = {"classification": ClassificationData, "detection": DetectionData}[data.task]
    sources = {split: part.source for split, part in data.splits.items()}
    checked = section(**sources, transforms=TRANSFORMS[data.task], batch_size=1)
    config = SimpleNamespace(data=checked, plugins=[])
    for split, count in counts.items():
        loaded = load_split(config, split, Findings())
        assert len(loaded) == count
        if class_names is not None:
            assert loaded.class_names == data.class_names
        assert loaded.image(0).shape[0] == 3


def test_the_splits_of_other_names_are_the_same_classes(tmp_path):
    data = describe_folder(make.split_classes(tmp_path / "x", Training=12, DEV=6, holdout=3))
    assert [*data.splits] == ["train", "val"]
    assert data.notes == ["not used: the folders holdout"]


def test_the_path_of_a_source_is_absolute(tmp_path, monkeypatch):
    make.classes(tmp_path / "owner/pets")
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "owner/pets")
    assert describe_folder(Path("owner/pets")).splits["train"].source["path"] == path
    monkeypatch.chdir(tmp_path / "owner/pets")
    assert describe_folder(".").splits["train"].source["path"] == path


@pytest.mark.parametrize("box_format", ["xywh", "xyxy", "cxcywh"])
@pytest.mark.parametrize("unit", ["pixel", "relative"])
def test_the_format_of_boxes_is_the_only_one_that_fits(box_format, unit, tmp_path):
    def written(box):
        x1, y1, x2, y2 = box
        middle = (x1 + x2) / 2, (y1 + y2) / 2
        numbers = {
            "xyxy": box,
            "xywh": (x1, y1, x2 - x1, y2 - y1),
            "cxcywh": (*middle, x2 - x1, y2 - y1),
        }[box_format]
        sides = (1, 1, 1, 1) if unit == "pixel" else (40, 30, 40, 30)
        return [number / side for number, side in zip(numbers, sides, strict=True)]

    objects = [("dog", (1, 2, 3, 4)), ("cat", (30, 20, 40, 30)), ("cat", (22, 12, 40, 30))]
    make.write_rows(tmp_path, objects, box=written)
    source = describe_folder(tmp_path).splits["train"].source
    assert (source["box_format"], source["box_unit"]) == (box_format, unit)


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("Training_Set", "train"), ("train2017", "train"), ("VALID", "val"),
     ("validation-images", "val"), ("dev", "val"), ("Test", "test"), ("testing", "test"),
     ("trains", None), ("tested", None), ("cat", None), ("evaluate", None)],
)  # fmt: skip
def test_a_split_has_several_spellings(name, split):
    assert split_of(name) == split
