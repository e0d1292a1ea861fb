"""tools/analyze_model.py counts what is known of a ResNet-18, and reads every kind of config."""

import json

import pytest


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
        (("--backbone", "timm/resnet19"), 1, "timm has no model 'resnet19'"),
        (("--backbone", "timm/resnet18", "--args", "{"), 1, "--args must be JSON"),
        (("--backbone", "timm/resnet18", "seed=1"), 1, "give --config-file"),
        (("--config-file", "nowhere.yaml"), 2, "No config can be read"),
    ):
        said = call("analyze_model.py", *words)
        assert said.returncode == code
        assert wanted in said.stderr
        assert "Traceback" not in said.stderr
