"""Training and evaluating from streams: exact resume, and refusals of what a stream cannot give."""

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
            "image": [Image.fromarray(each) for each in pixels],
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


def test_a_dry_run_and_a_check_of_the_data_take_streams(load):
    assert "peak memory" in preview(load())
    report = check_data(load())
    assert report.is_clean
    assert report.splits["test"].statistics["classes"]["a"] == {"images": 7}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.cache=ram"], r"data.cache: ram keeps all images, and data.train is streamed"),
        (["data.repeats=2"], r"data.repeats: needs random access to data.train"),
        (["data.val={source: train, fraction: 0.1}"], r"data.val: holds out images of data.train"),
        (["model.backbone.stem=whitened"], r"model.backbone.stem: whitened needs a random sample"),
    ],
)
def test_what_needs_all_images_is_refused(load, words, message):
    with pytest.raises(ValueError, match=message):
        build_data(load(*words))


def test_a_probe_does_not_stream(load):
    with pytest.raises(ValueError, match=r"data.train.streaming: a probe needs random access"):
        build_data(load(task="probe"))


@pytest.mark.parametrize("word", ["data.shuffle_rows=10", "data.readers=2"])
def test_options_of_streams_are_refused_elsewhere(load, word):
    with pytest.raises(ValueError, match=r"has no use here: it is for data.train.streaming: true"):
        load("data.train={source: digits, split: train}", word)


def test_the_number_of_classes_is_not_typed_where_labels_are_read(load, shards):
    source = f"source: huggingface, path: {shards}, split: train, num_classes: 3"
    with pytest.raises(ValueError, match=r"num_classes is for streaming: true"):
        load(f"data.train={{{source}}}")
