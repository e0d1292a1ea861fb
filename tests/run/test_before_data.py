"""A suite refuses what its folders show before any data are read."""

import pytest
import yaml
from run_folders import entries

from tract_transfer.config.schema import ConfigError
from tract_transfer.config.suite import load_suite
from tract_transfer.run.suite import Inspector, open_suite
from tract_transfer.suite.state import SuiteLock


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
    return lambda: open_suite(load_suite(tmp_path / "suite.yaml"), remember=True, refuse=True)


def test_a_suite_refuses_another_runs_folder_before_data_are_read(tmp_path, load_tiny_suite):
    folder = tmp_path / "suite/tract/pretrain/seed0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"metrics": {"top1": 1}, "primary_metric": "top1"}')
    (folder / "config.yaml").write_text("seed: 5\n")
    with pytest.raises(ConfigError, match=rf"{folder} contains another run: [\s\S]*--set-aside"):
        load_tiny_suite()
    assert entries(tmp_path / "suite") == ["tract"]


def test_a_suite_at_work_is_told_before_data_are_read(tmp_path, load_tiny_suite):
    lock = SuiteLock(tmp_path / "suite")
    (tmp_path / "suite").mkdir()
    lock.acquire()
    with pytest.raises(FileExistsError, match="is in use by another run_suite"):
        load_tiny_suite()
    lock.release()
