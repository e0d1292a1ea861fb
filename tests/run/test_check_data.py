"""Checks of a whole data set report every broken or repeated image and count the rest."""

import numpy as np
from box_data import write_coco

from tract_transfer.data.digits import load_digits
from tract_transfer.run.check_data import check_images, statistics

OBJECTS = [("dog", (4, 5, 14, 25)), ("cat", (0, 0, 40, 30))]


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


def test_statistics_of_boxes_are_counted(tmp_path):
    def mark(tree):
        tree["annotations"][0]["iscrowd"] = 1

    dataset = write_coco(tmp_path / "data", OBJECTS, mark)()
    assert statistics(dataset, [])["width_px"] is None
    result = statistics(dataset, [(30, 40)] * 3)
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
