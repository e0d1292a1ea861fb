"""A run folder that does not fit what is asked of it is an error, and stays as it is."""

import json
import shutil
from pathlib import Path

import pytest

from tract_transfer.build.model import build_features
from tract_transfer.config.schema import ConfigError
from tract_transfer.run.evaluate import evaluate_run
from tract_transfer.run.run import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, load_tiny):
    """A finished run's config."""
    config = load_tiny(tmp_path_factory.mktemp("finished"), "solver.max_iters=2")
    run(config)
    return config


def contents(folder):
    files = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_folder_is_not_written_over(finished, load_tiny, refused):
    folder = Path(finished.output_dir)
    before = contents(folder)
    config = load_tiny(folder.parent, "solver.lr=0.5")
    with refused("an output_dir that holds a run", FileExistsError) as caught:
        run(config)
    message = str(caught.value)
    assert f"{folder} already contains a run" in message
    assert "Resume it with --resume, or set another output_dir" in message
    assert contents(folder) == before


def test_a_run_goes_on_with_its_own_config_alone(finished, load_tiny, refused):
    folder = Path(finished.output_dir)
    before = contents(folder)
    config = load_tiny(folder.parent, "solver.max_iters=2", "solver.lr=0.5", "data.batch_size=16")
    with refused(
        "--resume with another config", ValueError, match="cannot be resumed with another config"
    ) as caught:
        run(config, resume=True)
    message = str(caught.value)
    assert "data.batch_size: 32 then, 16 now; solver.lr: 0.05 then, 0.5 now" in message
    assert f"Resume with {folder}/config.yaml, or set another output_dir" in message
    assert contents(folder) == before


def test_where_and_how_fast_may_change_on_resume(finished, load_tiny):
    words = ("data.num_workers=1", "engine.log.every_iters=9", "engine.checkpoint.keep=3")
    folder = Path(finished.output_dir)
    before = json.loads((folder / "results.json").read_text())["metrics"]
    again = run(load_tiny(folder.parent, "solver.max_iters=2", *words), resume=True)
    assert again["metrics"] == before


def test_there_is_nothing_to_evaluate(tmp_path, load_tiny, refused):
    with refused(
        "--eval-only without a checkpoint",
        FileNotFoundError,
        match=r"No complete checkpoint in .*Train first, or set",
    ):
        evaluate_run(load_tiny(tmp_path))
    with refused("--eval-only of a probe", ConfigError, match=r"task: a probe trains no model"):
        evaluate_run(load_tiny(tmp_path, task="probe"))


def test_a_checkpoint_of_another_model_is_told(finished, load_tiny, refused):
    config = load_tiny(Path(finished.output_dir).parent, "model.backbone.args={width: 16}")
    with refused(
        "--eval-only with another model",
        ValueError,
        match=r"iter_0000002 .*another model.*config.yaml",
    ):
        evaluate_run(config)


@pytest.mark.parametrize("card", ["{", "[]", json.dumps({"name": "cifar/resnet18"})])
def test_a_broken_card_is_told(finished, tmp_path, load_tiny, card):
    for name in ("model.safetensors", "model.json"):
        shutil.copy(Path(finished.output_dir) / name, tmp_path / name)
    (tmp_path / "model.json").write_text(card)
    config = load_tiny(tmp_path, "model.backbone={name: null}", f"model.weights={tmp_path}")
    with pytest.raises(ConfigError, match=r"model.weights: .*model.json .*again"):
        build_features(config)
