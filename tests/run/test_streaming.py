"""Training and evaluating from streams: exact resume, complete reports."""

import pytest
from run_folders import assert_resumes_exactly
from stream_rows import make_rows

from tract_transfer.run.check_data import check_data
from tract_transfer.run.evaluate import preview
from tract_transfer.run.run import run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two parquet shards of train and one of test, in row groups of 10."""
    folder = tmp_path_factory.mktemp("shards")
    sizes = {"train-00000-of-00002": 50, "train-00001-of-00002": 30, "test": 20}
    for number, (name, size) in enumerate(sizes.items()):
        rows = make_rows(size, first=60 * number)
        rows.to_parquet(folder / f"{name}.parquet", batch_size=10)
    return folder


@pytest.fixture
def load(tmp_path, load_tiny, shards):
    """Load a tiny config whose splits stream."""

    def streamed(*words, name="run"):
        source = f"source: huggingface, path: {shards}, streaming: true"
        splits = [f"data.{split}={{{source}, split: {split}}}" for split in ("train", "test")]
        return load_tiny(tmp_path, *splits, f"output_dir={tmp_path / name}", *words)

    return streamed


@pytest.mark.parametrize(("killed_at", "num_workers"), [(1, 0), (4, 1)])
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
    assert report.splits["test"].statistics["classes"]["cat"] == {"images": 7}
