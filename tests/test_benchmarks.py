"""Every benchmark explains itself, and those that are fast enough run."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


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
    spec = importlib.util.spec_from_file_location("memory", BENCHMARKS / "memory.py")
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    folder = tmp_path_factory.mktemp("images")
    memory.write_parquet(folder / "train.parquet", 256)
    memory.write_parquet(folder / "test.parquet", 100)
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


def test_variants_without_data_name_the_option(call, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("tract_variants.py", "--data", tmp_path / "none")
    assert "Set --data" in capsys.readouterr().err


@pytest.mark.slow
def test_the_memory_of_a_stream_is_measured_over_a_training(call):
    said = call("streaming_memory.py", "--rows", 300, "--iters", 40)
    (row,) = table(said.out)
    assert row[0] == "300"
    fifths = [float(part) for part in row[2].split(",")]
    assert len(fifths) == 5
    assert 100 < fifths[-1] < float(row[3])  # torch alone; libraries are resident too


def test_fine_tunings_are_measured_by_the_same_clock(images):
    spec = importlib.util.spec_from_file_location("speed", BENCHMARKS / "finetune_speed.py")
    speed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(speed)
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


def test_fine_tuning_speed_without_data_names_the_option(call, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("finetune_speed.py", "--data", tmp_path / "none")
    assert "Set --data" in capsys.readouterr().err
