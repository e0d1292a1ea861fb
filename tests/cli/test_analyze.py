"""analyze_model.py counts what is published of a ResNet-18, and reads every kind of config."""

import json

import pytest
import timm
import torch

from tract_transfer.models import build_backbone
from tract_transfer.models.weights import save_backbone


def test_resnet18_costs_what_its_paper_reports(call):
    words = ("--backbone", "torchvision/resnet18", "--size-px", 224, "--json")
    done = call("analyze_model.py", *words)
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)
    assert costs["parameters"] == 11_176_512  # without the classifier's 513,000
    assert costs["flops"] == pytest.approx(2 * 1.814e9, rel=0.01)
    (layer,) = costs["first_layers"]
    assert (layer["inputs"], layer["outputs"], layer["rows"]) == (147, 64, 112 * 112)
    assert [info["stride"] for info in costs["maps"].values()] == [4, 8, 16, 32]
    assert sum(block["parameters"] for block in costs["blocks"]) == costs["parameters"]


@pytest.mark.parametrize(
    ("task", "parts"),
    [("classification", ["head"]), ("detection", ["neck", "rpn", "roi_heads"]), ("probe", [])],
)
def test_a_config_is_analyzed_without_data_or_weights(call, write_tiny, tmp_path, task, parts):
    words = ("--config-file", write_tiny(tmp_path, task), "--size-px", 32)
    done = call("analyze_model.py", *words, "model.weights=./nowhere")
    assert done.returncode == 0, done.stderr
    assert "n = 27 inputs" in done.stdout
    assert "activations" in done.stdout
    assert [part for part in parts if f"\n{part}" not in done.stdout] == []


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A published ResNet-18, one of a MoCo training, and one without one of its layers."""
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
    done = call("analyze_model.py", *words)
    assert done.returncode == 0, done.stderr
    assert "11,176,512 of 11,176,512 parameters (100.00%)" in done.stdout
    assert "fc.bias (the file's own head, 2 names)" in done.stdout
    report = json.loads(call("analyze_model.py", *words, "--json").stdout)
    assert (report["fits"], report["parameters_loaded"]) == (True, 11_176_512)


def test_weights_that_a_training_refuses_exit_with_1(call, files, write_tiny, tmp_path):
    words = ("analyze_model.py", "--weights", files / "short.pth")
    done = call(*words, "--backbone", "timm/resnet18")
    assert done.returncode == 1
    assert "layer1.0.conv1.weight (1 names)" in done.stdout
    assert "refused: " in done.stderr
    config = ("--config-file", write_tiny(tmp_path), "model.backbone={name: timm/resnet18}")
    done = call(*words, *config)
    assert done.returncode == 1
    assert "refused: model.weights: " in done.stderr
    done = call(*words, *config, "model.ignore_missing=[layer1.0.conv1.weight]")
    assert done.returncode == 0, done.stderr


def test_weights_alone_must_be_a_run_folder(call, files, tmp_path):
    done = call("analyze_model.py", "--weights", files / "short.pth")
    assert done.returncode == 2
    assert "No model.json" in done.stderr
    save_backbone(tmp_path, build_backbone("cifar/resnet18", args={"width": 8}), {})
    done = call("analyze_model.py", "--weights", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(100.00%)" in done.stdout
