"""The keys of a detector reach it."""

import pytest
import torch

from tract_transfer.build.model import build_model
from tract_transfer.build.trainer import build_tract
from tract_transfer.config.file import ConfigError

VGG = "model.backbone={name: timm/vgg11, args: {mlp_ratio: 0.01}}"


@pytest.fixture
def build(load_tiny, tmp_path):
    def build(*overrides):
        config = load_tiny(tmp_path, *overrides, task="detection")
        return config, build_model(config, num_classes=10)

    return build


@pytest.mark.parametrize("backbone", [None, VGG])
def test_a_frozen_stem_and_tract_exclude_each_other(build, backbone):
    words = [backbone, "model.detector={name: torchvision_c5}"] if backbone else []
    with pytest.raises(ConfigError, match=r"weight is frozen, so TrAct would do nothing"):
        build_tract(*build(*words, "model.freeze_at=2", "tract.enabled=true"))
    tract = build_tract(*build(*words, "tract.enabled=true"))
    assert len(tract.layer_names) == 1
    without = build_tract(*build(*words, "model.freeze_at=2"))
    assert without.layer_names == []


def test_freezing_and_norms_reach_the_backbone(build):
    _, model = build("model.freeze_at=3")
    frozen = {n.split(".")[2] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1", "layer2"}
    _, model = build("model.norm=frozen")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(".bn" in name or ".downsample.1." in name for name in frozen)
    _, model = build("model.norm=synced")
    assert isinstance(model.get_submodule("backbone.model.bn1"), torch.nn.SyncBatchNorm)
