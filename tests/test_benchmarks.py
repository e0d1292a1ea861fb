"""Every benchmark explains itself, and those that are fast enough run."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

from tract_transfer.config.schema import load_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# In place of a training: holds 10 MiB more at each line of its log.
GROWS = """
import json, sys, time
from pathlib import Path
held, folder = [], Path(sys.argv[2]).parent / "run"
folder.mkdir()
with (folder / "metrics.jsonl").open("w", buffering=1) as log:
    for iteration in (*range(10, 60, 10), 50):
        held.append(b"x" * (10 << 20))
        log.write(json.dumps({"iteration": iteration}) + "\\n")
        time.sleep(0.2)
"""


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a benchmark as a script in this process; return its output."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        monkeypatch.syspath_prepend(BENCHMARKS)  # as for a script
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return capsys.readouterr()

    return run


def table(text):
    """The cells of a Markdown table's rows, without its two heading lines."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("name", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_explains_itself(name, call, capsys):
    with pytest.raises(SystemExit) as end:
        call(name, "--help")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")
    assert f"python benchmarks/{name}" in (BENCHMARKS / name).read_text()
    assert f"`{name}`" in (BENCHMARKS / "README.md").read_text()


def test_tracts_overhead_is_a_ratio_to_the_plain_step(call):
    tiny = ("--cases", "resnet18", "--batch_size", 2, "--steps", 3, "--no_peaks")
    said = call("tract_overhead.py", *tiny)
    rows = table(said.out)
    assert [row[1] for row in rows] == ["fp32", "bf16"]
    for row in rows:
        low, high = map(float, row[5].split("[")[1].strip("]").split(","))
        assert 0 < low <= float(row[5].split()[0]) <= high
        assert float(row[7].strip("%")) > 0


def test_a_memory_peak_is_what_torch_allocated(call):
    tiny = ("--cases", "resnet18", "--precisions", "fp32", "--batch_size", 2)
    plain = float(call("tract_overhead.py", *tiny, "--peak_of", "plain").out)
    weights_mib = 11.2e6 * 4 / 2**20  # a ResNet-18; gradients and momentum have the same size
    assert 3 * weights_mib < plain < 5 * weights_mib
    ours = float(call("tract_overhead.py", *tiny, "--peak_of", "ours").out)
    assert plain <= ours < 1.02 * plain


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Random images of ten classes in the layout of CIFAR-10."""
    folder = tmp_path_factory.mktemp("images")
    write_parquet = load("memory").write_parquet
    write_parquet(folder / "train.parquet", 256)
    write_parquet(folder / "test.parquet", 100)
    return folder


def test_variants_are_paired_with_plain_training_and_runs_are_reused(call, images, tmp_path):
    words = ("--data", images, "--quick", "--variants", "layers", "--output", tmp_path / "runs")
    said = call("tract_variants.py", *words)
    rows = table(said.out)
    plain = float(rows[0][1])
    assert len(rows) == 3
    for row in rows[1:]:
        assert float(row[2]) == pytest.approx(float(row[1]) - plain, abs=0.101)
    assert said.err.count("seed 0") == 3
    again = call("tract_variants.py", *words)
    assert again.out == said.out
    assert "seed 0" not in again.err


@pytest.mark.parametrize("name", ["tract_variants.py", "finetune_speed.py"])
def test_a_benchmark_without_data_names_the_option(name, call, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(name, "--data", tmp_path / "none")
    assert "Set --data" in capsys.readouterr().err


def test_the_memory_of_a_stream_is_measured_over_a_training(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    streaming = load("streaming_memory")
    (tmp_path / "config.yaml").write_text(
        streaming.CONFIG.format(folder=tmp_path, workers=0, iters=50)
    )
    assert load_config(tmp_path / "config.yaml").data.train.streaming
    (tmp_path / "train.py").write_text(GROWS)
    monkeypatch.setattr(streaming, "TRAIN", tmp_path / "train.py")
    resident_kib, samples = streaming.watch(tmp_path)
    fifths = streaming.curve(samples, 50)
    assert fifths == sorted(fifths)
    assert fifths[-1] - fifths[1] == pytest.approx(30, abs=11)  # a sample may come a step late
    assert fifths[-1] < resident_kib / 1024 < 200  # libraries are resident too, but no torch


def test_fine_tunings_are_measured_by_the_same_clock(images):
    speed = load("finetune_speed")
    backbone = {"name": "cifar/resnet18", "args": {"width": 4}}
    setup = speed.Setup(
        data=images, label="label", backbone=backbone, batch_size=32, iters=3, skipped=1,
        precision="fp32", cache="device",
    )  # fmt: skip
    clock = speed.Clock(setup)
    clock._marks = {1: 10.0, 3: 12.0}
    assert clock.images_per_second() == 32
    assert speed.ours(setup, 0) > 0
    assert speed.timm_loop(setup, 0) > 0
