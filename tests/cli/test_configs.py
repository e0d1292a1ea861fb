"""Packaged configs are found by name, and a copy of one is the same config."""

import sys

import pytest

from tract_transfer.cli.configs import copy, main
from tract_transfer.config.file import CONFIGS, config_names, find_config, read_config_file

ROOT = CONFIGS.parent


def test_a_file_comes_before_a_packaged_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = find_config("quickstart/pretrain")
    assert packaged == find_config("configs/quickstart/pretrain.yaml")
    assert packaged == CONFIGS / "quickstart" / "pretrain.yaml"
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "pretrain").write_text("task: probe")
    assert find_config("quickstart/pretrain").read_text() == "task: probe"


@pytest.mark.parametrize("name", config_names())
def test_a_copy_reads_as_the_original(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree, _ = read_config_file(copy(name))
    original, _ = read_config_file(CONFIGS / f"{name}.yaml")
    for key in ("pretrain", "tasks"):  # of a suite: paths to configs
        tree.pop(key, None), original.pop(key, None)
    assert tree == original


def test_a_copied_suite_finds_its_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree, _ = read_config_file(copy("suites/quickstart", "mine/suite.yaml"))
    configs = [tree["pretrain"], *tree["tasks"].values()]
    assert [find_config(config, tmp_path / "mine").parent for config in configs] == [
        CONFIGS / "quickstart"
    ] * 4


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["tract-transfer configs", *words])
    return main(), *capsys.readouterr()


def test_configs_lists_shows_and_copies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(monkeypatch, capsys)
    listed = [line.split()[0] for line in out.splitlines()]
    assert code == 0
    assert listed == [name for name in config_names() if not name.startswith("base/")]
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in out.splitlines()), "a description"
    assert "quickstart/probe" not in run(monkeypatch, capsys, "cifar-100", "k-nn")[1]
    text = (CONFIGS / "quickstart" / "probe.yaml").read_text()
    assert run(monkeypatch, capsys, "--show", "quickstart/probe")[1] == text
    assert run(monkeypatch, capsys, "--copy", "quickstart/probe")[1] == "probe.yaml\n"
    code, _, err = run(monkeypatch, capsys, "--copy", "quickstart/probe")
    assert code == 2
    assert "probe.yaml exists and is kept" in err
    assert run(monkeypatch, capsys, "nothing like it")[0] == 2


def test_eval_repeats_the_metrics_of_a_moved_run(write_tiny, call, tmp_path):
    import json

    from tract_transfer.cli import evaluate

    assert call("train_net.py", "--config-file", write_tiny(tmp_path)).returncode == 0
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tract-transfer eval", "--run", str(moved), "--json"])
        assert evaluate.main() == 0
    results = json.loads((moved / "results.json").read_text())
    assert json.loads((moved / "evaluation.json").read_text())["metrics"] == results["metrics"]
