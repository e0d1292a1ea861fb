"""`train FOLDER` chooses a config, shows it, saves it and resumes; `check-data FOLDER` reads it."""

import os
from argparse import Namespace
from pathlib import Path

import image_folders as make
import pytest
import torch
from huggingface_hub import constants

from tract_transfer.cli.folder import RECIPE_VARIABLE, folder_config
from tract_transfer.config.schema import load_config
from tract_transfer.engine.run_folder import lock_folder
from tract_transfer.run.recipe import Recipe

pytestmark = pytest.mark.usefixtures("offline_cache")
SHORT = ("data.num_workers=0", "engine.device=cpu", "engine.log.tensorboard=false")
OPTIONS = ("--weights", "none", "--size", "8", "--epochs", "1")


@pytest.fixture
def train(call, monkeypatch, tmp_path):
    """Call train on a folder of three classes with options."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = make.litter(make.classes(tmp_path / "pets", 30))

    def run(*words):
        return call("train_net.py", folder, "--output", tmp_path / "run", *OPTIONS, *words, *SHORT)

    return run


def test_a_folder_is_trained_resumed_and_repeated(train, call, tmp_path):
    done = train("--name", "3", "seed=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run/results.json'}\n"
    recipe = tmp_path / "run/recipe.yaml"
    for log in (done.stderr, (tmp_path / "run/log.txt").read_text()):
        assert log.count("     found  class folders (3 folders of images); images: train 30") == 1
        assert log.count(f"     given  seed=1 {SHORT[0]}") == 1
        last = f"tract-transfer train --config-file {recipe} output_dir=NEW_FOLDER"
        assert log.splitlines()[-1].endswith(last)
    config = load_config(recipe)
    assert (config.name, config.seed, config.solver.max_epochs) == ("3", 1, 1)

    again = train("--name", "3", "seed=1")
    assert again.returncode == 2
    assert "already contains a run. Resume it with --resume" in again.stderr
    resumed = train("--name", "3", "seed=1", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    other = train("--name", "3", "seed=1", "--resume", "--batch-size", "3")
    assert other.returncode == 2
    assert "data.batch_size: 2 then, 3 now" in other.stderr
    measured = train("--eval-only", "seed=1")
    assert measured.returncode == 0, measured.stderr
    assert "top1" in measured.stdout
    assert config.data.train.path == str(tmp_path / "pets")
    repeated = call("train_net.py", "--config-file", recipe, f"output_dir={tmp_path / 'again'}")
    assert repeated.returncode == 0, repeated.stderr
    assert load_config(tmp_path / "again/config.yaml").seed == 1


def test_a_dry_run_shows_the_recipe_and_writes_nothing(train, tmp_path):
    done = train("--dry-run", "--tract")
    assert done.returncode == 0, done.stderr
    text = done.stdout[done.stdout.index("# found: ") :]
    (tmp_path / "shown.yaml").write_text(text)
    assert load_config(tmp_path / "shown.yaml").tract.enabled
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_start_leaves_no_folder(train, tmp_path):
    done = train("model.head={name: liner}")
    assert done.returncode == 2
    assert "model.head.name" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_second_start_changes_nothing_of_the_first(train, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("of the first")
    with lock_folder(folder):
        second = train()
        assert second.returncode == 2
        assert "is in use by process" in second.stderr
        assert (folder / "recipe.yaml").read_text() == "of the first"


def test_processes_take_the_recipe_of_the_one_that_starts_them(train, tmp_path, monkeypatch):
    monkeypatch.setenv(RECIPE_VARIABLE, "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(os, "execv", lambda *_: 0)
    train("--num-gpus", 3)
    recipe = Recipe.from_json(os.environ[RECIPE_VARIABLE])
    assert recipe.tree["data"]["batch_size"] % 3 == 0
    recipe.tree["seed"] = 5
    monkeypatch.setenv(RECIPE_VARIABLE, recipe.to_json())
    done = train("--dry-run")
    assert "\nseed: 5\n" in done.stdout, done.stderr
    monkeypatch.setenv(RECIPE_VARIABLE, recipe.to_json())
    config, _ = folder_config("images", Namespace(overrides=[], plugins=["paper/cifar_zoo.py"]))
    assert [Path(plugin).name for plugin in config.plugins] == ["cifar_zoo.py"]


def test_the_default_output_is_named_after_folder_and_task(call, tmp_path, monkeypatch):
    folder = make.classes(tmp_path / "pets.2024", 30)
    words = ("--weights", "none", "--size", "8", "--dry-run", *SHORT)
    done = call("train_net.py", folder, *words)
    assert "\noutput_dir: output/pets.2024-classify\n" in done.stdout, done.stderr


def test_check_data_reads_a_folder(call, tmp_path):
    folder = make.devkit(tmp_path / "given", ("train", "val"), "pets")
    done = call("check_data.py", folder)
    assert done.stdout.startswith("VOC devkit (")
    assert "images 2, objects 2" in done.stdout
    assert "0 problems" in done.stdout
    assert done.returncode == 0
