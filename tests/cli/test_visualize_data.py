"""tools/visualize_data.py draws what the training gets."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tract_transfer.build.batches import build_train_batches
from tract_transfer.build.data import build_data
from tract_transfer.cli import visualize
from tract_transfer.config.schema import load_config

ROOT = Path(__file__).parents[2]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("task", ["classification", "detection", "probe"])
def test_a_grid_is_drawn_and_is_the_same_again(call, write_tiny, tmp_path, task):
    path = write_tiny(tmp_path, task)
    drawn = []
    for name, more in (("a", ()), ("b", ()), ("c", ("seed=1",))):
        words = ("--config-file", path, "--num-images", 3, "--output", tmp_path / f"{name}.png")
        said = call("visualize_data.py", *words, *more)
        assert said.returncode == 0, said.stderr
        assert said.stdout.split() == [str(tmp_path / f"{name}.png")]
        drawn.append(pixels(tmp_path / f"{name}.png"))
    assert np.array_equal(drawn[0], drawn[1])
    assert drawn[0].std() > 10
    assert np.array_equal(drawn[0], drawn[2]) == (task == "probe")


def test_the_images_are_the_trainings_from_an_iteration_on(write_tiny, tmp_path):
    config = load_config(write_tiny(tmp_path, "detection"), ["engine.accumulate=2"])
    train = build_data(config).train
    seen = list(islice(visualize.samples(config, train, start_iter=1), 4))
    make = build_train_batches(config, train, rank=0, world_size=1, pin_memory=False)
    batches = make(1)
    expected = [image for _ in range(2) for image in next(batches).images]
    assert len(expected) == 4
    for (image, _, boxes), wanted in zip(seen, expected, strict=True):
        assert image.equal(wanted)
        assert all(name in train.class_names for _, name, _ in boxes)


def test_images_fewer_than_a_batch_are_drawn(call, write_tiny, tmp_path):
    words = ("--config-file", write_tiny(tmp_path), "--output", tmp_path / "a.png")
    said = call("visualize_data.py", *words, "data.batch_size=99999", "engine.accumulate=3")
    assert said.returncode == 0, said.stderr
    assert pixels(tmp_path / "a.png").std() > 10


def test_images_of_several_labels_are_named_by_all(write_tiny, scenes, tmp_path):
    made = f"root: {scenes}, num_train: 12, num_test: 6, size_px: 64"
    words = [f"data.{s}={{source: digit_scenes, split: {s}, {made}}}" for s in ("train", "test")]
    words.append("evaluation={knn: null, logistic_regression: null, svm: {}, metric: svm_map_area}")
    config = load_config(write_tiny(tmp_path, "probe"), words)
    train = build_data(config).train
    for number, (_, caption, boxes) in enumerate(visualize.samples(config, train, start_iter=0)):
        shown = [train.class_names[k] for k in np.flatnonzero(train.marks[number] == 1)]
        assert caption == f"image {number}: {', '.join(shown) or 'none'}, 16 x 16"
        assert boxes == []


def test_what_cannot_be_drawn_is_told(call, write_tiny, tmp_path):
    said = call(
        "visualize_data.py", "--config-file", write_tiny(tmp_path), "data.train.classes=[10]"
    )
    assert said.returncode == 2
    assert "data.train.classes" in said.stderr
    said = call("visualize_data.py", "--config-file", write_tiny(tmp_path), "--num-images", 0)
    assert said.returncode == 2
