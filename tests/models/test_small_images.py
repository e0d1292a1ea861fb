"""Backbones for 32 px: the paper's ResNet-18 and ViT, and the CIFAR stem of any other."""

import pytest
import torch
import torchvision
from timm.layers import Conv2dSame
from torch import nn

from tract_transfer.models import build_backbone

# ------------------------------------------------------------------------- the paper's models


def test_the_paper_s_resnet_is_torchvision_s_but_for_its_stem():
    ours = build_backbone("cifar/resnet18").model.state_dict()
    theirs = torchvision.models.resnet18(num_classes=1).state_dict()
    assert sum(t.numel() for n, t in ours.items() if "num_batches" not in n) == (
        sum(t.numel() for n, t in theirs.items() if "num_batches" not in n)
        - 64 * 3 * (7 * 7 - 3 * 3)
        - 513
    )
    assert ours["conv1.weight"].shape == (64, 3, 3, 3)
    assert {n: t.shape for n, t in ours.items() if "conv1" not in n[:5]} == {
        n: t.shape for n, t in theirs.items() if n not in ("conv1.weight", "fc.weight", "fc.bias")
    }


@pytest.mark.parametrize("max_pool, strides", [(True, [1, 2, 4, 8, 16]), (False, [1, 2, 4, 8])])
def test_the_paper_s_resnet_keeps_its_pool(max_pool, strides):
    backbone = build_backbone("cifar/resnet18", args={"width": 8, "max_pool": max_pool})
    assert [info.stride for info in backbone.pyramid().values()] == strides
    assert isinstance(backbone.model.maxpool, nn.MaxPool2d) == max_pool


def test_the_paper_s_vit():
    """64 tokens of 4x4 px and a class token, 7 layers of width 384 with an MLP as wide."""
    backbone = build_backbone("cifar/vit")
    model = backbone.model
    assert model.pos_embed.shape == (1, 65, 384)
    assert model.patch_embed.proj.weight.shape == (384, 3, 4, 4)
    assert len(model.blocks) == 7
    assert model.blocks[0].attn.num_heads == 12
    width = 384
    attention, mlp, norms = 4 * width * width + 4 * width, 2 * (width * width + width), 4 * width
    embedding = (3 * 4 * 4 + 1) * width + 65 * width + width
    total = sum(p.numel() for p in backbone.parameters())
    assert total == 7 * (attention + mlp + norms) + embedding + 2 * width
    assert (backbone.image_size_px, backbone.feature_dim) == (32, width)


# --------------------------------------------------------------------------------------- stems


@pytest.mark.parametrize(
    "name, stride",
    [
        ("timm/resnet18", 8),
        ("timm/tf_mobilenetv3_small_minimal_100", 16),
        ("torchvision/resnet18", 8),
        ("torchvision/densenet121", 8),
        ("torchvision/shufflenet_v2_x0_5", None),
    ],
)
def test_a_cifar_stem_is_3x3_of_stride_1_without_a_pool(name, stride):
    with torch.device("meta"):
        plain = build_backbone(name)
    backbone = build_backbone(name, stem="cifar").eval()
    assert backbone.origin == {"name": name, "stem": "cifar", "args": {}}
    stem = backbone.get_submodule(backbone.first_layers[0])
    old = plain.get_submodule(plain.first_layers[0])
    assert type(stem) is nn.Conv2d
    assert not isinstance(stem, Conv2dSame)
    assert stem.weight.shape == (old.out_channels, 3, 3, 3)
    assert (stem.stride, stem.padding) == ((1, 1), (1, 1))
    assert (stem.bias is None) == (old.bias is None)
    assert not any(n.endswith(("maxpool", "pool0")) and isinstance(m, nn.MaxPool2d)
                   for n, m in backbone.named_modules())  # fmt: skip
    if stride is not None:
        assert max(info.stride for info in backbone.map_info.values()) == stride
    with torch.no_grad():
        assert backbone.pooled(torch.rand(1, 3, 32, 32)).shape == (1, backbone.feature_dim)


@pytest.mark.parametrize("name", ["timm/test_convnext", "timm/test_vit", "timm/repvgg_a0"])
def test_a_stem_of_patches_or_of_several_layers_is_kept(name):
    with pytest.raises(ValueError, match=r"stem: cifar replaces the convolution.*patch_size"):
        build_backbone(name, stem="cifar")
