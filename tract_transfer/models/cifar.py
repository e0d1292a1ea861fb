"""Backbones for 32 px: the paper's ResNet-18 and ViT of figures 3 and 4, and table 1's networks.

Those that timm or torchvision have are theirs with a 3x3 stem of stride 1 and no max-pool behind
it; docs/models.md lists all, with what differs from the implementation that table 1 was made with.
"""

# B images, D features

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torchvision
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from tract_transfer.models import cifar_nets
from tract_transfer.models.backbones import (
    BACKBONES,
    CIFAR_MEAN,
    CIFAR_STD,
    Backbone,
    TorchvisionBackbone,
    timm_backbone,
    torchvision_backbone,
)
from tract_transfer.models.stem import replace_stem

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@BACKBONES.register("cifar/resnet18")
def cifar_resnet18(width: int = 64, max_pool: bool = True) -> Backbone:
    """The paper's ResNet-18 for 32 px: a 3x3 stem of stride 1, the max-pool kept (figure 3).

    `width` is that of the first of four stages, 64 in the paper; the stem always has 64 channels.
    Table 1's has no max-pool.
    """
    channels = tuple(width * factor for factor in (1, 2, 4, 8))
    backbone = timm_backbone("resnet18", {"channels": channels, "zero_init_last": False}, False)
    replace_stem(backbone, keep_pool=max_pool)
    backbone.set_colours(CIFAR_MEAN, CIFAR_STD)
    return backbone


@BACKBONES.register("cifar/vit")
def cifar_vit(
    depth: int = 7, width: int = 384, num_heads: int = 12, patch_size_px: int = 4
) -> Backbone:
    """The paper's ViT for 32 px: 4x4 patches, a class token, an MLP as wide as it (figure 4)."""
    args = {
        "img_size": 32,
        "patch_size": patch_size_px,
        "depth": depth,
        "num_heads": num_heads,
        "embed_dim": width,
        "mlp_ratio": 1,
    }
    backbone = timm_backbone("vit_small_patch16_224", args, False)
    backbone.set_colours(CIFAR_MEAN, CIFAR_STD)
    return backbone


class Net(NamedTuple):
    """A network of table 1, `row` its name there; `args` go to the source's constructor.

    Of the modules named in `at_stride_1` the stride becomes 1; `without` are left out.
    """

    row: str
    source: str
    args: Mapping[str, Any] = {}
    at_stride_1: Sequence[str] = ()
    without: Sequence[str] = ()


_PLAIN = {"zero_init_last": False}
_DROPPED = {**_PLAIN, "drop_path_rate": 0.5}  # linear in depth, as in the paper (Huang 2016)
ZOO = {
    "squeezenet": Net("SqueezeNet", "own"),
    "mobilenet": Net("MobileNet", "timm/mobilenetv1_100"),
    "mobilenetv2": Net("MobileNetV2", "timm/mobilenetv2_100"),
    "shufflenet": Net("ShuffleNet", "own"),
    "shufflenetv2": Net("ShuffleNetV2", "torchvision/shufflenet_v2_x1_0"),
    "vgg11": Net("VGG-11", "torchvision/vgg11_bn"),
    "vgg13": Net("VGG-13", "torchvision/vgg13_bn"),
    "vgg16": Net("VGG-16", "torchvision/vgg16_bn"),
    "vgg19": Net("VGG-19", "torchvision/vgg19_bn"),
    "densenet121": Net("DenseNet121", "torchvision/densenet121"),
    "densenet161": Net("DenseNet161", "torchvision/densenet161"),
    "densenet201": Net("DenseNet201", "torchvision/densenet201"),
    "googlenet": Net("GoogLeNet", "torchvision/googlenet", without=("maxpool1", "maxpool2")),
    "inceptionv3": Net("Inception-v3", "timm/inception_v3", without=("Pool1", "Pool2")),
    "inceptionv4": Net(
        "Inception-v4",
        "timm/inception_v4",
        at_stride_1=(
            "features.3.maxpool",
            "features.3.conv.conv",
            "features.5.maxpool",
            "features.5.conv.conv",
        ),
    ),
    "inceptionresnetv2": Net(
        "Inception-RN-v2", "timm/inception_resnet_v2", without=("maxpool_3a", "maxpool_5a")
    ),
    "xception": Net("Xception", "timm/legacy_xception"),
    "resnet34": Net("ResNet34", "timm/resnet34", _PLAIN),
    "resnet50": Net("ResNet50", "timm/resnet50", _PLAIN),
    "resnet101": Net("ResNet101", "timm/resnet101", _PLAIN),
    "resnet152": Net("ResNet152", "timm/resnet152", _PLAIN),
    "resnext50": Net("ResNeXt50", "timm/resnext50_32x4d", _PLAIN),
    "resnext101": Net("ResNeXt101", "timm/resnext101_32x4d", _PLAIN),
    "resnext152": Net("ResNeXt152", "timm/resnext50_32x4d", {**_PLAIN, "layers": (3, 4, 36, 3)}),
    "seresnet18": Net("SE-ResNet18", "timm/seresnet18", _PLAIN),
    "seresnet34": Net("SE-ResNet34", "timm/seresnet34", _PLAIN),
    "seresnet50": Net("SE-ResNet50", "timm/seresnet50", _PLAIN),
    "seresnet101": Net("SE-ResNet101", "timm/seresnet101", _PLAIN),
    "seresnet152": Net("SE-ResNet152", "timm/seresnet152", _PLAIN),
    "nasnet": Net("NASNet", "own"),
    "wideresnet": Net(
        "Wide-RN-40-10",
        "timm/resnetv2_18",
        {**_PLAIN, "layers": (6, 6, 6), "channels": (160, 320, 640), "stem_chs": 16},
        without=("stem.pool",),
    ),
    "stochasticdepth18": Net("StochD-RN-18", "timm/resnet18", _DROPPED),
    "stochasticdepth34": Net("StochD-RN-34", "timm/resnet34", _DROPPED),
    "stochasticdepth50": Net("StochD-RN-50", "timm/resnet50", _DROPPED),
    "stochasticdepth101": Net("StochD-RN-101", "timm/resnet101", _DROPPED),
}


class NasnetBackbone(Backbone):
    """NASNet-A, whose maps are the last of each size."""

    def maps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        found = dict(zip(self._map_names(), self.model.stages(self.normalize(images)), strict=True))
        return {name: found[name] for name in names}

    def _map_names(self) -> list[str]:
        return ["stage1", "stage2", "stage3"]


def _own(kind: type[Backbone], model: nn.Module, feature_dim: int, first: str) -> Backbone:
    backbone = kind(
        model,
        feature_dim=feature_dim,
        first_layers=[first],
        mean=CIFAR100_MEAN,
        std=CIFAR100_STD,
    )
    backbone.usual_size_px = 32
    return backbone


def _squeezenet() -> Backbone:
    return _own(TorchvisionBackbone, cifar_nets.squeezenet(), 512, "features.0.0")


def _shufflenet() -> Backbone:
    return _own(TorchvisionBackbone, cifar_nets.shufflenet(), 960, "features.0.0")


def _nasnet(depth: int = 4, width: int = 44) -> Backbone:
    model = cifar_nets.Nasnet(depth, width)
    return _own(NasnetBackbone, model, model.feature_dim, "stem.0")


def _build(net: Net, **args: Any) -> Backbone:
    """Build a network of timm's or torchvision's for small images; `args` are its constructor's."""
    source, _, name = net.source.partition("/")
    make = timm_backbone if source == "timm" else torchvision_backbone
    backbone = make(name, {**net.args, **args}, False)
    backbone.usual_size_px = 32
    backbone.set_colours(CIFAR100_MEAN, CIFAR100_STD)
    model = backbone.model
    if isinstance(model, torchvision.models.VGG):  # its stem is 3x3 of stride 1 already
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier[0] = nn.Linear(512, 4096)
        return backbone
    replace_stem(backbone)
    for name in net.without:
        model.set_submodule(name, nn.Identity())
    for name in net.at_stride_1:
        layer = model.get_submodule(name)
        layer.stride = (1, 1) if isinstance(layer, nn.Conv2d) else 1
    if net.row.startswith("ResNeXt"):
        _group_first_convolutions(model)
    return backbone


def _group_first_convolutions(model: nn.Module) -> None:
    """Group the 1x1 convolutions that begin a block of ResNeXt, as table 1's networks do."""
    for block in model.modules():
        if isinstance(block, Bottleneck):
            old = block.conv1
            groups = block.conv2.groups
            block.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 1, groups=groups, bias=False)
            nn.init.kaiming_normal_(block.conv1.weight, mode="fan_out", nonlinearity="relu")


OWN: dict[str, Callable[..., Backbone]] = {
    "squeezenet": _squeezenet,
    "shufflenet": _shufflenet,
    "nasnet": _nasnet,
}
for _name, _net in ZOO.items():
    BACKBONES.register(f"cifar/{_name}")(OWN.get(_name) or partial(_build, _net))
