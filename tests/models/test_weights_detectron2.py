"""Weights to detectron2's names and back, and that its own ResNet computes the same."""

import pickle
import warnings

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from tract_transfer.models import Backbone, build_backbone
from tract_transfer.models.weights_detectron2 import load_detectron2, save_detectron2, to_detectron2


def trained(name: str, **options) -> Backbone:
    """A backbone no weight, statistic or colour of which is a default."""
    torch.manual_seed(0)
    backbone = build_backbone(name, **options).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    backbone.set_normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    return backbone


def weights_of(backbone: Backbone) -> dict[str, Tensor]:
    """What a conversion carries: all but the count of batches."""
    state = backbone.state_dict()
    return {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}


@pytest.fixture(scope="module")
def resnet18():
    return trained("timm/resnet18")


@pytest.fixture(scope="module")
def resnet50():
    return trained("torchvision/resnet50")


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_there_and_back_is_the_same(resnet18, tmp_path, suffix):
    path = tmp_path / f"r18{suffix}"
    assert save_detectron2(path, resnet18, {"method": "tract"}) == tmp_path / "r18.yaml"
    back, card, aside = load_detectron2(path)
    assert (card, aside) == ({"method": "tract"}, [])
    assert back.origin["name"] == "torchvision/resnet18"
    expected = weights_of(resnet18)
    found = weights_of(back)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        exact = name not in ("mean", "std")  # these went through decimals of 255
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0 if exact else 1e-6)


def test_weights_for_bgr_come_back_for_rgb(resnet18, tmp_path):
    path = tmp_path / "r18.pth"
    beside = save_detectron2(path, resnet18, {})
    content = torch.load(path)
    content["model"]["stem.conv1.weight"] = content["model"]["stem.conv1.weight"].flip(1)
    torch.save(content, path)
    config = yaml.safe_load(beside.read_text())
    config["INPUT"]["FORMAT"] = "BGR"
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        config["MODEL"][key].reverse()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    back, *_ = load_detectron2(path, tmp_path / "config.yaml")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(back.eval().pooled(images), resnet18.pooled(images))


def test_a_detector_gives_its_resnet(resnet18, tmp_path):
    path = tmp_path / "model_final.pth"
    save_detectron2(path, resnet18, {})
    content = torch.load(path)
    placed = {f"backbone.{n}": t for n, t in content["model"].items() if not n.startswith("res5")}
    placed |= {f"roi_heads.{n}": t for n, t in content["model"].items() if n.startswith("res5")}
    placed["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(4, 8)
    torch.save({"model": placed, "iteration": 7}, path)
    back, card, aside = load_detectron2(path)
    assert card == {}
    assert aside == ["roi_heads.box_predictor.cls_score.weight"]
    assert torch.equal(back.model.layer4[1].conv2.weight, resnet18.model.layer4[1].conv2.weight)


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("timm/resnet18", {"stem": "cifar"}, "not the resnet18 that detectron2 would build"),
        ("timm/resnet18d", {}, r"has a conv1\.0\.weight, and detectron2's ResNet has no such"),
        ("timm/resnetblur18", {}, "not the resnet18 that detectron2 would build"),
        ("timm/resnet26", {}, r"\(2, 2, 2, 2\) bottleneck blocks"),
        ("timm/vit_tiny_patch16_224", {"args": {"depth": 1}}, "build_tract_transfer_backbone"),
    ],
)
def test_what_detectron2_would_compute_otherwise_is_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        to_detectron2(trained(name, **options))


class Command:
    """What a hostile pickle holds."""

    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_that_would_run_code_is_not_opened(resnet18, tmp_path, capsys, refused):
    path = tmp_path / "r18.pkl"
    save_detectron2(path, resnet18, {})
    path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": Command()}}))
    with refused(
        "a detectron2 .pkl that would run code", ValueError, match=r"not opened.*builtins\.print"
    ):
        load_detectron2(path)
    path.write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match=r"r18\.pkl"):
        load_detectron2(path)
    path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": np.array(["text"])}}))
    with pytest.raises(ValueError, match="names to arrays"):
        load_detectron2(path)
    assert capsys.readouterr().out == ""


def test_weights_alone_do_not_say_their_colours(resnet18, tmp_path):
    path = tmp_path / "r18.pkl"
    beside = save_detectron2(path, resnet18, {})
    text = beside.read_text()
    beside.write_text(text.replace("PIXEL_STD", "PIXEL"))
    with pytest.raises(ValueError, match=r"must say INPUT\.FORMAT"):
        load_detectron2(path)
    beside.write_text(text.replace("RGB", "L"))
    with pytest.raises(ValueError, match="RGB or BGR, got L"):
        load_detectron2(path)
    beside.unlink()
    with pytest.raises(FileNotFoundError, match="nothing says in which order"):
        load_detectron2(path)


def test_strides_in_the_1x1_convolutions_are_refused(resnet50, tmp_path, refused):
    path = tmp_path / "r50.pth"
    beside = save_detectron2(path, resnet50, {})
    assert "STRIDE_IN_1X1: false" in beside.read_text()
    beside.write_text(beside.read_text().replace("STRIDE_IN_1X1: false", "STRIDE_IN_1X1: true"))
    with refused(
        "detectron2 weights with strides in the 1x1 convolutions",
        ValueError,
        match="strides in the 1x1",
    ):
        load_detectron2(path)


def test_incomplete_weights_are_refused(resnet18, tmp_path):
    path = tmp_path / "r18.pth"
    save_detectron2(path, resnet18, {})
    content = torch.load(path)
    del content["model"]["res4.0.shortcut.norm.bias"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"missing \['layer3.0.downsample.1.bias'\]"):
        load_detectron2(path)
    torch.save({"model": {"conv1_w": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="no ResNet in detectron2's names"):
        load_detectron2(path)
    with pytest.raises(ValueError, match=r"reads \.pkl and \.pth files"):
        save_detectron2(tmp_path / "r18.safetensors", resnet18, {})


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_detectron2_s_resnet_computes_the_same(name, suffix, request, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("detectron2")
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import get_cfg
        from detectron2.modeling import build_backbone
    backbone = request.getfixturevalue(name)
    path = tmp_path / f"weights{suffix}"
    beside = save_detectron2(path, backbone, {})
    cfg = get_cfg()
    cfg.merge_from_file(str(beside))
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    assert cfg.INPUT.FORMAT == "RGB"
    theirs = nn.ModuleDict({"bottom_up": build_backbone(cfg)})  # as in a detector
    DetectionCheckpointer(theirs).load(cfg.MODEL.WEIGHTS)
    images = torch.rand(1, 3, 64, 96)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    with torch.no_grad():
        found = theirs.eval().bottom_up((255 * images - mean) / std)
        names = [f"layer{stage}" for stage in (1, 2, 3, 4)]
        expected = backbone.maps(images, names)
    for stage, tensor in zip(("res2", "res3", "res4", "res5"), expected.values(), strict=True):
        torch.testing.assert_close(found[stage], tensor, rtol=1e-5, atol=1e-5)
