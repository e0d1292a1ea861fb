"""From a config's data section to splits, lengths and results."""

import json

import numpy as np
import pytest
from box_data import write_coco, write_rows, write_voc
from PIL import Image

from tract_transfer.build.batches import build_epoch_order
from tract_transfer.build.data import build_data
from tract_transfer.build.trainer import train_length
from tract_transfer.config.schema import ConfigError
from tract_transfer.run.run import run

OBJECTS = [("dog", (4, 5, 14, 25))]


def sources(folder, train_objects=OBJECTS):
    """Overrides for a train split in COCO's format and a test split of Hugging Face rows."""
    write_coco(folder / "coco", train_objects)
    write_rows(folder / "rows", OBJECTS)
    return (
        f"data.train={{source: coco, images: {folder / 'coco/images'}, "
        f"annotations: {folder / 'coco/boxes.json'}}}",
        f"data.test={{source: huggingface, path: {folder / 'rows/train.parquet'}, split: train, "
        "box_format: xywh, classes: [cat, dog]}",
        "data.batch_size=1",
    )


def test_a_run_mixes_formats_and_reports_clipped_boxes(tmp_path, load_tiny):
    words = sources(tmp_path, [*OBJECTS, ("cat", (20, 5, 60, 9))])
    config = load_tiny(tmp_path, *words, task="detection")
    with pytest.raises(ValueError, match=r"boxes.json annotations\[1\] .*invalid_boxes: clip"):
        run(config)
    more = ("data.invalid_boxes=clip", "solver.max_iters=2", "data.repeat_threshold=0.9")
    results = run(load_tiny(tmp_path, *words, *more, task="detection"))
    (mended,) = json.loads((tmp_path / "run/results.json").read_text())["mended_boxes"]
    assert results["mended_boxes"] == [mended]
    assert "annotations[1] id 101 (cat): the box must lie in the image of 40x30" in mended
    assert "invalid_boxes: clip" in results["protocol"]["sampling"]


def test_empty_images_are_dropped_from_train_alone(tmp_path, load_tiny):
    words = (*sources(tmp_path), "data.empty_images=drop")
    data = build_data(load_tiny(tmp_path, *words, task="detection"))
    assert (len(data.train), len(data.test)) == (2, 3)


def test_classes_must_agree_between_formats(tmp_path, load_tiny):
    words = (*sources(tmp_path), "data.test.classes=[dog, cat]")
    with pytest.raises(ValueError, match="same classes in the same order: class 0 is 'cat' in tr"):
        build_data(load_tiny(tmp_path, *words, task="detection"))


@pytest.fixture
def devkit_words(tmp_path):
    """A devkit of two wide images and a tall one, as train and test."""
    for name in ("train", "test"):
        write_voc(tmp_path / name, OBJECTS)
    Image.new("RGB", (30, 40)).save(tmp_path / "train/VOC2007/JPEGImages/2.jpg")
    tall = "<annotation><size><width>30</width><height>40</height></size></annotation>"
    (tmp_path / "train/VOC2007/Annotations/2.xml").write_text(tall)
    return [
        f"data.{name}={{source: voc, root: {tmp_path / name}, sets: [2007/train], "
        "classes: [cat, dog]}"
        for name in ("train", "test")
    ]


def test_the_length_of_an_epoch_follows_its_sampling(tmp_path, load_tiny, devkit_words):
    def length(*more):
        words = (*devkit_words, "solver.max_iters=null", "solver.max_epochs=10", *more)
        config = load_tiny(tmp_path, *words, task="detection")
        train = build_data(config).train
        order = build_epoch_order(config, train)
        found = train_length(config, train)
        assert found.iters_per_epoch == order.iters_per_epoch
        assert found.max_iters == 10 * order.iters_per_epoch
        return order.iters_per_epoch

    assert length("data.batch_size=1") == 3
    assert length("data.batch_size=2") == 1
    # dog is in 2 of 3 images: sqrt(1 / (2 / 3)) = 1.22, twice, and 1
    assert length("data.batch_size=1", "data.repeat_threshold=1.0") == round(1 + 2 * np.sqrt(1.5))
    assert length("data.batch_size=1", "data.group_by_aspect=true") == 3
    words = (*devkit_words, "data.batch_size=2", "data.group_by_aspect=true")
    config = load_tiny(tmp_path, *words, task="detection")
    with pytest.raises(ConfigError, match=r"data.group_by_aspect: needs a batch of each shape"):
        train_length(config, build_data(config).train)
