"""tools/convert_weights.py as its user runs it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tract_transfer.cli.convert import main
from tract_transfer.models import build_backbone
from tract_transfer.models.weights import (
    build_from_metadata,
    load_weights,
    read_metadata,
    save_backbone,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def convert(monkeypatch):
    """Run the tool's main() in this process; return its exit code."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, words)])
        return main()

    return run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    card = {"method": "tract", "lam": 0.1}
    save_backbone(folder, build_backbone("torchvision/resnet18"), card)
    return folder


def test_a_run_folder_goes_there_and_back(convert, run_folder, tmp_path, capsys):
    file, folder = tmp_path / "new" / "r18.pkl", tmp_path / "back"
    assert convert("--to", "detectron2", run_folder, file) == 0
    assert capsys.readouterr().out.split() == [str(file), str(file.with_suffix(".yaml"))]
    assert convert("--from", "detectron2", file, folder) == 0
    assert capsys.readouterr().out == f"{folder}: torchvision/resnet18\n"
    card = read_metadata(folder)
    assert (card["method"], card["lam"], card["converted_from"]) == ("tract", 0.1, str(file))
    pair = [build_from_metadata(read_metadata(each)).eval() for each in (run_folder, folder)]
    for backbone, each in zip(pair, (run_folder, folder), strict=True):
        load_weights(backbone, each)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(pair[1].pooled(images), pair[0].pooled(images))
    assert convert("--from", "detectron2", file, folder) == 2
    assert "holds a backbone already" in capsys.readouterr().err


def test_the_method_can_be_told(convert, run_folder, tmp_path):
    assert convert("--to", "detectron2", run_folder, tmp_path / "r18.pth") == 0
    words = ("--method", "mine", tmp_path / "r18.pth", tmp_path / "back")
    assert convert("--from", "detectron2", *words) == 0
    assert json.loads((tmp_path / "back" / "model.json").read_text())["method"] == "mine"


def test_what_is_wrong_is_said_in_a_line(convert, run_folder, tmp_path, capsys):
    assert convert("--to", "detectron2", tmp_path / "no", tmp_path / "r18.pkl") == 2
    assert "No model.json" in capsys.readouterr().err
    assert convert("--from", "detectron2", tmp_path / "no.pkl", tmp_path / "back") == 2
    assert "channel order and normalization" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert("--to", "detectron2", run_folder, tmp_path / "a.pkl", "--method", "mine")
    assert "go with --from" in capsys.readouterr().err
