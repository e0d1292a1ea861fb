"""Checks of a whole data set report every broken or repeated image and count the rest."""

import numpy as np
from box_data import write_coco, write_voc
from PIL import Image

from tract_transfer.data.digits import load_digits
from tract_transfer.run.check_data import check_images, statistics

OBJECTS = [("dog", (4, 5, 14, 25)), ("cat", (0, 0, 40, 30))]


def test_every_broken_image_is_reported_and_the_others_are_measured(tmp_path):
    dataset = write_voc(tmp_path, OBJECTS)()
    (tmp_path / "VOC2007/JPEGImages/0.jpg").write_bytes(b"none")
    (tmp_path / "VOC2007/JPEGImages/2.jpg").unlink()
    checked = check_images(dataset, "train", {})
    assert len(checked.problems) == 2
    assert "0.jpg cannot be decoded" in checked.problems[0]
    assert "2.jpg" in checked.problems[1]
    assert checked.sizes == [(30, 40)]
    assert statistics(dataset, checked.sizes)["images"] == 3
    assert statistics(dataset, [])["width_px"] is None


def test_equal_images_are_reported_by_both_names_within_and_between_splits(tmp_path):
    dataset = write_coco(tmp_path / "data", OBJECTS)()
    first, second, third = (dataset.item(index) for index in range(3))
    (tmp_path / "data/images/2.png").write_bytes((tmp_path / "data/images/0.png").read_bytes())
    shown = {}
    same = f"train: {third} shows the same as train: {first}"
    assert check_images(dataset, "train", shown).warnings == [same]
    assert sorted(shown.values()) == [f"train: {first}", f"train: {second}"]
    warnings = check_images(dataset, "test", shown).warnings
    assert warnings[0] == f"test: {first} shows the same as train: {first}"
    assert len(warnings) == 3


def test_an_orientation_that_the_size_does_not_settle_gives_a_warning(tmp_path):
    dataset = write_voc(tmp_path, OBJECTS)()
    for number, orientation in ((0, 3), (1, 6), (2, 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        size = (30, 40) if orientation == 6 else (40, 30)
        Image.new("RGB", size, (number, 0, 0)).save(dataset.item(number), exif=exif)
    checked = check_images(dataset, "train", {})
    assert checked.problems == []
    (text,) = [text for text in checked.warnings if "EXIF" in text]
    assert text.startswith(f"train: {dataset.item(0)} has EXIF orientation 3")
    assert "as stored" in text


def test_statistics_of_boxes_are_counted(tmp_path):
    def mark(tree):
        tree["annotations"][0]["iscrowd"] = 1

    result = statistics(write_coco(tmp_path / "data", OBJECTS, mark)(), [(30, 40)] * 3)
    assert result["images"] == 3
    assert (result["objects"], result["crowd"], result["difficult"]) == (3, 1, 0)
    assert (result["empty_images"], result["tall_images"]) == (1, 0)
    assert result["objects_per_image"] == {"min": 0, "median": 1, "mean": 1, "max": 2}
    assert result["box_width_px"] == {"min": 10, "median": 40, "mean": 30, "max": 40}
    assert result["box_width_over_height"]["min"] == 0.5
    assert result["small_medium_large"] == [1, 2, 0]
    assert result["classes"] == {
        "cat": {"images": 1, "objects": 1}, "dog": {"images": 2, "objects": 2},
    }  # fmt: skip


def test_statistics_of_classes_are_counted():
    dataset = load_digits("test", [3, 1])
    result = statistics(dataset, check_images(dataset, "train", {}).sizes)
    counts = np.bincount(dataset.labels).tolist()
    assert result["classes"] == {"three": {"images": counts[0]}, "one": {"images": counts[1]}}
    assert result["width_px"] == {"min": 32, "median": 32, "mean": 32, "max": 32}
