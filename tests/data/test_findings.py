"""The size of a split shows whether it is the official one, a part of it, or another."""

from pathlib import Path

import pytest
from box_data import write_coco, write_rows, write_voc
from stream_rows import huggingface, make_rows, write_splits

from tract_transfer.build.data import build_data
from tract_transfer.data.classification import hold_out
from tract_transfer.data.coco import load_coco
from tract_transfer.data.findings import (
    KNOWN,
    check_coco_file,
    check_size,
    check_voc_sets,
)
from tract_transfer.data.huggingface import load_huggingface
from tract_transfer.data.voc import load_voc
from tract_transfer.run.check_data import check_data
from tract_transfer.run.run import run

DOG = [("dog", (4, 5, 14, 25))]
pytestmark = pytest.mark.usefixtures("offline_cache")


@pytest.mark.parametrize("entry", KNOWN, ids=lambda entry: entry.title)
def test_every_official_split_is_recognized_by_every_name(entry):
    for name in entry.names.split():
        for split, count in entry.images.items():
            check = check_size(name, None, True, split, count)
            assert check == (f"{entry.title} {split}: all {count:,} official images", False)
            assert check_size(name, None, True, split, count - 1).differs


@pytest.mark.parametrize(
    ("split", "count", "differs", "text"),
    [
        ("train", 7_169, True, "7,169 images, but the official split has 1,020"),
        ("test", 1_020, True, "1,020 images, but the official split has 6,149"),
        ("train+validation", 2_040, False, "all 2,040 official images"),
        ("train+valid", 2_039, True, "official split has 2,040"),
        ("train[:10%]", 717, False, "717 images, a slice of the official 1,020"),
        ("train[:10%]+test", 9, False, "9 images, a slice of the official 7,169"),
    ],
)
def test_another_split_of_flowers_names_both_numbers_and_the_trap(split, count, differs, text):
    check = check_size("nelorth/oxford-flowers", None, True, split, count)
    assert check.differs == differs
    assert f"Oxford Flowers-102 {split}: " in check.text
    assert text in check.text
    assert ("nelorth/oxford-flowers has 7,169 and 1,020" in check.text) == differs


def test_unknown_data_sets_are_not_judged():
    assert check_size("someone/pets", None, True, "train", 5) is None
    assert check_size("uoft-cs/cifar10", None, True, "extra", 5) is None
    assert check_size("someone/cifar10", None, True, "train", 5) is None  # another user's
    assert check_voc_sets(["2007/mine"], 3) is None
    assert check_voc_sets(["1999/train"], 3) is None
    assert check_coco_file(Path("instances_val2018.json"), 3) is None
    assert check_coco_file(Path("boxes.json"), 3) is None


def test_local_copies_are_known_by_their_folder_or_by_their_own_name(tmp_path):
    (tmp_path / "CIFAR-10").mkdir()
    write_splits(tmp_path / "CIFAR-10", 6, 4)
    expected = "CIFAR-10 train: 6 images, but the official split has 50,000"
    for path in (tmp_path / "CIFAR-10", tmp_path / "CIFAR-10" / "train.parquet"):
        dataset = load_huggingface(str(path), "train")
        assert expected in dataset.origin.size_check.text
        assert {part.origin for part in hold_out(dataset, 0.5, 0)} == {dataset.origin}
    rows = make_rows(3)
    rows.info.dataset_name = "oxford_flowers102"
    rows.save_to_disk(tmp_path / "copy")
    dataset = load_huggingface(str(tmp_path / "copy"), "train")
    assert "Oxford Flowers-102 train: 3 images" in dataset.origin.size_check.text


def test_a_split_of_another_size_is_warned_about_and_in_the_results(tmp_path, load_tiny, caplog):
    (tmp_path / "cifar10").mkdir()
    write_splits(tmp_path / "cifar10", 6, 4)
    words = huggingface(tmp_path / "cifar10", "data.batch_size=2", "solver.max_iters=2")
    written = run(load_tiny(tmp_path, *words))["protocol"]
    for split, count, official in (("train", 6, "50,000"), ("test", 4, "10,000")):
        text = f"CIFAR-10 {split}: {count} images, but the official split has {official}"
        assert f"data.{split}: {text}" in caplog.text
        assert text in written["official splits"]
    warnings = check_data(load_tiny(tmp_path, *words)).warnings
    assert any(line.startswith("train: CIFAR-10 train: 6 images") for line in warnings)
    caplog.clear()
    data = build_data(load_tiny(tmp_path, *words, "data.train.split=train[:4]"))
    assert "data.train: CIFAR-10" not in caplog.text
    expected = ("CIFAR-10 train[:4]: 4 images, a slice of the official 50,000", False)
    assert data.train.origin.size_check == expected


def test_boxes_of_every_format_are_compared(tmp_path):
    assert not check_voc_sets(["2007/trainval", "2012/trainval"], 5_011 + 11_540).differs
    assert not check_coco_file(Path("instances_val2017.json"), 5_000).differs
    write_voc(tmp_path / "voc", DOG)
    dataset = load_voc(tmp_path / "voc", ["2007/train"])
    text = dataset.origin.size_check.text
    assert "VOC 2007/train: 3 images, but the official split has 2,501" in text
    assert dataset.with_objects().origin == dataset.select([0], "x").origin == dataset.origin
    assert load_voc(tmp_path / "voc", ["2007/train"], ["dog"]).origin.size_check is None
    text = write_rows(tmp_path / "coco-2017", DOG)().origin.size_check.text
    assert "COCO 2017 train: 3 images, but the official split has 118,287" in text
    assert "without the images that show no object there are 117,266" in text
    assert write_rows(tmp_path / "mine", DOG)().origin.size_check is None
    write_coco(tmp_path, DOG)
    file = (tmp_path / "boxes.json").rename(tmp_path / "instances_train2014.json")
    text = load_coco(tmp_path / "images", file).origin.size_check.text
    assert "COCO 2014 train: 3 images, but the official split has 82,783" in text
