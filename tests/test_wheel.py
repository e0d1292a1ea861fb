"""The built wheel works outside a clone, and with torch alone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from image_folders import classes, coco_export

ROOT = Path(__file__).parents[1]
# After it, what the extras install cannot be imported.
TORCH_ALONE = """
import sys

EXTRAS = {
    "PIL", "accelerate", "datasets", "defusedxml", "fvcore", "huggingface_hub", "matplotlib",
    "numpy", "psutil", "pyarrow", "pydantic", "rich", "safetensors", "scipy", "sklearn", "timm",
    "torchvision", "yaml",
}
sys.modules.update(dict.fromkeys(EXTRAS))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    build = ["--config-settings=--build-option=--quiet", "--wheel-dir", folder, ROOT]
    subprocess.run([*pip, *build], check=True, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def outside(wheel, tmp_path_factory):
    """Run Python in an empty folder, with the package from the wheel."""
    installed, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("outside")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)

    def run(*words, **options):
        environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
            **options,
        )  # fmt: skip

    run.installed, run.folder = installed, folder
    return run


def test_the_wheel_has_every_module_template_and_config(outside):
    def files(folder, *patterns):
        return {path.relative_to(folder) for pattern in patterns for path in folder.rglob(pattern)}

    package = outside.installed / "tract_transfer"
    kinds = ("*.py", "*.jinja", "*.csv", "py.typed")
    configs = {Path("configs") / file for file in files(package / "configs", "*.py")}
    assert files(package, *kinds) - configs == files(ROOT / "tract_transfer", *kinds)
    for kind in ("*.yaml", "*.py"):
        assert files(package / "configs", kind) == files(ROOT / "configs", kind)


def test_a_packaged_suite_is_planned_outside_a_clone(outside):
    done = outside(
        "-m", "tract_transfer", "suite", "--config-file", "suites/quickstart", "--dry-run"
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 16
    assert str(ROOT) not in done.stdout + done.stderr


def test_a_packaged_plugin_is_found_outside_a_clone(outside):
    named = ["--backbone", "cifar/squeezenet", "--size-px", 32, "--plugin", "paper/cifar_zoo.py"]
    done = outside("-m", "tract_transfer", "analyze", *named)
    assert (done.returncode, done.stderr) == (0, "")
    assert "first layer   model.features.0.0 (Conv2d)" in done.stdout


# Runs commands one after another in one process, which imports torch once.
COMMANDS = """
import sys
from tract_transfer.cli.main import main

for line in sys.stdin.read().splitlines():
    sys.argv = ["tract-transfer", *line.split()]
    code = main()
    assert code == 0, f"{line}: {code}"
"""
PLUGIN = """
from torch import nn

from tract_transfer import BACKBONES, Backbone


@BACKBONES.register("mine/tiny")
def tiny():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    half = [0.5, 0.5, 0.5]
    return Backbone(model, feature_dim=8, first_layers=["0"], mean=half, std=half)
"""
SUITE = """
output_dir: suite
baseline: vanilla
seeds: [0]
methods: {vanilla: {}, tract: {pretrain: {tract.enabled: true}}}
pretrain: pretrain.yaml
"""


@pytest.mark.slow
def test_a_user_of_the_wheel_trains_predicts_exports_plugs_in_and_compares(outside):
    classes(outside.folder / "images", 40)
    coco_export(outside.folder / "boxes", "train", "valid")
    (outside.folder / "mine.py").write_text(PLUGIN)
    (outside.folder / "suite.yaml").write_text(SUITE)
    image = next((outside.folder / "images").rglob("*.png"))
    tiny = "--weights none --epochs 1"
    lines = [
        f"train images {tiny} --tract --batch-size 4 --output classify",
        f"train images {tiny} --batch-size 4 --output mine --plugin mine.py --backbone mine/tiny",
        f"train boxes {tiny} --batch-size 1 --size 64 --output detect",
        f"predict --run classify {image} --output labels",
        f"predict --run detect {image} --output drawn",
        "eval --run mine --plugin mine.py",
        "export --run classify --output exported",
        "configs --copy quickstart/pretrain pretrain.yaml",
        "suite --config-file suite.yaml --dry-run",
        "report classify mine --output report.html",
    ]
    done = outside("-c", COMMANDS, input="\n".join(lines))
    assert done.returncode == 0, done.stderr[-3000:]
    made = {path.relative_to(outside.folder).as_posix() for path in outside.folder.rglob("*")}
    assert made >= {
        "classify/results.json", "classify/recipe.yaml", "mine/evaluation.json",
        "detect/results.json", "labels/predictions.json", f"drawn/{image.name}.png",
        "exported/README.md", "pretrain.yaml", "report.html",
    }  # fmt: skip


def test_a_report_needs_its_extra_alone(outside):
    """Nothing but torch and what `report` lists, and what those depend on, can be imported."""
    others = "accelerate datasets defusedxml psutil pyarrow sklearn tensorboard timm torchvision"
    start = f"""
import sys

sys.modules.update(dict.fromkeys({others.split()}))
from tract_transfer.cli.main import main

sys.argv = ["tract-transfer", "report", "."]
sys.exit(main())
"""
    done = outside("-c", start)
    assert done.stderr.startswith("error: No run in . or below.")


def test_tract_needs_torch_alone(outside):
    loop = """
import torch
from tract_transfer import TrAct

torch.manual_seed(0)
layer = torch.nn.Conv2d(3, 4, 3)
tract = TrAct(torch.nn.Sequential(layer))
images = torch.randn(2, 3, 8, 8)
layer(images).square().sum().backward()
plain = layer.weight.grad.clone()
tract.step()
print(tract.layer_names, bool((layer.weight.grad != plain).any()))
"""
    done = outside("-c", TORCH_ALONE + loop)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['0'] True"


@pytest.mark.parametrize(
    ("command", "extra"),
    [("train --config-file quickstart/pretrain", "train"), ("report .", "report")],
)
def test_a_missing_extra_is_named(outside, command, extra):
    start = f"""
from tract_transfer.cli.main import main

sys.argv = ["tract-transfer", *{command.split()!r}]
sys.exit(main())
"""
    done = outside("-c", TORCH_ALONE + start)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f"is not installed: pip install 'tract_transfer[{extra}]'")


def test_a_missing_extra_is_named_in_python(outside):
    start = """
import tract_transfer

for name in ("train", "load", "BACKBONES"):
    try:
        getattr(tract_transfer, name)
    except ModuleNotFoundError as error:
        print(error)
"""
    done = outside("-c", TORCH_ALONE + start)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    for line in done.stdout.splitlines():
        assert line.endswith("is not installed: pip install 'tract_transfer[train]'")
