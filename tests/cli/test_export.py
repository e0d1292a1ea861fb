"""convert_weights.py writes weights that read back the same; run/test_export.py has the exports."""

import json

import pytest
import torch

from tract_transfer.models import build_backbone
from tract_transfer.models.weights import (
    build_from_metadata,
    load_weights,
    read_metadata,
    save_backbone,
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_backbone(folder, build_backbone("torchvision/resnet18"), {"method": "tract", "lam": 0.1})
    return folder


def test_a_run_folder_converts_to_detectron2_and_back(call, run_folder, tmp_path):
    file, folder = tmp_path / "new" / "r18.pkl", tmp_path / "back"
    done = call("convert_weights.py", "--to", "detectron2", run_folder, file)
    assert done.stdout.split() == [str(file), str(file.with_suffix(".yaml"))]
    back = ("convert_weights.py", "--from", "detectron2", file)
    assert call(*back, folder).stdout == f"{folder}: torchvision/resnet18\n"
    metadata = read_metadata(folder)
    assert (metadata["method"], metadata["lam"]) == ("tract", 0.1)
    assert metadata["converted_from"] == str(file)
    images = torch.rand(1, 3, 64, 64)
    features = []
    for source in (run_folder, folder):
        backbone = build_from_metadata(read_metadata(source)).eval()
        load_weights(backbone, source)
        with torch.no_grad():
            features.append(backbone.pooled(images))
    torch.testing.assert_close(*features)
    again = call(*back, folder)
    assert again.returncode == 2
    assert "already contains a backbone" in again.stderr
    assert call(*back, tmp_path / "mine", "--method", "mine").returncode == 0
    assert json.loads((tmp_path / "mine/model.json").read_text())["method"] == "mine"
