"""The first layer is found in our models, timm's and torchvision's."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from tract_transfer.models import DETECTORS, HEADS, Classifier, build_backbone
from tract_transfer.tract import TrAct, find_first_layers


def test_our_models_declare_their_first_layers():
    backbone = build_backbone("cifar/resnet18", args={"width": 16})
    assert find_first_layers(backbone) == ["model.conv1"]
    classifier = Classifier(backbone, HEADS.get("linear")(128, 3))
    assert find_first_layers(classifier) == ["backbone.model.conv1"]
    assert find_first_layers(nn.Sequential(classifier)) == ["0.backbone.model.conv1"]
    detector = DETECTORS.get("torchvision_fpn")(backbone, 3, fpn_channels=8, head_dim=8)
    assert find_first_layers(detector) == ["backbone.model.conv1"]


@pytest.mark.parametrize(
    "build, name, first",
    [
        (timm.create_model, "vit_tiny_patch16_224", ["patch_embed.proj"]),
        (timm.create_model, "tf_mobilenetv3_small_minimal_100", ["conv_stem"]),
        (timm.create_model, "mixer_s32_224", ["stem.proj"]),
        (timm.create_model, "repvgg_a0", ["stem.conv_kxk.conv", "stem.conv_1x1.conv"]),
        (timm.create_model, "crossvit_9_240", ["patch_embed.0.proj", "patch_embed.1.proj"]),
        (torchvision.models.get_model, "resnet18", ["conv1"]),
        (torchvision.models.get_model, "swin_t", ["features.0.0"]),
        (torchvision.models.get_model, "vit_b_16", ["conv_proj"]),
        # Its squeeze-and-excitation has 4 channels.
        (torchvision.models.get_model, "efficientnet_b0", ["features.0.0"]),
    ],
)
def test_models_declare_their_first_layers_or_have_one_that_reads_images(build, name, first):
    with torch.device("meta"):
        model = build(name)
    assert find_first_layers(model) == TrAct(model).layer_names == first


def test_layers_by_kind_and_channels():
    for channels in (1, 2, 4):
        model = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        assert find_first_layers(model) == ["0"]
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 2))
    assert find_first_layers(plain) == ["1"]
    text = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8))
    assert TrAct(text, layers=iter(["1"])).layer_names == ["1"]
    foreign = nn.Module()
    foreign.first_layers = nn.Sequential(nn.Conv2d(3, 4, 3))  # a module, not names
    assert find_first_layers(foreign) == ["first_layers.0"]
