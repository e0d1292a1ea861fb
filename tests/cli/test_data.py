"""check_data.py lists everything broken; visualize_data.py draws the images of the training."""

import json
from itertools import islice

import datasets
import numpy as np
import pytest
from box_data import write_coco, write_voc
from PIL import Image

from tract_transfer.build.batches import build_train_batches
from tract_transfer.build.data import build_data
from tract_transfer.cli.data import samples
from tract_transfer.config.schema import load_config


@pytest.fixture
def check(call, offline_cache, tmp_path):
    """Run check_data.py; return its exit code, its output and its report."""

    def run(config_file, *overrides):
        path = tmp_path / "report.json"
        done = call("check_data.py", "--config-file", config_file, "--json", path, *overrides)
        report = json.loads(path.read_text()) if path.exists() else None
        return done.returncode, done.stdout + done.stderr, report

    return run


OBJECTS = [("dog", (4, 5, 14, 25))]


@pytest.fixture
def boxes(write_tiny, tmp_path):
    """The words of a detection config whose train is a VOC devkit and whose test is a COCO file."""
    write_voc(tmp_path / "voc", OBJECTS)
    write_coco(tmp_path / "coco", OBJECTS)
    for index in range(3):  # other pictures than train's
        Image.new("RGB", (40, 30), (9, 9, 60 * index)).save(tmp_path / f"coco/images/{index}.png")
    coco = f"images: {tmp_path / 'coco/images'}, annotations: {tmp_path / 'coco/boxes.json'}"
    voc = f"root: {tmp_path / 'voc'}, sets: [2007/train], classes: [cat, dog]"
    train, test = f"data.train={{source: voc, {voc}}}", f"data.test={{source: coco, {coco}}}"
    return write_tiny(tmp_path, "detection"), train, test


def test_clean_data_exit_with_0(check, boxes):
    code, text, report = check(*boxes)
    assert code == 0, text
    assert report["is_clean"]
    assert report["splits"]["train"]["statistics"]["classes"]["dog"] == {"images": 2, "objects": 2}
    assert "0 problems" in text
    assert "images 2, objects 2" in text
    assert "train has no example of 1 of 2 classes: cat" in report["warnings"]


def test_everything_broken_is_listed_at_once(check, boxes, tmp_path):
    devkit = tmp_path / "voc/VOC2007"
    (devkit / "Annotations/0.xml").write_text("<annotation>")
    (devkit / "JPEGImages/1.jpg").write_bytes(b"none")
    (tmp_path / "coco/images/2.png").unlink()
    annotations = tmp_path / "coco/boxes.json"
    annotations.write_text(annotations.read_text().replace("[0, 0, 40, 30]", "[0, 0, 90, 30]"))
    skipping = ("data.undecodable=skip", "data.invalid_boxes=clip")  # a run would, the check not
    code, text, report = check(*boxes, *skipping)
    assert code == 1
    expected = {"train": ["0.xml", "1.jpg"], "test": ["2.png does not exist", "[0, 0, 90, 30]"]}
    for split, parts in expected.items():
        problems = report["splits"][split]["problems"]
        for part, problem in zip(parts, problems, strict=True):
            assert part in problem
            assert problem in text
    assert "4 problems" in text


def test_a_split_that_does_not_load_does_not_hide_the_others(check, boxes, tmp_path):
    (tmp_path / "coco/boxes.json").write_text("{")
    code, text, report = check(*boxes)
    assert code == 1
    assert "not a readable json file" in text
    assert report["splits"]["test"]["statistics"] is None
    assert report["splits"]["train"]["problems"] == []


def test_equal_images_and_exif_orientations_are_warnings(check, boxes, tmp_path):
    copy = tmp_path / "coco/images/0.png"
    images = tmp_path / "voc/VOC2007/JPEGImages"
    with Image.open(images / "1.jpg") as image:
        image.save(copy)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (40, 30), (9, 9, 200)).save(images / "0.jpg", exif=exif)
    code, text, report = check(*boxes)
    assert code == 0, text
    (same,) = [warning for warning in report["warnings"] if "shows the same" in warning]
    (turned,) = [warning for warning in report["warnings"] if "EXIF orientation 3" in warning]
    assert str(copy) in same
    assert "1.jpg" in same
    assert turned.startswith(f"train: {images / '0.jpg'}")
    assert turned in text


def test_classes_that_differ_between_splits_are_broken(check, boxes):
    code, text, report = check(*boxes, "data.test.classes=[dog, cat]")
    assert code == 1
    assert "same classes in the same order" in report["problems"][0]
    assert report["problems"][0] in text


def test_every_unlabelled_row_is_listed(check, write_tiny, tmp_path):
    columns = {
        "image": [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(4)],
        "label": [0, -1, 1, 5],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict(columns, features=features)
    features["label"] = datasets.ClassLabel(names=["a", "b"])
    table = rows.data.table.cast(features.arrow_schema)
    datasets.Dataset(table).to_parquet(tmp_path / "train.parquet")
    source = f"{{source: huggingface, path: {tmp_path / 'train.parquet'}, split: train}}"
    overrides = (f"data.train={source}", "data.test={source: digits, split: test}")
    code, _, report = check(write_tiny(tmp_path), *overrides)
    assert code == 1
    problems = report["splits"]["train"]["problems"]
    assert ["row 1: label -1" in problems[0], "row 3: label 5" in problems[1]] == [True, True]
    assert report["splits"]["train"]["statistics"]["images"] == 2


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("task", ["classification", "detection", "probe"])
def test_the_grid_depends_on_config_and_seed_alone(call, write_tiny, tmp_path, task):
    path = write_tiny(tmp_path, task)
    drawn = []
    for name, more in (("a", ()), ("b", ()), ("c", ("seed=1",))):
        words = ("--config-file", path, "--num-images", 3, "--output", tmp_path / f"{name}.png")
        done = call("visualize_data.py", *words, *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(tmp_path / f"{name}.png")]
        drawn.append(pixels(tmp_path / f"{name}.png"))
    assert np.array_equal(drawn[0], drawn[1])
    assert drawn[0].std() > 10
    assert np.array_equal(drawn[0], drawn[2]) == (task == "probe")


def test_images_are_those_of_the_training_from_start_iter_on(write_tiny, tmp_path):
    config = load_config(write_tiny(tmp_path, "detection"), ["engine.accumulate=2"])
    train = build_data(config).train
    drawn = list(islice(samples(config, train, start_iter=1), 4))
    batches = build_train_batches(config, train)(1)
    expected = [image for _ in range(2) for image in next(batches).images]
    assert len(expected) == 4
    for (image, _, boxes), of_training in zip(drawn, expected, strict=True):
        assert image.equal(of_training)
        assert all(name in train.class_names for _, name, _ in boxes)


def test_images_of_several_labels_are_named_by_all(write_tiny, scenes, tmp_path):
    made = f"root: {scenes}, num_train: 12, num_test: 6, size_px: 64"
    words = [f"data.{s}={{source: digit_scenes, split: {s}, {made}}}" for s in ("train", "test")]
    words.append("evaluation={knn: null, logistic_regression: null, svm: {}, metric: svm_map_area}")
    config = load_config(write_tiny(tmp_path, "probe"), words)
    train = build_data(config).train
    for number, (_, caption, boxes) in enumerate(samples(config, train, start_iter=0)):
        shown = [train.class_names[k] for k in np.flatnonzero(train.marks[number] == 1)]
        assert caption == f"image {number}: {', '.join(shown) or 'none'}, 16 x 16"
        assert boxes == []
