"""Detection data that cannot be used: one error in training and evaluation, before training starts.

What of a box can be mended, and every format, is in test_data_annotations.py.
"""

import json

import pytest
from PIL import Image

from tract_transfer.data.images import UndecodableImage
from tract_transfer.run.run import evaluate_run, run

CLASSES = ("dog", "cat")


def write_devkit(folder, count=8, value=90):
    """A devkit of one dog an image, sets `all` and `most`."""
    devkit = folder / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (devkit / name).mkdir(parents=True)
    ids = [f"{index:06d}" for index in range(count)]
    for image_id in ids:
        Image.new("RGB", (64, 48), (value, 9, 9)).save(devkit / f"JPEGImages/{image_id}.jpg")
        write_annotation(devkit, image_id)
    for name, kept in (("all", ids), ("most", ids[:-1])):
        (devkit / f"ImageSets/Main/{name}.txt").write_text("\n".join(kept))
    return devkit


def write_annotation(devkit, image_id, name="dog", corners=(5, 6, 40, 30)):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    (devkit / f"Annotations/{image_id}.xml").write_text(
        "<annotation><size><width>64</width><height>48</height></size>"
        f"<object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
    )


def from_devkits(train, test, *more):
    """Overrides that train on one devkit and measure on another."""
    sets = {"train": (train, "all"), "test": (test, "most")}
    sources = [
        f"data.{split}={{source: voc, root: {devkit.parent}, sets: [2007/{name}]}}"
        for split, (devkit, name) in sets.items()
    ]
    return [*sources, "data.batch_size=4", *more]


def from_devkit(devkit, *more):
    return from_devkits(devkit, devkit, *more)


def split_files(devkit):
    return [devkit / f"ImageSets/Main/{name}.txt" for name in ("all", "most")]


# What makes a devkit bad.
def no_devkit(devkit):
    devkit.rename(devkit.with_name("VOC2017"))


def no_split_file(devkit):
    for file in split_files(devkit):
        file.rename(file.with_name(f"{file.stem[:-1]}.txt"))


def listed(text):
    """Write a text into both split files."""
    return lambda devkit: [file.write_text(text) for file in split_files(devkit)]


def without(name):
    return lambda devkit: (devkit / name).unlink()


def broken_xml(devkit):
    (devkit / "Annotations/000003.xml").write_text("<annotation><object>")


def entities(devkit):
    text = (devkit / "Annotations/000003.xml").read_text()
    bomb = '<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]>'
    (devkit / "Annotations/000003.xml").write_text(bomb + text.replace("dog", "&b;"))


def annotated(**changes):
    return lambda devkit: write_annotation(devkit, "000003", **changes)


TABLE = {
    "no devkit": (no_devkit, FileNotFoundError,
        ["No VOC devkit for '2007'", "bad/VOC2007/Annotations", "Set data.{split}.root."]),
    "no split file": (no_split_file, FileNotFoundError,
        [".txt does not exist. Did you mean", "Set data.{split}.sets"]),
    "blank split file": (listed("\n"), ValueError,
        [".txt names no image. Set data.{split}.sets"]),
    "malformed split file": (listed("000001 1 1\n"), ValueError,
        [".txt line 1 must be an id, or an id and 1, 0 or -1, not '000001 1 1'"]),
    "image id twice": (listed("000001\n000003\n000001\n"), ValueError,
        [".txt line 3 repeats '000001', already in", ".txt line 1. Remove one."]),
    "no annotation": (without("Annotations/000003.xml"), FileNotFoundError,
        [".txt line 4 needs", "000003.xml, which does not exist"]),
    "no image": (without("JPEGImages/000003.jpg"), FileNotFoundError,
        [".txt line 4 needs", "000003.jpg, which does not exist"]),
    "broken XML": (broken_xml, ValueError,
        ["000003.xml is not a readable XML file", "Repair it."]),
    "entities in XML": (entities, ValueError,
        ["000003.xml is not a readable XML file", "Repair it."]),
    "unknown class": (annotated(name="dgo"), ValueError,
        ["000003.xml object 1 (dgo): unknown class. Did you mean 'dog'?", "data.{split}.classes"]),
    "box outside": (annotated(corners=(5, 6, 80, 30)), ValueError,
        ["000003.xml object 1 (dog): the box must lie in the image of 64x48 pixels", "xmax 80",
         "Correct it, or set data.invalid_boxes: clip."]),
    "box inverted": (annotated(corners=(50, 6, 20, 30)), ValueError,
        ["000003.xml object 1 (dog): the box is empty or inverted", "xmin 50", "Correct it"]),
    "box of no number": (annotated(corners=("nan", 6, 20, 30)), ValueError,
        ["000003.xml object 1 (dog): <xmin> must be a finite number, not 'nan'", "Correct it"]),
}  # fmt: skip


@pytest.fixture
def bad(tmp_path):
    """Return what makes the overrides of a run of which one split is bad."""

    def make(prepare, split, *more):
        devkits = {"train": write_devkit(tmp_path / "good"), "test": None}
        devkits["test"] = write_devkit(tmp_path / "other", value=50)
        devkits[split] = write_devkit(tmp_path / "bad", value=130)
        prepare(devkits[split])
        return from_devkits(devkits["train"], devkits["test"], *more)

    return make


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", TABLE)
def test_it_is_told_before_training_in_either_split(name, split, bad, tmp_path, load_tiny, refused):
    prepare, kind, wanted = TABLE[name]
    with refused(name, kind) if split == "train" else pytest.raises(kind) as caught:
        run(load_tiny(tmp_path, *bad(prepare, split), task="detection"))
    message = str(caught.value)
    missing = [part for part in wanted if part.format(split=split) not in message]
    assert missing == [], message
    assert not (tmp_path / "run").exists()


def break_images(devkit):
    (devkit / "JPEGImages/000002.jpg").write_bytes(b"no image")
    whole = (devkit / "JPEGImages/000003.jpg").read_bytes()
    (devkit / "JPEGImages/000003.jpg").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_that_does_not_decode_ends_the_run(split, bad, tmp_path, load_tiny):
    config = load_tiny(tmp_path, *bad(break_images, split), task="detection")
    with pytest.raises(UndecodableImage, match=r"00000[23]\.jpg cannot be decoded") as caught:
        run(config)
    assert "Repair or remove it, or set data.undecodable: skip." in str(caught.value)
    assert not (tmp_path / "run/results.json").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_or_is_skipped_and_listed(split, bad, tmp_path, load_tiny):
    words = bad(break_images, split, "data.undecodable=skip")
    results = run(load_tiny(tmp_path, *words, task="detection"))
    assert json.loads((tmp_path / "run/results.json").read_text())["skipped"] == results["skipped"]
    names = ["000002.jpg", "000003.jpg"]
    assert [name in each for name, each in zip(names, results["skipped"], strict=True)] == [
        True
    ] * 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_box_that_is_cut_is_listed(split, bad, tmp_path, load_tiny):
    words = bad(annotated(corners=(5, 6, 80, 30)), split, "data.invalid_boxes=clip")
    (mended,) = run(load_tiny(tmp_path, *words, task="detection"))["mended_boxes"]
    assert "000003.xml object 1 (dog)" in mended
    assert mended.endswith("clipped")


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_of_another_size_than_annotated_is_named(split, bad, tmp_path, load_tiny, refused):
    def resize(devkit):
        Image.new("RGB", (50, 50)).save(devkit / "JPEGImages/000001.jpg")

    what = f"an image of another size than annotated, in {split}"
    message = r"000001.jpg has 50x50 pixels .* says 64x48.*Correct"
    with refused(what, ValueError, match=message):
        run(load_tiny(tmp_path, *bad(resize, split), task="detection"))


@pytest.fixture
def trained(tmp_path, load_tiny):
    """A run's overrides and its metrics."""
    words = from_devkit(write_devkit(tmp_path / "good"), "solver.max_iters=2")
    return words, run(load_tiny(tmp_path, *words, task="detection"))["metrics"]


def test_a_detector_of_other_classes_is_told(trained, tmp_path, load_tiny):
    more = [f"data.{split}.classes={list(CLASSES)}" for split in ("train", "test")]
    config = load_tiny(tmp_path, *trained[0], *more, task="detection")
    with pytest.raises(ValueError, match=r"holds another model .* or one of other classes"):
        evaluate_run(config)


def test_a_run_is_measured_again_under_another_protocol(trained, tmp_path, load_tiny):
    words, metrics = trained
    same = evaluate_run(load_tiny(tmp_path, *words, task="detection"))
    assert same == metrics
    config = load_tiny(tmp_path, *words, "evaluation.protocol=detectron2", task="detection")
    assert evaluate_run(config).keys() == metrics.keys()
    told = json.loads((tmp_path / "run/evaluation.json").read_text())["details"]["protocol"]
    assert told.startswith("VOC AP (detectron2), equal to detectron2's pascal_voc_evaluation")
