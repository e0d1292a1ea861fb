"""Backbones for 32 px: the paper's ResNet-18 and ViT of figures 3 and 4, and table 1's networks.

Those that timm or torchvision have are theirs with a 3x3 stem of stride 1 and no max-pool behind
it; docs/models.md lists all, with what differs from the implementation that table 1 was made with.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from tract_transfer.models.backbone import Backbone
from tract_transfer.models.backbones import (
    BACKBONES,
    CIFAR_MEAN,
    CIFAR_STD,
    TorchvisionBackbone,
    timm_backbone,
    torchvision_backbone,
)
from tract_transfer.models.stem import replace_stem

# --- Networks for 32 px that neither timm nor torchvision has.


def conv_norm_act(
    inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """A convolution that keeps the size (but for `stride`), its BatchNorm and ReLU."""
    conv = nn.Conv2d(
        inputs, outputs, size, stride=stride, padding=size // 2, groups=groups, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if act else []))


class Pooled(nn.Module):
    """`features` one after another, then their mean over all places: (B, C, H, W) -> (B, C)."""

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.features(images), 1).flatten(1)


# --------------------------------------------------------------------------------- SqueezeNet


class Fire(nn.Module):
    """1x1 convolutions squeeze, 1x1 and 3x3 expand; a bypass where the width stays."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        squeezed = outputs // 8
        self.squeeze = conv_norm_act(inputs, squeezed, 1)
        self.expand1 = conv_norm_act(squeezed, outputs // 2, 1)
        self.expand3 = conv_norm_act(squeezed, outputs // 2, 3)
        self.bypass = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.squeeze(x)
        out = torch.cat([self.expand1(squeezed), self.expand3(squeezed)], dim=1)
        return out + x if self.bypass else out


def build_squeezenet() -> Pooled:
    """SqueezeNet 1.0 with bypass: 96 channels in the stem, 512 at the end."""
    widths = (128, 128, 256, 256, 384, 384, 512, 512)
    layers: list[nn.Module] = [conv_norm_act(3, 96, 3), nn.MaxPool2d(2)]
    inputs = 96
    for number, width in enumerate(widths, start=2):
        layers.append(Fire(inputs, width))
        if number in (4, 8):
            layers.append(nn.MaxPool2d(2))
        inputs = width
    return Pooled(nn.Sequential(*layers))


# ------------------------------------------------------------------------------- ShuffleNet v1


class ShuffleUnit(nn.Module):
    """Grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1, and a shortcut (figure 2)."""

    def __init__(self, inputs: int, outputs: int, *, groups: int, stride: int, first: bool) -> None:
        super().__init__()
        branch, middle = outputs - inputs if stride == 2 else outputs, outputs // 4
        self.groups = groups
        # The 24 channels of the stem are too few to group (section 3.2).
        self.reduce = conv_norm_act(inputs, middle, 1, groups=1 if first else groups)
        self.depthwise = conv_norm_act(middle, middle, 3, stride=stride, groups=middle, act=False)
        self.expand = conv_norm_act(middle, branch, 1, groups=groups, act=False)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = F.channel_shuffle(self.reduce(x), self.groups)
        out = self.expand(self.depthwise(out))
        if self.stride == 1:
            return F.relu(out + x)
        return F.relu(torch.cat([F.avg_pool2d(x, 3, stride=2, padding=1), out], dim=1))


def build_shufflenet(
    groups: int = 3,
    widths: Sequence[int] = (240, 480, 960),
    depths: Sequence[int] = (4, 8, 4),
) -> Pooled:
    """ShuffleNet 1x of 3 groups; each stage begins with a unit of stride 2."""
    layers: list[nn.Module] = [conv_norm_act(3, 24, 3)]
    inputs = 24
    for width, depth in zip(widths, depths, strict=True):
        for index in range(depth):
            stride, first = (2 if index == 0 else 1), inputs == 24
            layers.append(ShuffleUnit(inputs, width, groups=groups, stride=stride, first=first))
            inputs = width
    return Pooled(nn.Sequential(*layers))


# ------------------------------------------------------------------------------------ NASNet-A


def separable(channels: int, size: int, *, stride: int = 1) -> nn.Sequential:
    """ReLU, depthwise and 1x1 convolution, BatchNorm: twice, the stride in the first."""
    layers: list[nn.Module] = []
    for each in (stride, 1):
        layers += [
            nn.ReLU(),
            nn.Conv2d(
                channels, channels, size, each, padding=size // 2, groups=channels, bias=False
            ),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        ]
    return nn.Sequential(*layers)


def project(inputs: int, outputs: int) -> nn.Sequential:
    """ReLU, a 1x1 convolution, BatchNorm."""
    return nn.Sequential(
        nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
    )


class HalfSize(nn.Module):
    """Half the size without losing every other place: two 1x1 convolutions of shifted places."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, bias=False)
        self.odd = nn.Conv2d(inputs, outputs - outputs // 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        halves = [self.even(x[:, :, ::2, ::2]), self.odd(shifted[:, :, ::2, ::2])]
        out: Tensor = self.norm(torch.cat(halves, dim=1))
        return out


class NormalCell(nn.Module):
    """The normal cell of figure 4: (h_{i-1}, h_i) -> 6C channels of the same size."""

    def __init__(self, before: int, inputs: int, channels: int, *, halve_before: bool) -> None:
        super().__init__()
        self.before = (HalfSize if halve_before else project)(before, channels)
        self.current = project(inputs, channels)
        self.current3, self.current5 = separable(channels, 3), separable(channels, 5)
        self.before3, self.before5 = separable(channels, 3), separable(channels, 5)
        self.before3_2 = separable(channels, 3)

    def forward(self, before: Tensor, current: Tensor) -> Tensor:
        p, h = self.before(before), self.current(current)
        blocks = [
            self.current3(h) + h,
            self.before3(p) + self.current5(h),
            _average(h) + p,
            2 * _average(p),
            self.before5(p) + self.before3_2(p),
        ]
        return torch.cat([p, *blocks], dim=1)


class ReductionCell(nn.Module):
    """The reduction cell of figure 4: (h_{i-1}, h_i) -> 4C channels of half the size."""

    def __init__(self, before: int, inputs: int, channels: int) -> None:
        super().__init__()
        self.before, self.current = project(before, channels), project(inputs, channels)
        self.before7, self.before7_2 = (separable(channels, 7, stride=2) for _ in range(2))
        self.before5, self.current5 = (separable(channels, 5, stride=2) for _ in range(2))
        self.inner3 = separable(channels, 3)

    def forward(self, before: Tensor, current: Tensor) -> Tensor:
        p, h = self.before(before), self.current(current)
        largest = F.max_pool2d(h, 3, stride=2, padding=1)
        inner = self.before7(p) + self.current5(h)
        second = largest + self.before7_2(p)
        third = _average(h, stride=2) + self.before5(p)
        return torch.cat(
            [second, third, largest + self.inner3(inner), _average(inner) + second], dim=1
        )


class Nasnet(nn.Module):
    """NASNet-A for small images: three stages of normal cells, a reduction between two."""

    def __init__(self, depth: int = 4, width: int = 44) -> None:
        super().__init__()
        self.stem = conv_norm_act(3, width, 3, act=False)
        self.cells = nn.ModuleList()
        before = inputs = width
        halve = False
        for stage in range(3):
            channels = width * 2**stage
            for _ in range(depth):
                self.cells.append(NormalCell(before, inputs, channels, halve_before=halve))
                before, inputs, halve = inputs, 6 * channels, False
            if stage < 2:
                self.cells.append(ReductionCell(before, inputs, 2 * channels))
                before, inputs, halve = inputs, 8 * channels, True
        self.feature_dim = inputs

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(F.relu(self.stages(images)[-1]), 1).flatten(1)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Return the last map of each of the three sizes."""
        before = current = self.stem(images)
        found = []
        for cell in self.cells:
            if isinstance(cell, ReductionCell):
                found.append(current)
            before, current = current, cell(before, current)
        return [*found, current]


def _average(x: Tensor, stride: int = 1) -> Tensor:
    return F.avg_pool2d(x, 3, stride=stride, padding=1, count_include_pad=False)


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
    backbone.set_normalization(CIFAR_MEAN, CIFAR_STD)
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
    backbone.set_normalization(CIFAR_MEAN, CIFAR_STD)
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
    return _own(TorchvisionBackbone, build_squeezenet(), 512, "features.0.0")


def _shufflenet() -> Backbone:
    return _own(TorchvisionBackbone, build_shufflenet(), 960, "features.0.0")


def _nasnet(depth: int = 4, width: int = 44) -> Backbone:
    model = Nasnet(depth, width)
    return _own(NasnetBackbone, model, model.feature_dim, "stem.0")


def _build(net: Net, **args: Any) -> Backbone:
    """Build a network of timm's or torchvision's for small images; `args` are its constructor's."""
    source, _, name = net.source.partition("/")
    make = timm_backbone if source == "timm" else torchvision_backbone
    backbone = make(name, {**net.args, **args}, False)
    backbone.usual_size_px = 32
    backbone.set_normalization(CIFAR100_MEAN, CIFAR100_STD)
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
