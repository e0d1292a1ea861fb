"""What a run's folder can tell is told before its data are read, which may take long."""

import json
from pathlib import Path

import pytest
import yaml
from run_folders import entries, held

from tract_transfer.config.schema import ConfigError, dump_config
from tract_transfer.config.suite import load_suite
from tract_transfer.engine.run_folder import FolderInUseError
from tract_transfer.run.evaluate import evaluate_run, preview
from tract_transfer.run.run import run
from tract_transfer.run.suite import Suite
from tract_transfer.run.suite_plan import Inspector
from tract_transfer.suite.journal import SuiteLock


@pytest.fixture
def finished(tmp_path, load_tiny):
    """A finished run's config and folder."""
    config = load_tiny(tmp_path, "solver.max_iters=2")
    run(config)
    return config, Path(config.output_dir)


@pytest.fixture
def no_data(monkeypatch):
    """Let any reading of data fail."""
    monkeypatch.setattr(
        "tract_transfer.run.run.build_data", lambda _config: pytest.fail("data read")
    )


def test_another_runs_folder_is_refused_before_data_are_read(
    finished, load_tiny, no_data, tmp_path
):
    config, _ = finished
    with pytest.raises(FileExistsError, match="already contains a run"):
        run(config)
    with pytest.raises(ValueError, match=r"another config: solver\.lr: 0.05 then, 0.1 now"):
        run(load_tiny(tmp_path, "solver.max_iters=2", "solver.lr=0.1"), resume=True)


def test_other_weights_are_refused_before_data_are_read(tmp_path, load_tiny, finished, no_data):
    _, folder = finished
    words = [f"model.weights={folder}", "model.backbone={name: null}", "solver.max_iters=1"]
    (tmp_path / "next").mkdir()
    config = load_tiny(tmp_path / "next", *words)
    place = tmp_path / "next/run"
    (place / "checkpoints/iter_0000001").mkdir(parents=True)
    (place / "config.yaml").write_text(dump_config(config))
    (place / "environment.json").write_text('{"weights": "0123456789abcdef"}')
    with pytest.raises(ValueError, match=r"model\.weights changed .* 0123456789ab then"):
        run(config, resume=True)


def test_a_folder_in_use_is_refused_before_data_are_read(tmp_path, load_tiny, no_data):
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run") as pid, pytest.raises(FolderInUseError, match=f"process {pid} "):
        run(load_tiny(tmp_path))
    assert entries(tmp_path / "run") == [".lock"]
    (tmp_path / "run/.lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(FolderInUseError, match="cannot tell whether that process still runs"):
        run(load_tiny(tmp_path))


def test_no_folder_is_made_below_a_file(tmp_path, load_tiny, no_data, refused):
    (tmp_path / "file").write_text("mine")
    with refused("an output_dir below a file", NotADirectoryError, match="file is a file"):
        run(load_tiny(tmp_path, f"output_dir={tmp_path}/file/run"))


def test_a_checkpoint_that_is_not_there_is_told_before_data_are_read(tmp_path, load_tiny, no_data):
    with pytest.raises(FileNotFoundError, match="No complete checkpoint in"):
        evaluate_run(load_tiny(tmp_path))


def test_a_preview_tells_that_the_run_would_be_refused(finished, caplog):
    config, _ = finished
    assert "peak memory" in preview(config)
    assert "A run would be refused: " in caplog.text
    caplog.clear()
    preview(config, resume=True)
    assert "refused" not in caplog.text


@pytest.fixture
def load_tiny_suite(tmp_path, write_tiny, monkeypatch):
    """Plan two runs of tiny pre-trainings below tmp_path/suite; their data must not be read."""
    monkeypatch.setattr(Inspector, "_look", lambda *_: pytest.fail("data read"))
    methods = {"vanilla": {}, "tract": {"pretrain": {"tract.enabled": True}}}
    tree = {"output_dir": str(tmp_path / "suite"), "baseline": "vanilla", "seeds": [0]}
    pretrain = str(write_tiny(tmp_path))
    (tmp_path / "suite.yaml").write_text(
        yaml.safe_dump({**tree, "methods": methods, "pretrain": pretrain})
    )
    return lambda: Suite(load_suite(tmp_path / "suite.yaml"), remember=True, refuse=True)


def test_a_suite_refuses_another_runs_folder_before_data_are_read(tmp_path, load_tiny_suite):
    folder = tmp_path / "suite/tract/pretrain/seed0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"metrics": {"top1": 1}, "primary_metric": "top1"}')
    (folder / "config.yaml").write_text("seed: 5\n")
    with pytest.raises(ConfigError, match=rf"{folder} holds another run: [\s\S]*--set-aside moves"):
        load_tiny_suite()
    assert entries(tmp_path / "suite") == ["tract"]


def test_a_suite_at_work_is_told_before_data_are_read(tmp_path, load_tiny_suite):
    lock = SuiteLock(tmp_path / "suite")
    (tmp_path / "suite").mkdir()
    lock.acquire()
    with pytest.raises(FileExistsError, match="another run_suite is at work here"):
        load_tiny_suite()
    lock.release()
