"""Every command runs as a user runs it."""

import json
import logging
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
from tiny_configs import SUITE

from tract_transfer.cli.main import COMMANDS, main
from tract_transfer.cli.suite import make_filter

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
QUICK = (
    "model.backbone={name: cifar/resnet18, args: {width: 8}}",
    "data.train.classes=[0, 1]",
    "data.test.classes=[0, 1]",
    "data.transforms={size_px: 16, crop: none, pad_px: null}",
    "data.batch_size=32",
    "data.num_workers=0",
    "solver.max_epochs=null",
    "solver.max_iters=4",
    "engine={device: cpu, log: {every_iters: 2, tensorboard: false}}",
)


@pytest.mark.parametrize("name", TOOLS)
def test_help_imports_neither_torch_nor_pydantic(name, tool):
    done = tool(name, "--help", launcher=["-X", "importtime"])
    assert done.returncode == 0, done.stderr
    assert f"python tools/{name}" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert imported & {"torch", "pydantic", "yaml", "numpy"} == set()


def test_the_dispatcher_runs_every_command(monkeypatch, capsys):
    assert len(COMMANDS) == len(TOOLS)
    for name, (module, function) in COMMANDS.items():
        command = getattr(import_module(f"tract_transfer.cli.{module}"), function)
        assert hasattr(command, "__wrapped__"), "by reports_errors"
        monkeypatch.setattr(sys, "argv", ["main.py", name, "--help"])
        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().out.startswith(f"usage: tract_transfer {name} ")
    monkeypatch.setattr(sys, "argv", ["main.py", "trian"])
    with pytest.raises(SystemExit):
        main()
    assert "invalid choice: 'trian'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tool):
    """The command line of a tiny pre-training, its folder and its output."""
    folder = tmp_path_factory.mktemp("tools") / "run"
    words = ("--config-file", "configs/quickstart/pretrain.yaml", f"output_dir={folder}", *QUICK)
    return words, folder, tool("train_net.py", *words)


def test_train_net_trains(trained):
    _, folder, done = trained
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / "results.json")]
    assert "iter 4/4" in done.stderr
    assert json.loads((folder / "results.json").read_text())["iterations"] == 4


def test_eval_only_repeats_the_metrics(trained, call):
    words, folder, _ = trained
    done = call("train_net.py", *words, "--eval-only")
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text())
    shown = dict(line.split() for line in done.stdout.splitlines())
    metrics = results["metrics"]
    assert shown == {name: f"{metrics[name]:.2%}" for name in metrics if name != "loss"} | {
        "loss": f"{metrics['loss']:.4f}"
    }


def test_a_finished_run_is_resumed_only_when_asked(trained, call):
    words, folder, _ = trained
    before = (folder / "metrics.jsonl").read_bytes()
    again = call("train_net.py", *words[:2], "--resume", *words[2:])
    assert again.returncode == 0, again.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before
    refused = call("train_net.py", *words)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "--resume" in refused.stderr


def test_a_dry_run_prints_the_costs_and_writes_nothing(trained, call, tmp_path):
    words, _, _ = trained
    done = call("train_net.py", *words, f"output_dir={tmp_path / 'none'}", "--dry-run")
    assert done.returncode == 0, done.stderr
    for what in ("parameters", "FLOPs", "peak memory", "a step", "the whole run"):
        assert what in done.stdout
    assert not (tmp_path / "none").exists()
    stages = [done.stderr.index(f"Reading data.{split}") for split in ("train", "test")]
    assert stages == sorted(stages)


@pytest.fixture(scope="module")
def suite(tmp_path_factory, write_tiny, call):
    """The folder of a tiny suite, its command line and its output."""
    folder = tmp_path_factory.mktemp("suite")
    write_tiny(folder)
    text = write_tiny(folder, "probe").read_text()
    backbone = "  backbone: {name: cifar/resnet18, args: {width: 8}}\n"
    (folder / "probe.yaml").write_text(text.replace(backbone, "  weights: none\n"))
    (folder / "suite.yaml").write_text("title: tiny\n" + SUITE.format(output_dir=folder / "suite"))
    words = ("run_suite.py", "--config-file", folder / "suite.yaml")
    return folder, words, call(*words)


@pytest.mark.slow
def test_a_suite_runs_once_and_reports(suite, call):
    folder, words, done = suite
    assert done.returncode == 0, done.stderr
    results = sorted((folder / "suite").rglob("results.json"))
    assert [str(path.relative_to(folder / "suite")) for path in results] == [
        f"{method}/{task}/seed0/results.json"
        for method in ("tract", "vanilla")
        for task in ("pretrain", "probe")
    ]
    of_probe = json.loads(results[1].read_text())
    labels = [of_probe[key] for key in ("method", "name", "role")]
    assert labels == ["tract", "probe", "downstream"]
    assert "[4/4] seed 0  probe" in done.stderr
    report = folder / "suite/report.html"
    assert done.stdout.splitlines()[-1] == str(report)
    for suffix in (".html", ".md", ".tex", ".json"):
        text = report.with_suffix(suffix).read_text()
        assert "tiny" in text or suffix == ".tex"
        assert "probe" in text
    times = [path.stat().st_mtime_ns for path in results]
    again = call(*words)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert [path.stat().st_mtime_ns for path in results] == times


def test_a_suite_with_a_failed_run_exits_with_1(suite, call, tmp_path):
    folder, words, _ = suite
    for name in ("pretrain", "probe"):  # the runs of the baseline
        shutil.copytree(folder / f"suite/vanilla/{name}", tmp_path / f"vanilla/{name}")
    diverges = ("methods.tract.pretrain={solver.lr: 1e30}", "retries=0")
    done = call(*words, f"output_dir={tmp_path}", *diverges)
    assert done.returncode == 1
    assert "failed: NonFiniteError: " in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "report.html").is_file()
    runs = json.loads((tmp_path / "suite.json").read_text())["runs"]
    states = [(run["method"], run["state"]) for run in runs]
    assert states[1::2] == [("tract", "failed"), ("tract", "blocked")]


def test_a_suite_prints_its_own_lines_and_each_warning_once():
    """Runs share data, and so its warnings."""
    shown = make_filter()

    def show(name, level, text):
        return shown(logging.LogRecord(name, level, "", 0, text, (), None))

    data, own = "tract_transfer.build.data", "tract_transfer.suite.execute"
    assert show(data, logging.WARNING, "no cat")
    assert not show(data, logging.WARNING, "no cat")
    assert show(data, logging.WARNING, "no dog")
    assert not show(data, logging.INFO, "loaded")
    assert [show(own, logging.INFO, "moved") for _ in range(2)] == [True, True]


def test_a_report_is_written_from_run_folders(suite, call, tmp_path):
    folder, _, _ = suite
    folders = sorted((folder / "suite").glob("*/*/seed0"))
    done = call("report.py", *folders, "--output", tmp_path / "report.html", "--title", "Again?")
    assert done.returncode == 0, done.stderr
    assert "Again?" in (tmp_path / "report.html").read_text()
    assert "probe" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "report.html")
