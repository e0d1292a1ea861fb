"""The doctor prints the environment, and the verdict of a training's first batches."""

import json
import shlex
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from PIL import Image

import tract_transfer
import tract_transfer.cli.doctor as doctor
from tract_transfer import TrAct
from tract_transfer.config.schema import load_config

TRACT = "tract.enabled=true"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; return its exit code and output."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["doctor", *map(str, words)])
        try:
            code = doctor.main()
        except SystemExit as end:  # raised by argparse
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def folder(tmp_path):
    """Twenty images of 40 px of two classes, in blocks of 8 px of one colour."""
    colours = np.random.default_rng(0).integers(0, 256, (20, 5, 5, 3), dtype=np.uint8)
    for index, image in enumerate(colours.repeat(8, axis=1).repeat(8, axis=2)):
        path = tmp_path / "images" / "train" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "images"


def test_environment_names_versions_extras_and_caches(run, monkeypatch):
    code, out, _ = run("--json")
    rows = json.loads(out)
    assert code == 0
    assert rows["torch"] == metadata.version("torch")
    assert {"python", "tract_transfer", "timm", "detectron2", "cpu", "gpu", "threads"} <= set(rows)
    assert rows["threads"] == str(torch.get_num_threads())
    code, out, _ = run()
    assert f"torch  {rows['torch']}\n" in out

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    code, out, _ = run()
    assert code == 1
    assert "but it cannot be imported: RuntimeError: operator torchvision::nms does not" in out


REQUIREMENTS = [
    "torch>=2.8",
    'pytest >=1; extra == "train"',
    "no-such-package ; extra == 'report'",
    'tract_transfer[report,train]; extra == "all"',
    'tract-transfer[all] ; extra == "all"',
    'another_missing[fast]>=2; extra == "dev"',
]


def test_extras_list_what_they_lack(monkeypatch):
    """An extra may name others, and itself."""
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: REQUIREMENTS)
    assert doctor.missing_of_extras() == {
        "train": [],
        "report": ["no-such-package"],
        "all": ["no-such-package"],
        "dev": ["another_missing"],
    }
    rows, is_complete = doctor.environment()
    assert rows["[all]"] == "missing no-such-package: pip install 'tract_transfer[all]'"
    assert is_complete


def test_the_hint_for_a_missing_package_prefers_the_extra_of_the_command(monkeypatch):
    monkeypatch.setattr(
        doctor.metadata,
        "requires",
        lambda _: [*REQUIREMENTS, REQUIREMENTS[2].replace("report", "train")],
    )
    missing = ModuleNotFoundError(name="no_such_package.part")
    hint = "no_such_package is not installed: pip install 'tract_transfer[{}]'"
    assert tract_transfer.install_hint(missing) == hint.format("train")
    assert tract_transfer.install_hint(missing, "report") == hint.format("report")
    assert tract_transfer.install_hint(ModuleNotFoundError(name="unknown")) is None


def test_without_a_distribution_there_are_no_extras_and_no_hints(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    assert doctor.missing_of_extras() == {}
    assert tract_transfer.install_hint(ModuleNotFoundError(name="timm")) is None


VERDICTS = {
    "a good lam": ("", True, True, "TrAct works as intended", "tract.lam=0.1 tract.lam_mode=abs"),
    "a large lam": (f"{TRACT} tract.lam=1e6", False, True, "TrAct only rescales", "=relative"),
    "images in [0, 255]": (
        f"{TRACT} model.backbone.mean=[0,0,0] model.backbone.std=[0.0039,0.0039,0.0039]",
        True, False, "below the rounding error", "tract.lam=0.1 tract.lam_mode=relative",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict_of_a_config(run, write_tiny, tmp_path, name):
    words, has_effect, is_safe, verdict, better = VERDICTS[name]
    path = write_tiny(tmp_path)
    words = ["--config-file", path, "--num-batches", 2, "data.batch_size=128", *shlex.split(words)]
    code, out, _ = run(*words)
    assert code == (0 if has_effect and is_safe else 1)
    assert "cifar/resnet18 on 256 training images of digits" in out
    assert ("tract.enabled is false in this config" in out) == (name == "a good lam")
    assert verdict in out
    assert better in out.splitlines()[-1]
    result = json.loads(run(*words, "--json")[1])
    assert (result["has_effect"], result["is_safe"]) == (has_effect, is_safe)
    assert result["layers"][0]["num_inputs"] == 27
    assert not (tmp_path / "run").exists()


def test_frozen_stem_of_a_detector_is_a_verdict(run, write_tiny, tmp_path):
    words = ("--config-file", write_tiny(tmp_path, "detection"), "--num-batches", 1)
    code, out, _ = run(*words, TRACT, "model.freeze_at=1")
    assert code == 1
    assert "conv1 is frozen, so TrAct has no effect" in out
    assert out.splitlines()[-1] == "recommended: tract.enabled=false"
    code, out, _ = run(*words)
    assert code == 0
    assert "gradient" in out


def test_report_is_that_of_the_training(write_tiny, tmp_path):
    """As by hand: the same batches, weights and losses."""
    from tract_transfer.build.data import build_data
    from tract_transfer.build.trainer import build_accelerator, build_trainer

    config = load_config(write_tiny(tmp_path), [TRACT])
    _, report = doctor.diagnose(config, 1)
    trainer = build_trainer(config, build_data(config), build_accelerator(config))
    trainer.max_iters = 1
    trainer.train()
    (ours,), (theirs,) = report.values(), trainer.tract.report().values()
    torch.testing.assert_close(ours.eigenvalues, theirs.eigenvalues)
    assert ours.gradient_angle_deg == pytest.approx(theirs.gradient_angle_deg)
    assert isinstance(trainer.tract, TrAct)


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_backbone_on_images_without_a_config(run, folder, tmp_path, kind, offline_cache):
    data = folder
    if kind == "parquet":
        import datasets

        data = tmp_path / "images.parquet"
        loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
        loaded.to_parquet(str(data))
    words = ("--backbone", "timm/resnet18", "--data", data, "--num-batches", 2)
    code, out, _ = run(*words, "data.batch_size=4", "data.transforms.size_px=32")
    assert code == 0
    assert "TrAct on backbone.model.conv1 (Conv2d, kernel 7 x 7)" in out
    assert "timm/resnet18 on 8 training images of" in out
    assert not (tmp_path / "output").exists()


BAD_LINES = {
    "--backbone timm/resnet18": "--backbone and --data go together",
    "--data x": "--backbone and --data go together",
    "--config-file x.yaml --backbone y": "not allowed with argument",
    "tract.lam=1": "['tract.lam=1'] override a config: give --config-file, or",
    "--num-batches 0": "argument --num-batches: must be int >= 1, got 0",
    "--config-file nowhere.yaml": "No config nowhere.yaml: there is no such file",
    "--config-file quickstart/probe model.weights=./x": "a probe trains no first",
    "--config-file quickstart/pretrain tract.lam=0": "tract.lam",
    "--config-file quickstart/pretrain tract.layers=[no] tract.enabled=true "
    "engine.device=cpu": "has no layer 'no'",
    "--backbone timm/resnet19 --data no/where": "timm has no model 'resnet19'",
    "--backbone timm/resnet18 --data ./nowhere": "nowhere",
    "--backbone timm/resnet18 --data no/where tract.lamm=1": "Did you mean tract.lam?",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_command_line_exits_with_2(run, line):
    code, out, err = run(*line.split())
    assert code == 2
    assert "error: " in err
    assert BAD_LINES[line] in err
    assert out == ""
