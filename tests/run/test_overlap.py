"""Training images that are in the reported split too are counted by the hash of their bytes."""

import json

import pytest
from stream_rows import huggingface, picture, write_splits

from tract_transfer.build.data import build_data
from tract_transfer.engine.trainer import Trainer
from tract_transfer.run import results
from tract_transfer.run.results import find_overlap
from tract_transfer.run.run import run

SHADES = {"train": [0, 10, 20, 30, 40, 50], "test": [20, 100, 50, 110]}


def words(root):
    return huggingface(root, "data.batch_size=2", "solver.max_iters=2")


@pytest.fixture
def root(tmp_path, offline_cache):
    """An image folder: two of the six training images are test images with other names."""
    for split, shades in SHADES.items():
        for number, shade in enumerate(shades):
            folder = tmp_path / "pets" / split / ("cat" if number % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            picture(shade).save(folder / f"{split}{number}.png")
    return tmp_path / "pets"


def test_overlap_is_reported_before_training(tmp_path, root, load_tiny, caplog, monkeypatch):
    warned = []
    step = Trainer.step

    def record(*args):
        warned.append("2 of the 6 images of train are in test too" in caplog.text)
        step(*args)

    monkeypatch.setattr(Trainer, "step", record)
    leaks = run(load_tiny(tmp_path, *words(root)))["leaks"]
    assert warned == [True, True]
    assert json.loads((tmp_path / "run/results.json").read_text())["leaks"] == leaks
    assert leaks["train"]["images_in_test"] == 2
    for train, test in leaks["train"]["first"]:
        assert "split train row" in train
        assert "split test row" in test


def test_images_held_out_for_selection_are_compared(tmp_path, root, load_tiny):
    more = ["data.val={source: train, fraction: 0.34}"]
    overlap = find_overlap(build_data(load_tiny(tmp_path, *words(root), *more)))
    assert sum(overlap[name]["images_in_test"] for name in ("train", "val")) == 2


def test_without_a_test_split_val_is_compared(tmp_path, root, load_tiny):
    train, test, *rest = words(root)
    more = [test.replace("data.test", "data.val"), "data.test=null"]
    overlap = find_overlap(build_data(load_tiny(tmp_path, train, *rest, *more)))
    assert overlap.keys() == {"train"}
    assert overlap["train"]["images_in_val"] == 2


def test_too_many_images_and_streams_are_not_compared(
    tmp_path, root, load_tiny, monkeypatch, caplog
):
    caplog.set_level("INFO")
    data = build_data(load_tiny(tmp_path, *words(root)))
    size = sum(file.stat().st_size for file in root.rglob("*.png"))
    for limits, is_compared in (((9, size), False), ((10, size - 1), False), ((10, size), True)):
        monkeypatch.setattr(results, "MAX_COMPARED_IMAGES", limits[0])
        monkeypatch.setattr(results, "MAX_COMPARED_BYTES", limits[1])
        assert (find_overlap(data) is not None) == is_compared
    assert "is not checked: too many images. tract-transfer check-data checks it" in caplog.text
    (tmp_path / "parquet").mkdir()
    streamed = words(write_splits(tmp_path / "parquet"))
    assert (
        find_overlap(build_data(load_tiny(tmp_path, *streamed, "data.train.streaming=true")))
        is None
    )
