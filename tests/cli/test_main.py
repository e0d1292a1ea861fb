"""Every command runs as its user runs it."""

import json
import logging
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

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


def lines_of(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("name", TOOLS)
def test_a_command_explains_itself_at_once(name, tool):
    """Without torch and the packages of configs."""
    said = tool(name, "--help", launcher=["-X", "importtime"])
    assert said.returncode == 0, said.stderr
    assert f"python tools/{name}" in said.stdout
    imported = {line.rpartition("|")[2].strip() for line in said.stderr.splitlines()}
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
    """The command line of a tiny pre-training, its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("tools") / "run"
    words = ("--config-file", "configs/quickstart/pretrain.yaml", f"output_dir={folder}", *QUICK)
    return words, folder, tool("train_net.py", *words)


def test_train_net_trains(trained):
    _, folder, said = trained
    assert said.returncode == 0, said.stderr
    assert said.stdout.split() == [str(folder / "results.json")]
    assert "iter 4/4" in said.stderr
    assert json.loads((folder / "results.json").read_text())["iterations"] == 4


def test_eval_only_repeats_the_metrics(trained, call):
    words, folder, _ = trained
    said = call("train_net.py", *words, "--eval-only")
    assert said.returncode == 0, said.stderr
    results = json.loads((folder / "results.json").read_text())
    shown = dict(line.split() for line in said.stdout.splitlines())
    metrics = results["metrics"]
    assert shown == {name: f"{metrics[name]:.2%}" for name in metrics if name != "loss"} | {
        "loss": f"{metrics['loss']:.4f}"
    }


def test_a_finished_run_is_resumed_only_when_asked(trained, call):
    words, folder, _ = trained
    before = len(lines_of(folder))
    again = call("train_net.py", *words[:2], "--resume", *words[2:])
    assert again.returncode == 0, again.stderr
    assert len(lines_of(folder)) == before
    refused = call("train_net.py", *words)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "--resume" in refused.stderr


def test_a_dry_run_prints_the_costs_and_writes_nothing(trained, call, tmp_path):
    words, _, _ = trained
    said = call("train_net.py", *words, f"output_dir={tmp_path / 'none'}", "--dry-run")
    assert said.returncode == 0, said.stderr
    for what in ("parameters", "FLOPs", "peak memory", "a step", "the whole run"):
        assert what in said.stdout
    assert not (tmp_path / "none").exists()
    stages = [said.stderr.index(f"Reading data.{split}") for split in ("train", "test")]
    assert stages == sorted(stages)


SUITE = """\
output_dir: {folder}/suite
title: tiny
baseline: vanilla
seeds: [0]
methods:
  vanilla: {{}}
  tract: {{pretrain: {{tract.enabled: true}}}}
pretrain: classification.yaml
tasks: {{probe: probe.yaml}}
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory, write_tiny, call):
    """The folder of a tiny suite, its command line and what it printed."""
    folder = tmp_path_factory.mktemp("suite")
    write_tiny(folder)
    text = write_tiny(folder, "probe").read_text()
    backbone = "  backbone: {name: cifar/resnet18, args: {width: 8}}\n"
    (folder / "probe.yaml").write_text(text.replace(backbone, "  weights: none\n"))
    (folder / "suite.yaml").write_text(SUITE.format(folder=folder))
    words = ("run_suite.py", "--config-file", folder / "suite.yaml")
    return folder, words, call(*words)


def metrics_of(folder):
    return {
        str(path.relative_to(folder)): json.loads(path.read_text())["metrics"]
        for path in sorted(folder.rglob("results.json"))
    }


def test_a_suite_runs_and_reports(suite):
    folder, _, said = suite
    assert said.returncode == 0, said.stderr
    assert list(metrics_of(folder / "suite")) == [
        f"{method}/{task}/seed0/results.json"
        for method in ("tract", "vanilla")
        for task in ("pretrain", "probe")
    ]
    results = json.loads((folder / "suite/tract/probe/seed0/results.json").read_text())
    assert (results["method"], results["name"], results["role"]) == ("tract", "probe", "downstream")
    assert "[4/4] seed 0  probe" in said.stderr
    report = folder / "suite/report.html"
    assert said.stdout.splitlines()[-1] == str(report)
    for suffix in (".html", ".md", ".tex", ".json"):
        text = report.with_suffix(suffix).read_text()
        assert "tiny" in text or suffix == ".tex"
        assert "probe" in text


def test_a_finished_suite_runs_nothing_again(suite, call):
    folder, words, first = suite
    before = metrics_of(folder / "suite")
    again = call(*words)
    assert again.returncode == 0, again.stderr
    assert metrics_of(folder / "suite") == before
    assert again.stdout == first.stdout


def test_a_failed_run_stops_only_those_that_need_it(suite, call, tmp_path):
    """One method's pre-training diverges: its probe does not start, the other method runs."""
    folder, words, _ = suite
    for name in ("pretrain", "probe"):  # the baseline's runs are those of the first suite
        shutil.copytree(folder / f"suite/vanilla/{name}", tmp_path / f"vanilla/{name}")
    diverges = ("methods.tract.pretrain={solver.lr: 1e30}", "retries=0")
    said = call(*words, f"output_dir={tmp_path}", *diverges)
    assert said.returncode == 1
    assert "failed: NonFiniteError: " in said.stderr
    assert "Traceback" not in said.stderr
    assert list(metrics_of(tmp_path)) == [
        f"vanilla/{task}/seed0/results.json" for task in ("pretrain", "probe")
    ]
    assert (tmp_path / "report.html").is_file()
    runs = json.loads((tmp_path / "suite.json").read_text())["runs"]
    assert [(run["method"], run["state"]) for run in runs] == [
        ("vanilla", "finished"), ("tract", "failed"), ("vanilla", "finished"), ("tract", "blocked"),
    ]  # fmt: skip


def test_a_suite_prints_its_own_lines_and_each_warning_once():
    """Runs share data, and so its problems."""
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
    said = call("report.py", *folders, "--output", tmp_path / "report.html", "--title", "Again?")
    assert said.returncode == 0, said.stderr
    assert "Again?" in (tmp_path / "report.html").read_text()
    assert "probe" in said.stdout
    assert said.stdout.splitlines()[-1] == str(tmp_path / "report.html")
