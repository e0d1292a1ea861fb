"""Every tool runs as its user runs it."""

import json
import logging
import shutil
import time
from pathlib import Path

import pytest
import torch

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
def test_a_tool_says_how_it_is_used(name, tool):
    said = tool(name, "--help")
    assert said.returncode == 0, said.stderr
    assert f"python tools/{name}" in said.stdout
    assert said.stderr == ""


def test_help_comes_at_once(tool):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        tool("train_net.py", "--help")
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.5


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tool):
    """What the quickstart's pre-training says, made tiny, and its folder."""
    folder = tmp_path_factory.mktemp("tools") / "run"
    words = ("--config-file", "configs/quickstart/pretrain.yaml", f"output_dir={folder}", *QUICK)
    return words, folder, tool("train_net.py", *words)


def test_train_net_trains(trained):
    _, folder, said = trained
    assert said.returncode == 0, said.stderr
    assert said.stdout.split() == [str(folder / "results.json")]
    assert "iter 4/4" in said.stderr
    assert "test top1" in said.stderr
    assert json.loads((folder / "results.json").read_text())["iterations"] == 4


def test_train_net_measures_again(trained, call):
    words, folder, _ = trained
    said = call("train_net.py", *words, "--eval-only")
    assert said.returncode == 0, said.stderr
    results = json.loads((folder / "results.json").read_text())
    shown = dict(line.split() for line in said.stdout.splitlines())
    metrics = results["metrics"]
    assert shown == {name: f"{metrics[name]:.2%}" for name in metrics if name != "loss"} | {
        "loss": f"{metrics['loss']:.4f}"
    }


def test_train_net_goes_on_and_says_where_it_does_not(trained, call):
    words, folder, _ = trained
    before = len(lines_of(folder))
    again = call("train_net.py", *words[:2], "--resume", *words[2:])
    assert again.returncode == 0, again.stderr
    assert "Resumed from" in again.stderr
    assert len(lines_of(folder)) == before
    refused = call("train_net.py", *words)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "holds a run already. Go on with it (--resume)" in refused.stderr


def test_train_net_says_what_a_run_would_cost(trained, call, tmp_path):
    words, _, _ = trained
    said = call("train_net.py", *words, f"output_dir={tmp_path / 'none'}", "--dry-run")
    assert said.returncode == 0, said.stderr
    for what in ("parameters", "FLOPs", "peak memory", "a step", "the whole run"):
        assert what in said.stdout
    assert not (tmp_path / "none").exists()
    stages = ["Reading data.train", "Reading data.test", "Building the model", "Two training steps"]
    places = [said.stderr.index(stage) for stage in [*stages, "One batch of the evaluation"]]
    assert places == sorted(places)


PRETRAIN = "--config-file configs/quickstart/pretrain.yaml"
FINETUNE = "--config-file configs/quickstart/finetune.yaml"
QUICK_SUITE = "--config-file configs/suites/quickstart.yaml"
BAD_LINES = {
    "train_net.py": (2, "--config-file"),
    f"train_net.py {PRETRAIN} --eval-only --dry-run": (2, "--dry-run: not allowed with"),
    f"train_net.py {PRETRAIN} --eval-only --resume": (2, "--resume goes on with a training"),
    "analyze_model.py --weights x --stem cifar": (2, "--stem and --args go with --backbone"),
    "analyze_model.py --weights x a=1": (2, "['a=1'] are of a config: give --config-file"),
    "train_net.py --config-file nowhere.yaml": (2, "No config can be read at nowhere.yaml"),
    f"train_net.py {PRETRAIN} solver.lrr=1": (2, "solver.lrr: unknown. Did you mean solver.lr?"),
    f"train_net.py {PRETRAIN} --num-gpus 99": (
        2, f"--num-gpus 99: torch sees {torch.cuda.device_count()} GPUs",
    ),
    f"train_net.py {FINETUNE} model.weights=./nowhere": (2, "model.weights: No weights at"),
    f"train_net.py {PRETRAIN} --eval-only output_dir=./nowhere": (2, "No whole checkpoint in"),
    "run_suite.py --config-file nowhere.yaml": (2, "No config can be read at nowhere.yaml"),
    f"run_suite.py {QUICK_SUITE} baseline=tarct": (2, "'tarct' is not one of the methods ['vanilla',"),
    "report.py": (2, "folders"),
    "report.py ./nowhere": (2, "nowhere: the folder does not exist"),
    f"train_net.py {PRETRAIN} data.batch_size=5000": (2, "data.batch_size"),
    f"train_net.py {PRETRAIN} --debug-batch nowhere.safetensors": (2, "No debug batch at nowhere"),
    "check_data.py --config-file nowhere.yaml": (2, "No config can be read at nowhere.yaml"),
    f"check_data.py {PRETRAIN} --json nowhere/x.json": (2, "--json nowhere/x.json: there is no"),
    "visualize_data.py --config-file nowhere.yaml": (2, "No config can be read at nowhere.yaml"),
    f"visualize_data.py {PRETRAIN} data.train.classes=[12]": (2, "classes"),
    "predict.py --run ./nowhere setup.cfg": (2, "No config.yaml in nowhere"),
    "predict.py --run ./nowhere nowhere.jpg": (2, "nowhere.jpg is neither a file nor a folder"),
    "analyze_model.py --backbone cifar/resnet19": (2, "Did you mean 'cifar/resnet18'?"),
    "analyze_model.py --weights nowhere.pth": (2, "No weights at nowhere.pth"),
    "export_model.py --run ./nowhere --output ./nowhere/x": (2, "nowhere"),
    "convert_weights.py --to detectron2 ./nowhere ./nowhere/x.pkl": (2, "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_command_line_is_told(call, line):
    code, wanted = BAD_LINES[line]
    said = call(*line.split())
    assert said.returncode == code
    assert wanted in said.stderr
    assert "error: " in said.stderr  # of argparse after its usage, with the tool's name
    assert said.stdout == ""
    assert not (ROOT / "nowhere").exists()


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
    """A tiny suite that was run: its folder, its command line and what it said."""
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


def test_a_suite_run_again_skips_what_is_finished(suite, call):
    folder, words, first = suite
    before = metrics_of(folder / "suite")
    again = call(*words)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("finished before") == 4
    assert metrics_of(folder / "suite") == before
    assert again.stdout == first.stdout


def test_a_failure_stops_only_itself(suite, call, tmp_path):
    """One method's pre-training diverges: its probe is not started, the other method is run."""
    folder, words, _ = suite
    for name in ("pretrain", "probe"):  # the baseline's runs are those of the first suite
        shutil.copytree(folder / f"suite/vanilla/{name}", tmp_path / f"vanilla/{name}")
    diverges = ("methods.tract.pretrain={solver.lr: 1e30}", "retries=0")
    said = call(*words, f"output_dir={tmp_path}", *diverges)
    assert said.returncode == 1
    assert "failed: NonFiniteError: " in said.stderr
    assert f"blocked: it needs {tmp_path}/tract/pretrain/seed0, which failed" in said.stderr
    assert "Traceback" not in said.stderr
    assert list(metrics_of(tmp_path)) == [
        f"vanilla/{task}/seed0/results.json" for task in ("pretrain", "probe")
    ]
    assert (tmp_path / "report.html").is_file()
    runs = json.loads((tmp_path / "suite.json").read_text())["runs"]
    assert [(run["method"], run["state"]) for run in runs] == [
        ("vanilla", "finished"), ("tract", "failed"), ("vanilla", "finished"), ("tract", "blocked"),
    ]  # fmt: skip


def test_a_suite_shows_its_own_lines_and_each_warning_once():
    """Runs share data, and so what is wrong with them."""
    shown = make_filter()

    def show(name, level, text):
        return shown(logging.LogRecord(name, level, "", 0, text, (), None))

    data, own = "tract_transfer.build.data", "tract_transfer.suite.execute"
    assert show(data, logging.WARNING, "no cat")
    assert not show(data, logging.WARNING, "no cat")
    assert show(data, logging.WARNING, "no dog")
    assert not show(data, logging.INFO, "loaded")
    assert [show(own, logging.INFO, "set aside") for _ in range(2)] == [True, True]


def test_a_suite_whose_runs_cannot_be_configured_starts_none(suite, call, tmp_path):
    _, words, _ = suite
    said = call(*words, f"output_dir={tmp_path / 'none'}", "methods.tract.downstream={slover: 1}")
    assert said.returncode == 2
    assert "slover: unknown" in said.stderr
    assert not (tmp_path / "none").exists()


def test_a_report_from_run_folders(suite, call, tmp_path):
    folder, _, _ = suite
    folders = sorted((folder / "suite").glob("*/*/seed0"))
    said = call("report.py", *folders, "--output", tmp_path / "report.html", "--title", "Again?")
    assert said.returncode == 0, said.stderr
    assert "Again?" in (tmp_path / "report.html").read_text()
    assert "probe" in said.stdout
    assert said.stdout.splitlines()[-1] == str(tmp_path / "report.html")


@pytest.mark.parametrize(
    "tool, words",
    [
        ("analyze_model.py", ("--backbone", "timm/resnet18", "--size-px", "0")),
        ("predict.py", ("--run", "run", "photo.jpg", "--top-k", "-3")),
        ("predict.py", ("--run", "run", "photo.jpg", "--min-score", "7")),
        ("visualize_data.py", ("--config-file", "x.yaml", "--num-images", "none")),
        ("train_net.py", ("--config-file", "x.yaml", "--num-gpus", "0")),
    ],
)
def test_options_out_of_range_are_refused_by_name(tool, words, call):
    said = call(tool, *words)
    assert said.returncode == 2
    assert f"argument {words[-2]}: a " in said.stderr
    assert f"got {words[-1]}" in said.stderr
