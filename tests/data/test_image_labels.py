"""Marks of whole images are those of PASCAL VOC's own files of a class."""

from pathlib import Path

import numpy as np
import pytest

from tract_transfer.data.detection import (
    DetectionDataset,
    ImageFiles,
    ImageLabels,
    flatten,
    object_row,
)
from tract_transfer.data.digits import write_digit_scenes
from tract_transfer.data.images import content_hashes
from tract_transfer.data.voc import load_voc

DEVKIT = Path(__file__).parents[3] / "shared/data/voc"


def dataset(*images):
    """Images of (label, difficult) objects, of three classes."""
    rows = [[object_row((0, 0, 5, 5), k, difficult=hard) for k, hard in image] for image in images]
    files = ImageFiles([f"{number}.png" for number in range(len(images))])
    return DetectionDataset("made", ["a", "b", "c"], files, [(9, 9)] * len(images), flatten(rows))


def test_one_counted_object_is_a_positive_and_difficult_ones_alone_do_not_count():
    labels = ImageLabels(
        dataset([(0, False), (0, True)], [(1, True), (1, True), (2, False)], [], [(2, True)])
    )
    expected = [[1, -1, -1], [-1, 0, 1], [-1, -1, -1], [-1, -1, 0]]
    np.testing.assert_array_equal(labels.marks, expected)
    assert [labels.target(i) for i in range(4)] == expected
    np.testing.assert_array_equal(labels.labels, [0, 2])
    assert labels.item(1) == "1.png"


def test_images_and_fingerprint_are_the_detection_sets(tmp_path):
    root = write_digit_scenes(tmp_path / "scenes", num_train=3, num_test=1, size_px=64)
    classes = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    objects = load_voc(root, ["2007/train"], classes)
    labels = ImageLabels(objects)
    assert len(labels) == 3
    assert labels.fingerprint() == objects.fingerprint()
    assert labels.image(1).equal(objects.image(1))
    assert labels.encoded(0) == (root / "VOC2007/JPEGImages/000001.jpg").read_bytes()
    assert len(set(content_hashes(labels.encoded, 3))) == 3
    labels.cache_images()
    assert labels.image(1).equal(objects.image(1))


@pytest.mark.parametrize("split", ["train", "val"])
def test_marks_are_those_of_the_devkits_own_files(split):
    folder = DEVKIT / "VOCdevkit/VOC2007/ImageSets/Main"
    files = sorted(folder.glob(f"*_{split}.txt"))
    if not files:
        pytest.skip("no files of a class in ../shared/data/voc")
    labels = ImageLabels(load_voc(DEVKIT, [f"2007/{split}"]))
    for file in files:
        written = [int(line.split()[1]) for line in file.read_text().splitlines()]
        k = labels.class_names.index(file.stem.removesuffix(f"_{split}"))
        np.testing.assert_array_equal(labels.marks[:, k], written)
