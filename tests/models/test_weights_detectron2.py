"""Weights in detectron2's names and back; its own ResNet computes the same."""

import warnings

import pytest
import torch
import yaml
from torch import nn

from tract_transfer.models import Backbone, build_backbone
from tract_transfer.models.weights import load_weights
from tract_transfer.models.weights_detectron2 import load_detectron2, save_detectron2


def trained(name: str, **options) -> Backbone:
    """A backbone in which no weight, statistic or normalization has its default."""
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


@pytest.fixture(scope="module")
def resnet18():
    return trained("timm/resnet18")


@pytest.fixture
def saved(resnet18, tmp_path):
    """The weights and config of a ResNet-18."""
    return tmp_path / "r18.pth", save_detectron2(tmp_path / "r18.pth", resnet18, {})


def edit(file, change):
    """Change the content of a .pth file."""
    content = torch.load(file)
    change(content["model"])
    torch.save(content, file)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_round_trip_is_exact(resnet18, tmp_path, suffix):
    path = tmp_path / f"r18{suffix}"
    assert save_detectron2(path, resnet18, {"method": "tract"}) == tmp_path / "r18.yaml"
    backbone, metadata, skipped = load_detectron2(path)
    assert (metadata, skipped) == ({"method": "tract"}, [])
    assert backbone.origin["name"] == "torchvision/resnet18"
    state, expected = (
        {n: t for n, t in b.state_dict().items() if not n.endswith("num_batches_tracked")}
        for b in (backbone, resnet18)
    )
    for name in ("mean", "std"):  # rounded to decimals of 255
        torch.testing.assert_close(state.pop(name), expected.pop(name), rtol=0, atol=1e-6)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    other = build_backbone("timm/resnet18")
    load_weights(other, path)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other.eval().pooled(images), resnet18.pooled(images))


def test_bgr_weights_become_rgb_weights(resnet18, saved, tmp_path):
    path, config_file = saved
    edit(path, lambda model: model.update({k: model[k].flip(1) for k in ["stem.conv1.weight"]}))
    config = yaml.safe_load(config_file.read_text())
    config["INPUT"]["FORMAT"] = "BGR"
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        config["MODEL"][key].reverse()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    backbone, *_ = load_detectron2(path, tmp_path / "config.yaml")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval().pooled(images), resnet18.pooled(images))


def test_resnet_of_a_detector_is_found(resnet18, saved):
    path, _ = saved
    model = torch.load(path)["model"]
    parts = {n: f"{'roi_heads' if n.startswith('res5') else 'backbone'}.{n}" for n in model}
    model = {parts[name]: tensor for name, tensor in model.items()}
    model["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(4, 8)
    torch.save({"model": model, "iteration": 7}, path)
    backbone, metadata, skipped = load_detectron2(path)
    assert metadata == {}
    assert skipped == ["model.roi_heads.box_predictor.cls_score.weight"]
    assert torch.equal(backbone.model.layer4[1].conv2.weight, resnet18.model.layer4[1].conv2.weight)


@pytest.mark.parametrize(
    "name, options, match",
    [
        ("timm/resnet18", {"stem": "cifar"}, r"size mismatch for conv1\.weight"),
        ("timm/resnet18d", {}, r'Unexpected key.*"conv1\.0\.weight"'),
        ("timm/resnetblur18", {}, "not the resnet18 that detectron2 would build"),
        ("timm/resnet26", {}, r"\(2, 2, 2, 2\) bottleneck blocks"),
        ("timm/vit_tiny_patch16_224", {"args": {"depth": 1}}, "build_tract_transfer_backbone"),
    ],
)
def test_backbones_that_detectron2_cannot_build_are_refused(tmp_path, name, options, match):
    with pytest.raises(ValueError, match=match):
        save_detectron2(tmp_path / "w.pth", trained(name, **options), {})


@pytest.mark.parametrize(
    "old, new, match",
    [("PIXEL_STD", "PIXEL", r"must have INPUT\.FORMAT"), ("RGB", "L", "RGB or BGR, got L")],
)
def test_config_without_normalization_is_refused(saved, old, new, match):
    path, config_file = saved
    config_file.write_text(config_file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=match):
        load_detectron2(path)


def test_weights_without_config_are_refused(saved):
    path, config_file = saved
    config_file.unlink()
    for load in (load_detectron2, lambda path: load_weights(build_backbone("timm/resnet18"), path)):
        with pytest.raises(FileNotFoundError, match="channel order and normalization of"):
            load(path)


def test_strides_in_the_1x1_convolutions_are_refused(tmp_path, refused):
    path = tmp_path / "r50.pth"
    config_file = save_detectron2(path, trained("torchvision/resnet50"), {})
    text = config_file.read_text()
    assert "STRIDE_IN_1X1: false" in text
    config_file.write_text(text.replace("STRIDE_IN_1X1: false", "STRIDE_IN_1X1: true"))
    name = "detectron2 weights with strides in the 1x1 convolutions"
    with refused(name, ValueError, match="strides in the 1x1"):
        load_detectron2(path)


def test_files_without_a_complete_resnet_and_other_suffixes_are_refused(resnet18, saved):
    path, _ = saved
    edit(path, lambda model: model.pop("res4.0.shortcut.norm.bias"))
    with pytest.raises(ValueError, match=r'Missing .*"layer3.0.downsample.1.bias"'):
        load_detectron2(path)
    torch.save({"model": {"conv1_w": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="no ResNet in detectron2's names"):
        load_detectron2(path)
    with pytest.raises(ValueError, match=r"reads \.pkl and \.pth files"):
        save_detectron2(path.with_suffix(".safetensors"), resnet18, {})


@pytest.mark.parametrize(
    "name, suffix", [("timm/resnet18", ".pkl"), ("torchvision/resnet50", ".pth")]
)
def test_resnet_of_detectron2_computes_the_same(name, suffix, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("detectron2")
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import get_cfg
        from detectron2.modeling import build_backbone as build_theirs
    backbone = trained(name)
    config_file = save_detectron2(tmp_path / f"weights{suffix}", backbone, {})
    cfg = get_cfg()
    cfg.merge_from_file(str(config_file))
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    assert cfg.INPUT.FORMAT == "RGB"
    theirs = nn.ModuleDict({"bottom_up": build_theirs(cfg)})  # as in a detector
    DetectionCheckpointer(theirs).load(cfg.MODEL.WEIGHTS)
    images = torch.rand(1, 3, 64, 96)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    with torch.no_grad():
        features = theirs.eval().bottom_up((255 * images - mean) / std)
        expected = backbone.maps(images, [f"layer{stage}" for stage in (1, 2, 3, 4)])
    for stage, tensor in zip(("res2", "res3", "res4", "res5"), expected.values(), strict=True):
        torch.testing.assert_close(features[stage], tensor, rtol=1e-5, atol=1e-5)
