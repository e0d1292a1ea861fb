"""What a config says of a detector reaches it, or is refused with the place it was said."""

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


@pytest.mark.parametrize(
    "words, says",
    [
        (["model.freeze_at=6"], r"model\.freeze_at: .*less than or equal to 5"),
        (["model.norm=fixed"], r"model\.norm: .*'trained', 'frozen' or 'synced'"),
        ([VGG, "model.norm=frozen"], r"model\.norm: frozen is for BatchNorms.*\(command line\)"),
        (
            ["model.detector.args.rpn.nms_io=0.5"],
            r"model\.detector\.args\.rpn\.nms_io: unknown\. Did you mean 'nms_iou'\?.*command line",
        ),
        (
            ["model.detector.args.box.max_detections=0"],
            r"model\.detector\.args\.box\.max_detections: .*greater than or equal to 1, got 0",
        ),
        (["model.detector.args.box=7"], r"model\.detector\.args\.box: .*(?:mapping|dict)"),
        (
            ["model.detector.args.difficult_in_training=leave"],
            r"args\.difficult_in_training: .*'keep', 'drop' or 'ignore'",
        ),
        (["model.detector.args.num_proposals=5"], r"args\.num_proposals: unknown"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_key_says_where_it_was_set(build, words, says):
    with pytest.raises(ConfigError, match=says):
        build(*words)
