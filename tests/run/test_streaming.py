"""Training and evaluating from streams: exact resume, and what needs random access."""

import datasets
import numpy as np
import pytest
from PIL import Image
from run_folders import assert_resumes_exactly

from tract_transfer.build.data import build_data
from tract_transfer.run.check_data import check_data
from tract_transfer.run.evaluate import preview
from tract_transfer.run.run import run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two parquet shards of train and one of test, in row groups of 10."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    for name, count in (("train-00000-of-00002", 50), ("train-00001-of-00002", 30), ("test", 20)):
        pixels = random.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        columns = {
            "image": [Image.fromarray(image) for image in pixels],
            "label": [index % 3 for index in range(count)],
        }
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(folder / f"{name}.parquet", batch_size=10)
    return folder


@pytest.fixture
def load(tmp_path, load_tiny, shards):
    """Load a tiny config whose splits stream."""

    def streamed(*words, name="run", task="classification"):
        source = f"source: huggingface, path: {shards}, streaming: true"
        splits = [f"data.{split}={{{source}, split: {split}}}" for split in ("train", "test")]
        return load_tiny(tmp_path, *splits, f"output_dir={tmp_path / name}", *words, task=task)

    return streamed


@pytest.mark.parametrize("killed_at", [1, 4])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_killed_run_resumes_to_the_same_bits(load, kill_at, killed_at, num_workers):
    words = ("data.batch_size=16", "data.shuffle_rows=32", "engine.accumulate=2")
    words += (f"data.num_workers={num_workers}", "engine.checkpoint.every_iters=1")
    words += ("solver.max_iters=null", "solver.max_epochs=1.5")  # 5 iterations an epoch
    whole, killed = load(*words, name="whole"), load(*words, name="killed")
    assert_resumes_exactly(kill_at, killed_at, whole, killed)


def test_a_run_reports_on_all_of_a_streamed_test(load):
    results = run(load("data.num_workers=1"))
    assert results["protocol"]["train"].endswith("80 images, 3 classes")
    assert results["protocol"]["test"].endswith("20 images")
    assert sum(map(sum, results["details"]["confusion_matrix"])) == 20


def test_preview_and_check_data_accept_streams(load):
    assert "peak memory" in preview(load())
    report = check_data(load())
    assert report.is_clean
    assert report.splits["test"].statistics["classes"]["a"] == {"images": 7}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.cache=ram", r"data.cache: ram keeps all images, and data.train is streamed"),
        ("data.repeats=2", r"data.repeats: needs random access to data.train"),
        ("data.val={source: train, fraction: 0.1}", r"data.val: holds out images of data.train"),
        ("model.backbone.stem=whitened", r"model.backbone.stem: whitened needs a random sample"),
        ("probe", r"data.train.streaming: a probe needs random access"),
    ],
)
def test_options_that_need_random_access_are_refused(load, word, message):
    words, task = ([], word) if word == "probe" else ([word], "classification")
    with pytest.raises(ValueError, match=message):
        build_data(load(*words, task=task))
