"""tools/analyze_model.py counts what is known of a ResNet-18, and reads every kind of config."""

import json

import pytest
import timm
import torch

from tract_transfer.models import build_backbone
from tract_transfer.models.weights import save_backbone


def test_resnet18_costs_what_its_paper_says(call):
    words = ("--backbone", "torchvision/resnet18", "--size-px", 224, "--json")
    said = call("analyze_model.py", *words)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["parameters"] == 11_176_512  # without the classifier's 513,000
    assert found["flops"] == pytest.approx(2 * 1.814e9, rel=0.01)
    (layer,) = found["first_layers"]
    assert (layer["inputs"], layer["outputs"], layer["rows"]) == (147, 64, 112 * 112)
    strides = [info["stride"] for info in found["maps"].values()]
    assert strides == [4, 8, 16, 32]
    assert sum(block["parameters"] for block in found["blocks"]) == found["parameters"]


@pytest.mark.parametrize("task", ["classification", "detection", "probe"])
def test_a_config_is_analysed_without_data_or_weights(call, write_tiny, tmp_path, task):
    path = write_tiny(tmp_path, task)
    data = ("data.train={source: digits, split: train}",) if task != "detection" else ()
    words = ("--config-file", path, "--size-px", 32, "model.weights=./nowhere", *data)
    said = call("analyze_model.py", *words)
    assert said.returncode == 0, said.stderr
    assert "n = 27 inputs" in said.stdout
    assert "activations" in said.stdout
    for part in {"detection": ("neck", "rpn", "roi_heads"), "classification": ("head",)}.get(
        task, ()
    ):
        assert f"\n{part}" in said.stdout


def test_what_cannot_be_analysed_is_told(call):
    for words, code, wanted in (
        (("--backbone", "timm/resnet19"), 2, "timm has no model 'resnet19'"),
        (("--backbone", "timm/resnet18", "--args", "{"), 2, "--args must be JSON"),
        (("--backbone", "timm/resnet18", "seed=1"), 2, "give --config-file"),
        (("--config-file", "nowhere.yaml"), 2, "No config can be read"),
    ):
        said = call("analyze_model.py", *words)
        assert said.returncode == code
        assert wanted in said.stderr
        assert "Traceback" not in said.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A published ResNet-18, one of a MoCo training, and one that lacks a layer."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    state = timm.create_model("resnet18").state_dict()
    short = {name: tensor for name, tensor in state.items() if name != "layer1.0.conv1.weight"}
    moco = {f"module.encoder_q.{name}": tensor for name, tensor in state.items()}
    torch.save(state, folder / "published.pth")
    torch.save(short, folder / "short.pth")
    torch.save({"state_dict": moco, "epoch": 1}, folder / "moco.pth.tar")
    return folder


@pytest.mark.parametrize("name", ["published.pth", "moco.pth.tar"])
def test_weights_are_compared_without_training(call, files, name):
    words = ("--weights", files / name, "--backbone", "timm/resnet18")
    said = call("analyze_model.py", *words)
    assert said.returncode == 0, said.stderr
    assert "11,176,512 of 11,176,512 parameters (100.00%)" in said.stdout
    assert "fc.bias (the file's own head, 2 names)" in said.stdout
    found = json.loads(call("analyze_model.py", *words, "--json").stdout)
    assert (found["fits"], found["parameters_loaded"]) == (True, 11_176_512)


def test_weights_that_would_be_refused_end_with_1(call, files, write_tiny, tmp_path):
    words = ("--weights", files / "short.pth")
    said = call("analyze_model.py", *words, "--backbone", "timm/resnet18")
    assert said.returncode == 1
    assert "missing      layer1.0.conv1.weight (1 names)" in said.stdout
    assert "refused: " in said.stderr
    assert "does not fit TimmBackbone" in said.stderr
    path = write_tiny(tmp_path)
    config = ("--config-file", path, "model.backbone={name: timm/resnet18}")
    said = call("analyze_model.py", *words, *config)
    assert said.returncode == 1
    assert "refused: model.weights: " in said.stderr
    ignored = "model.ignore_missing=[layer1.0.conv1.weight]"
    said = call("analyze_model.py", *words, *config, ignored)
    assert said.returncode == 0, said.stderr
    assert "initialized  layer1.0.conv1.weight" in said.stdout


def test_weights_alone_are_a_run_folder_s(call, files, tmp_path):
    said = call("analyze_model.py", "--weights", files / "short.pth")
    assert said.returncode == 2
    assert "No model.json" in said.stderr
    save_backbone(tmp_path, build_backbone("cifar/resnet18", args={"width": 8}), {})
    said = call("analyze_model.py", "--weights", tmp_path)
    assert said.returncode == 0, said.stderr
    assert "(100.00%)" in said.stdout
    said = call("analyze_model.py", "--weights", "output/pretrain/cifar10_resnet18_not")
    assert said.returncode == 2
    assert "no such file or folder" in said.stderr
    assert call("analyze_model.py").returncode == 2
