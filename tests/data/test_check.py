import datasets
import numpy as np
import pytest
from box_data import write_coco, write_voc
from PIL import Image

from tract_transfer.data.check import check_images, statistics
from tract_transfer.data.digits import load_digits

OBJECTS = [("dog", (4, 5, 14, 25)), ("cat", (0, 0, 40, 30))]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def test_every_broken_image_is_told_and_the_others_are_measured(tmp_path):
    dataset = write_voc(tmp_path, OBJECTS)()
    (tmp_path / "VOC2007/JPEGImages/0.jpg").write_bytes(b"none")
    (tmp_path / "VOC2007/JPEGImages/2.jpg").unlink()
    found = check_images(dataset)
    assert len(found.problems) == 2
    assert "0.jpg cannot be decoded" in found.problems[0]
    assert "2.jpg" in found.problems[1]
    assert found.sizes == [(30, 40)]
    assert statistics(dataset, found.sizes)["images"] == 3
    assert statistics(dataset, [])["width_px"] is None


def test_equal_pixels_are_told_by_both_names(tmp_path):
    dataset = write_coco(tmp_path / "data", OBJECTS)()
    first, second, third = (dataset.item(index) for index in range(3))
    (tmp_path / "data/images/2.png").write_bytes((tmp_path / "data/images/0.png").read_bytes())
    found = check_images(dataset)
    assert found.repeated == [(first, third)]
    assert sorted(found.items.values()) == [first, second]


def test_an_orientation_that_the_size_does_not_tell_is_worth_a_look(tmp_path):
    dataset = write_voc(tmp_path, OBJECTS)()
    for number, orientation in ((0, 3), (1, 6), (2, 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        size = (30, 40) if orientation == 6 else (40, 30)
        Image.new("RGB", size, (number, 0, 0)).save(dataset.item(number), exif=exif)
    found = check_images(dataset)
    assert found.problems == []
    (text,) = found.turned
    assert text.startswith(f"{dataset.item(0)} has EXIF orientation 3")
    assert "as stored" in text


def test_statistics_of_boxes_are_counted(tmp_path):
    def mark(tree):
        tree["annotations"][0]["iscrowd"] = 1

    found = statistics(write_coco(tmp_path / "data", OBJECTS, mark)(), [(30, 40)] * 3)
    assert found["images"] == 3
    assert (found["objects"], found["crowd"], found["difficult"]) == (3, 1, 0)
    assert (found["empty_images"], found["tall_images"]) == (1, 0)
    assert found["objects_per_image"] == {"min": 0, "median": 1, "mean": 1, "max": 2}
    assert found["box_width_px"] == {"min": 10, "median": 40, "mean": 30, "max": 40}
    assert found["box_width_over_height"]["min"] == 0.5
    assert found["small_medium_large"] == [1, 2, 0]
    assert found["classes"] == {
        "cat": {"images": 1, "objects": 1}, "dog": {"images": 2, "objects": 2},
    }  # fmt: skip


def test_statistics_of_classes_are_counted():
    dataset = load_digits("test", [3, 1])
    found = statistics(dataset, check_images(dataset).sizes)
    counts = np.bincount(dataset.labels).tolist()
    assert found["classes"] == {"three": {"images": counts[0]}, "one": {"images": counts[1]}}
    assert found["width_px"] == {"min": 32, "median": 32, "mean": 32, "max": 32}
