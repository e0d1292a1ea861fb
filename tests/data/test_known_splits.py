"""What a split's size says: the official split, a part of it, or another one."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from box_data import write_coco, write_rows, write_voc
from PIL import Image

from tract_transfer.build.data import build_data
from tract_transfer.data.classification import hold_out
from tract_transfer.data.huggingface import load_huggingface
from tract_transfer.data.coco import load_coco
from tract_transfer.data.findings import KNOWN, check_coco_file, check_size, check_voc_sets
from tract_transfer.data.huggingface import load_huggingface_boxes
from tract_transfer.data.voc import load_voc
from tract_transfer.run.check_data import check_data
from tract_transfer.run.run import run

SHARED = Path(__file__).parents[2] / "../shared/data"


pytestmark = pytest.mark.usefixtures("offline_cache")


def make_rows(labels, names=("cat", "dog"), shade=0):
    images = [Image.fromarray(np.full((8, 8, 3), shade + i, np.uint8)) for i in range(len(labels))]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    return datasets.Dataset.from_dict(
        {"image": images, "label": labels}, features=datasets.Features(features)
    )


def write_small(folder, counts=(6, 4)):
    """train.parquet and test.parquet of so many images in a folder."""
    folder.mkdir()
    for split, count, shade in zip(("train", "test"), counts, (0, 100), strict=True):
        rows = make_rows([i % 2 for i in range(count)], shade=shade)
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def overrides(folder, train="train"):
    splits = {"train": train, "test": "test"}
    sources = [
        f"data.{name}={{source: huggingface, path: {folder}, split: '{split}'}}"
        for name, split in splits.items()
    ]
    return [*sources, "data.batch_size=2", "solver.max_iters=2"]


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.title)
def test_every_official_split_is_recognised_by_every_name(known):
    for name in known.names:
        for split, count in known.images.items():
            found = check_size(name, None, True, split, count)
            assert found == (f"{known.title} {split}: all {count:,} official images", False)
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
    found = check_size("nelorth/oxford-flowers", None, True, split, count)
    assert found.differs == differs
    assert f"Oxford Flowers-102 {split}: " in found.text
    assert text in found.text
    assert ("nelorth/oxford-flowers has 7,169 and 1,020" in found.text) == differs


def test_what_is_not_known_is_not_judged():
    assert check_size("someone/pets", None, True, "train", 5) is None
    assert check_size("uoft-cs/cifar10", None, True, "extra", 5) is None
    assert check_size("someone/cifar10", None, True, "train", 5) is None  # another's, by its id
    assert check_voc_sets(["2007/mine"], 3) is None
    assert check_voc_sets(["1999/train"], 3) is None


def test_local_copies_are_known_by_what_they_call_themselves(tmp_path):
    write_small(tmp_path / "CIFAR-10")
    expected = "CIFAR-10 train: 6 images, but the official split has 50,000"
    for path in (tmp_path / "CIFAR-10", tmp_path / "CIFAR-10" / "train.parquet"):
        assert expected in load_huggingface(str(path), "train").origin.size_check.text
    rows = make_rows([0, 1, 1])
    rows.info.dataset_name = "oxford_flowers102"
    rows.save_to_disk(tmp_path / "copy")
    found = load_huggingface(str(tmp_path / "copy"), "train").origin.size_check
    assert "Oxford Flowers-102 train: 3 images" in found.text


def test_a_split_of_another_size_is_warned_about_and_in_the_results(tmp_path, load_tiny, caplog):
    folder = write_small(tmp_path / "cifar10")
    results = run(load_tiny(tmp_path, *overrides(folder)))
    told = json.loads((tmp_path / "run" / "results.json").read_text())["protocol"]
    assert told == results["protocol"]
    for split, count, official in (("train", 6, "50,000"), ("test", 4, "10,000")):
        text = f"CIFAR-10 {split}: {count} images, but the official split has {official}"
        assert f"data.{split}: {text}" in caplog.text
        assert text in told["official splits"]
    report = check_data(load_tiny(tmp_path, *overrides(folder)))
    assert any(line.startswith("train: CIFAR-10 train: 6 images") for line in report.warnings)
    assert report.is_clean


def test_a_slice_is_stated_without_a_warning(tmp_path, load_tiny, caplog):
    folder = write_small(tmp_path / "pets")
    folder = folder.rename(tmp_path / "cifar100")
    config = load_tiny(tmp_path, *overrides(folder, "train[:4]"))
    data = build_data(config)
    assert "data.train: CIFAR-100" not in caplog.text
    found = data.train.origin.size_check
    assert found == ("CIFAR-100 train[:4]: 4 images, a slice of the official 50,000", False)


def test_what_is_carved_or_selected_keeps_its_origin(tmp_path):
    write_small(tmp_path / "cifar10")
    dataset = load_huggingface(str(tmp_path / "cifar10"), "train")
    parts = hold_out(dataset, 0.5, 0)
    assert [part.origin for part in parts] == [dataset.origin] * 2


def test_a_voc_devkit_is_compared_by_year_and_split(tmp_path):
    assert not check_voc_sets(["2007/trainval", "2012/trainval"], 5_011 + 11_540).differs
    write_voc(tmp_path, [("dog", (4, 5, 14, 25))])
    dataset = load_voc(tmp_path, ["2007/train"])
    expected = "VOC 2007/train: 3 images, but the official split has 2,501"
    assert expected in dataset.origin.size_check.text
    assert dataset.with_objects().origin == dataset.select([0], "x").origin == dataset.origin
    own = load_voc(tmp_path, ["2007/train"], ["dog"])  # classes of one's own: no VOC
    assert own.origin.size_check is None


def test_boxes_of_the_hub_s_kind_are_compared_by_name(tmp_path):
    write_rows(tmp_path / "coco-2017", [("dog", (4, 5, 14, 25))])
    path = str(tmp_path / "coco-2017")
    dataset = load_huggingface_boxes(path, "train", "xywh", classes=["cat", "dog"])
    text = dataset.select([0], "one").origin.size_check.text
    assert "COCO 2017 train: 3 images, but the official split has 118,287" in text
    assert "without the images that show no object there are 117,266" in text
    load = write_rows(tmp_path / "mine", [("dog", (4, 5, 14, 25))])
    assert load().origin.size_check is None


def test_coco_s_own_files_are_compared_by_name(tmp_path):
    write_coco(tmp_path, [("dog", (4, 5, 14, 25))])
    for name, text in {
        "instances_val2017": "COCO 2017 val: 3 images, but the official split has 5,000",
        "instances_train2014": "COCO 2014 train: 3 images, but the official split has 82,783",
        "instances_val2018": None,
        "boxes": None,
    }.items():
        file = tmp_path / f"{name}.json"
        file.write_text((tmp_path / "boxes.json").read_text())
        check = load_coco(tmp_path / "images", file).origin.size_check
        assert (check and check.text.partition(":")[0]) == (text and text.partition(":")[0])
        assert text is None or text in check.text
    assert not check_coco_file(Path("instances_val2017.json"), 5_000).differs


@pytest.mark.skipif(not SHARED.exists(), reason="no sample data")
def test_real_samples_are_told_to_be_parts():
    found = load_huggingface(str(SHARED / "flowers102"), "validation").origin.size_check
    assert "Oxford Flowers-102 validation: 706 images, but the official split has 1,020" in (
        found.text
    )
