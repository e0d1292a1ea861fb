"""Every command runs as a user runs it."""

import json
import logging
import re
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest
from tiny_configs import SUITE

from tract_transfer.cli import train
from tract_transfer.cli.main import COMMANDS, main
from tract_transfer.cli.suite import make_filter

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("name", TOOLS)
def test_help_imports_neither_torch_nor_pydantic(name, tool):
    done = tool(name, "--help", launcher=["-X", "importtime"])
    assert done.returncode == 0, done.stderr
    assert "tract-transfer" in done.stdout, "an example"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert imported & {"torch", "pydantic", "yaml", "numpy"} == set()


def test_the_dispatcher_runs_every_command(monkeypatch, capsys):
    for name, (module, function, _) in COMMANDS.items():
        command = getattr(import_module(f"tract_transfer.cli.{module}"), function)
        assert hasattr(command, "__wrapped__"), "by reports_errors"
        monkeypatch.setattr(sys, "argv", ["tract-transfer", name, "--help"])
        with pytest.raises(SystemExit):
            main()
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: tract-transfer {name} ")
        assert f"\ntract-transfer {name} " in shown, "an example"


def test_the_command_lists_what_it_can_do_and_names_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tract-transfer"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in COMMANDS)
    monkeypatch.setattr(sys, "argv", ["tract-transfer", "trian"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "there is no command 'trian'; did you mean 'train'?" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_tiny, call):
    """The command line of a tiny pre-training, its folder and its output."""
    folder = tmp_path_factory.mktemp("tools")
    words = ("--config-file", write_tiny(folder))
    return words, folder / "run", call("train_net.py", *words)


def test_train_net_trains(trained):
    _, folder, done = trained
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / "results.json")]
    assert "iter 6/6" in done.stderr
    results = json.loads((folder / "results.json").read_text())
    assert results["iterations"] == 6
    shown = dict(re.findall(r"^ *(\S.*?\S)  (.+)$", done.stderr, re.M))
    assert shown["output"] == str(folder)
    assert shown["TrAct"] == "off"
    value = results["metrics"][results["primary_metric"]]
    assert shown[f"test {results['primary_metric']}"] == f"{value:.2%}"
    assert shown["results"] == done.stdout.strip()
    assert shown["next"] == f"tract-transfer predict --run {folder} IMAGE"
    logged = (folder / "log.txt").read_text()
    assert [f"  {text}\n" in logged for text in shown.values()] == [True] * len(shown)


def test_stdout_is_for_scripts(monkeypatch, load_tiny, tmp_path):
    """The path of the results, unless a person has just read it in the log."""
    arguments = Namespace(debug_batch=None, dry_run=False, eval_only=False, resume=False)
    monkeypatch.setattr("tract_transfer.run.run.run", lambda config, **_: None)
    terminal, pipe = Mock(isatty=lambda: True), Mock(isatty=lambda: False)
    for stdout, stderr, count in (
        (terminal, terminal, 0),
        (pipe, terminal, 1),
        (terminal, pipe, 1),
    ):
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        lines = train.carry_out(arguments, load_tiny(tmp_path), None)
        assert lines == [str(tmp_path / "run/results.json")] * count


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
    again = call("train_net.py", *words, "--resume")
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


@pytest.mark.slow
def test_a_suite_runs_once_reports_and_exits_with_1_if_a_run_fails(
    tmp_path, write_tiny, call, monkeypatch
):
    write_tiny(tmp_path)
    text = write_tiny(tmp_path, "probe").read_text()
    backbone = "  backbone: {name: cifar/resnet18, args: {width: 8}}\n"
    (tmp_path / "probe.yaml").write_text(text.replace(backbone, "  weights: none\n"))
    text = SUITE.replace("  tract: {{pretrain: {{tract.enabled: true}}}}\n", "")
    folder = tmp_path / "suite"
    (tmp_path / "suite.yaml").write_text("title: tiny\n" + text.format(output_dir=folder))
    words = ("run_suite.py", "--config-file", tmp_path / "suite.yaml")
    done = call(*words)
    assert done.returncode == 0, done.stderr
    results = sorted(folder.rglob("results.json"))
    runs = [f"vanilla/{task}/seed0/results.json" for task in ("pretrain", "probe")]
    assert [str(path.relative_to(folder)) for path in results] == runs
    probe = json.loads(results[1].read_text())
    assert [probe[key] for key in ("method", "name", "role")] == ["vanilla", "probe", "downstream"]
    assert "[2/2] seed 0  probe" in done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "report.html")
    for suffix in (".html", ".md", ".tex", ".json"):
        text = (folder / f"report{suffix}").read_text()
        assert "tiny" in text or suffix == ".tex"
        assert "probe" in text
    times = [path.stat().st_mtime_ns for path in results]
    again = call(*words)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert [path.stat().st_mtime_ns for path in results] == times

    report = tmp_path / "report.html"
    folders = folder.glob("*/*/seed0")
    again = call("report.py", *folders, "--output", report, "--title", "Again?")
    assert again.returncode == 0, again.stderr
    assert "Again?" in report.read_text()
    assert "probe" in again.stdout
    assert again.stdout.splitlines()[-1] == str(report)

    def fail(suite, *arguments, **options):
        suite.jobs[-1].state = "failed"

    monkeypatch.setattr("tract_transfer.suite.execute.execute", fail)
    assert call(*words).returncode == 1


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
