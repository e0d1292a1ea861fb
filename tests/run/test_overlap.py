"""Training images that are reported on too are counted by the hash of their bytes, and told."""

import json

import datasets
import pytest
from PIL import Image

from tract_transfer.build.data import build_data
from tract_transfer.engine.trainer import Trainer
from tract_transfer.run import results
from tract_transfer.run.results import find_overlap
from tract_transfer.run.run import run

SHADES = {"train": [0, 10, 20, 30, 40, 50], "test": [20, 100, 50, 110]}


def write_folders(root):
    """An image folder; two of the six training images are test images, under other names."""
    for split, shades in SHADES.items():
        for number, shade in enumerate(shades):
            place = root / split / ("cat" if number % 2 else "dog")
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (shade, shade, shade)).save(place / f"{split}{number}.png")
    return root


def words(root):
    splits = [
        f"data.{split}={{source: huggingface, path: {root}, split: {split}}}" for split in SHADES
    ]
    return [*splits, "data.batch_size=2", "solver.max_iters=2"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def test_training_images_in_test_are_told_before_training(tmp_path, load_tiny, caplog, monkeypatch):
    told = []
    step = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda *args: (told.append("are in test too" in caplog.text), step(*args))
    )
    results = run(load_tiny(tmp_path, *words(write_folders(tmp_path / "pets"))))
    assert told == [True, True]
    saved = json.loads((tmp_path / "run/results.json").read_text())["leaks"]
    assert saved == results["leaks"]
    assert saved["train"]["images_in_test"] == 2
    pairs = {tuple(item.rpartition("/")[2] for item in pair) for pair in saved["train"]["first"]}
    items = {item for pair in saved["train"]["first"] for item in pair}
    assert len(pairs) == 2
    assert all("split train row" in item or "split test row" in item for item in items)
    assert "2 of the 6 images of train are in test too" in caplog.text


def test_what_is_carved_for_selection_is_compared_too(tmp_path, load_tiny):
    more = ["data.val={source: train, fraction: 0.34}"]
    data = build_data(load_tiny(tmp_path, *words(write_folders(tmp_path / "pets")), *more))
    found = find_overlap(data)
    assert sum(found[name]["images_in_test"] for name in ("train", "val")) == 2


def test_without_a_test_split_the_reported_one_is_val(tmp_path, load_tiny):
    train, test, *rest = words(write_folders(tmp_path / "pets"))
    more = [test.replace("data.test", "data.val"), "data.test=null"]
    found = find_overlap(build_data(load_tiny(tmp_path, train, *rest, *more)))
    assert found.keys() == {"train"}
    assert found["train"]["images_in_val"] == 2


def test_too_many_images_and_streams_are_not_looked_through_and_that_is_told(
    tmp_path, load_tiny, monkeypatch, caplog
):
    caplog.set_level("INFO")
    root = write_folders(tmp_path / "pets")
    monkeypatch.setattr(results, "MAX_COMPARED_IMAGES", 9)
    assert find_overlap(build_data(load_tiny(tmp_path, *words(root)))) is None
    assert (
        "Train/test overlap is not checked: too many images. tools/check_data.py checks it"
        in caplog.text
    )
    monkeypatch.setattr(results, "MAX_COMPARED_IMAGES", 10)
    size = sum(file.stat().st_size for file in root.rglob("*.png"))
    monkeypatch.setattr(results, "MAX_COMPARED_BYTES", size - 1)
    assert find_overlap(build_data(load_tiny(tmp_path, *words(root)))) is None
    monkeypatch.setattr(results, "MAX_COMPARED_BYTES", size)
    assert find_overlap(build_data(load_tiny(tmp_path, *words(root)))) is not None
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    for split, shades in SHADES.items():
        rows = {
            "image": [Image.new("RGB", (8, 8), (shade,) * 3) for shade in shades],
            "label": [number % 2 for number in range(len(shades))],
        }
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(tmp_path / f"parquet/{split}.parquet")
    streamed = [*words(tmp_path / "parquet"), "data.train.streaming=true"]
    assert find_overlap(build_data(load_tiny(tmp_path, *streamed))) is None
