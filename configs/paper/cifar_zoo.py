"""A plug-in: the networks of the paper's table 1 for 32 px, other than ResNet-18.

`plugins: [paper/cifar_zoo.py]` in a config, or `--plugin paper/cifar_zoo.py`, adds `cifar/vgg16`
and 34 others; docs/guides/models.md lists them, and how they differ from the implementation behind
the table. Networks that timm or torchvision has are wrapped, with a 3x3 stem of stride 1 and
no max-pool; SqueezeNet, ShuffleNet and NASNet are implemented here.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation as ConvNormAct

from tract_transfer import BACKBONES, Backbone

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class Net(NamedTuple):
    """A network of table 1: its row, and `timm/<model>`, `torchvision/<model>` or `own` (below).

    `args` are the constructor's. Modules `at_stride_1` lose their stride; those in `without` go.
    """

    row: str
    source: str
    args: Mapping[str, Any] = {}
    at_stride_1: Sequence[str] = ()
    without: Sequence[str] = ()


_PLAIN = {"zero_init_last": False}
_DROPPED = {**_PLAIN, "drop_path_rate": 0.5}  # grows linearly with depth (Huang et al. 2016)
ZOO = {
    "squeezenet": Net("SqueezeNet", "own"),
    "mobilenet": Net("MobileNet", "timm/mobilenetv1_100"),
    "mobilenetv2": Net("MobileNetV2", "timm/mobilenetv2_100"),
    "shufflenet": Net("ShuffleNet", "own"),
    "shufflenetv2": Net("ShuffleNetV2", "torchvision/shufflenet_v2_x1_0"),
    **{f"vgg{n}": Net(f"VGG-{n}", f"torchvision/vgg{n}_bn") for n in (11, 13, 16, 19)},
    **{f"densenet{n}": Net(f"DenseNet{n}", f"torchvision/densenet{n}") for n in (121, 161, 201)},
    "googlenet": Net("GoogLeNet", "torchvision/googlenet", without=("maxpool1", "maxpool2")),
    "inceptionv3": Net("Inception-v3", "timm/inception_v3", without=("Pool1", "Pool2")),
    "inceptionv4": Net(
        "Inception-v4",
        "timm/inception_v4",
        at_stride_1=[f"features.{n}.{part}" for n in (3, 5) for part in ("maxpool", "conv.conv")],
    ),
    "inceptionresnetv2": Net(
        "Inception-RN-v2", "timm/inception_resnet_v2", without=("maxpool_3a", "maxpool_5a")
    ),
    "xception": Net("Xception", "timm/legacy_xception"),
    **{f"resnet{n}": Net(f"ResNet{n}", f"timm/resnet{n}", _PLAIN) for n in (34, 50, 101, 152)},
    "resnext50": Net("ResNeXt50", "timm/resnext50_32x4d", _PLAIN),
    "resnext101": Net("ResNeXt101", "timm/resnext101_32x4d", _PLAIN),
    "resnext152": Net("ResNeXt152", "timm/resnext50_32x4d", {**_PLAIN, "layers": (3, 4, 36, 3)}),
    **{
        f"seresnet{n}": Net(f"SE-ResNet{n}", f"timm/seresnet{n}", _PLAIN)
        for n in (18, 34, 50, 101, 152)
    },
    "nasnet": Net("NASNet", "own"),
    "wideresnet": Net(
        "Wide-RN-40-10",
        "timm/resnetv2_18",
        {**_PLAIN, "layers": (6, 6, 6), "channels": (160, 320, 640), "stem_chs": 16},
        without=("stem.pool",),
    ),
    **{
        f"stochasticdepth{n}": Net(f"StochD-RN-{n}", f"timm/resnet{n}", _DROPPED)
        for n in (18, 34, 50, 101)
    },
}


def _build(net: Net, **args: Any) -> Backbone:
    """Adapt a network of timm or torchvision to small images; `args` go to its constructor."""
    source, _, model_name = net.source.partition("/")
    backbone = BACKBONES.get(source)(model_name, {**net.args, **args}, False)
    backbone.usual_size_px = 32
    backbone.set_normalization(CIFAR100_MEAN, CIFAR100_STD)
    model = backbone.model
    if isinstance(model, torchvision.models.VGG):  # its stem is 3x3 with stride 1 already
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier[0] = nn.Linear(512, 4096)
        return backbone
    replace_stem(backbone)
    for name in net.without:
        model.set_submodule(name, nn.Identity())
    for name in net.at_stride_1:
        layer = model.get_submodule(name)
        layer.stride = (1, 1) if isinstance(layer, nn.Conv2d) else 1
    for block in model.modules() if net.row.startswith("ResNeXt") else ():
        if isinstance(block, Bottleneck):  # table 1's ResNeXts group the first convolution too
            old, groups = block.conv1, block.conv2.groups
            block.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 1, groups=groups, bias=False)
            nn.init.kaiming_normal_(block.conv1.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def replace_stem(backbone: Backbone) -> None:
    """Replace the first convolution by a 3x3 one of stride 1, and remove the max-pool behind it."""
    (name,) = backbone.first_layers
    old: Any = backbone.get_submodule(name)
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    backbone.set_submodule(name, new)
    for pool in ("maxpool", "features.pool0"):
        if pool in dict(backbone.model.named_modules()):
            backbone.model.set_submodule(pool, nn.Identity())


for _name, _net in ZOO.items():
    if _net.source != "own":
        BACKBONES.register(f"cifar/{_name}")(partial(_build, _net))


# Networks for 32 px that neither timm nor torchvision has.


@BACKBONES.register("cifar/squeezenet")
def cifar_squeezenet() -> Backbone:
    """SqueezeNet 1.0 with bypass: 96 channels in the stem, 512 at the end."""
    layers: list[nn.Module] = [ConvNormAct(3, 96, 3), nn.MaxPool2d(2)]
    inputs = 96
    for number, width in enumerate((128, 128, 256, 256, 384, 384, 512, 512), start=2):
        layers.append(Fire(inputs, width))
        if number in (4, 8):
            layers.append(nn.MaxPool2d(2))
        inputs = width
    return _pooled(layers, inputs)


@BACKBONES.register("cifar/shufflenet")
def cifar_shufflenet() -> Backbone:
    """ShuffleNet 1x with 3 groups; each stage starts with a unit of stride 2."""
    layers: list[nn.Module] = [ConvNormAct(3, 24, 3)]
    inputs = 24
    for width, depth in ((240, 4), (480, 8), (960, 4)):
        for index in range(depth):
            layers.append(ShuffleUnit(inputs, width, groups=3, stride=1 if index else 2))
            inputs = width
    return _pooled(layers, inputs)


@BACKBONES.register("cifar/nasnet")
def cifar_nasnet(depth: int = 4, width: int = 44) -> Backbone:
    """NASNet-A with `depth` normal cells per stage."""
    model = Nasnet(depth, width)
    return _wrap(NasnetBackbone, model, model.feature_dim, "stem.0")


def _pooled(layers: Sequence[nn.Module], feature_dim: int) -> Backbone:
    """Return a backbone whose features are the spatial mean after `layers`."""
    features, pool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(OrderedDict(features=features, pool=pool, flatten=nn.Flatten()))
    return _wrap(SequentialBackbone, model, feature_dim, "features.0.0")


def _wrap(kind: type[Backbone], model: nn.Module, feature_dim: int, first_layer: str) -> Backbone:
    options: Any = {"feature_dim": feature_dim, "first_layers": [first_layer]}
    backbone = kind(model, **options, mean=CIFAR100_MEAN, std=CIFAR100_STD)
    backbone.usual_size_px = 32
    return backbone


class SequentialBackbone(Backbone):
    """A network whose layers `model.features` each end with a feature map."""

    def maps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        features, maps = self.normalize(images), {}
        for name, layer in zip(self.map_names(), self.model.features, strict=True):
            maps[name] = features = layer(features)
        return {name: maps[name] for name in names}

    def map_names(self) -> list[str]:
        return [f"features.{index}" for index in range(len(self.model.features))]


class Fire(nn.Module):
    """SqueezeNet's block: 1x1 convolutions squeeze, 1x1 and 3x3 expand; a bypass at equal width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        squeezed = outputs // 8
        self.squeeze = ConvNormAct(inputs, squeezed, 1)
        self.expand1 = ConvNormAct(squeezed, outputs // 2, 1)
        self.expand3 = ConvNormAct(squeezed, outputs // 2, 3)
        self.bypass = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.squeeze(x)
        out = torch.cat([self.expand1(squeezed), self.expand3(squeezed)], dim=1)
        return out + x if self.bypass else out


class ShuffleUnit(nn.Module):
    """Grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1, and a shortcut (figure 2)."""

    def __init__(self, inputs: int, outputs: int, *, groups: int, stride: int) -> None:
        super().__init__()
        branch, middle = outputs - inputs if stride == 2 else outputs, outputs // 4
        self.groups = groups
        # The 24 channels of the stem are too few to group (section 3.2).
        self.reduce = ConvNormAct(inputs, middle, 1, groups=1 if inputs == 24 else groups)
        self.depthwise = ConvNormAct(
            middle, middle, 3, stride=stride, groups=middle, activation_layer=None
        )
        self.expand = ConvNormAct(middle, branch, 1, groups=groups, activation_layer=None)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = F.channel_shuffle(self.reduce(x), self.groups)
        out = self.expand(self.depthwise(out))
        if self.stride == 1:
            return F.relu(out + x)
        return F.relu(torch.cat([F.avg_pool2d(x, 3, stride=2, padding=1), out], dim=1))


def separable(channels: int, size: int, *, stride: int = 1) -> nn.Sequential:
    """Two times ReLU, depthwise and 1x1 convolution, BatchNorm; the first has the stride."""
    layers: list[nn.Module] = []
    for step in (stride, 1):
        layers += [
            nn.ReLU(),
            nn.Conv2d(channels, channels, size, step, size // 2, groups=channels, bias=False),
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
    """Halves the size: 1x1 convolutions at even and at odd positions, concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, bias=False)
        self.odd = nn.Conv2d(inputs, outputs - outputs // 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        odd = F.pad(x, (0, 1, 0, 1))[:, :, 1::2, 1::2]
        halves = [self.even(x[:, :, ::2, ::2]), self.odd(odd)]
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
    """NASNet-A for small images: three stages of normal cells, with a reduction cell between."""

    def __init__(self, depth: int = 4, width: int = 44) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, width, 3, activation_layer=None)
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
        """Return the last feature map of each of the three sizes."""
        before = current = self.stem(images)
        maps = []
        for cell in self.cells:
            if isinstance(cell, ReductionCell):
                maps.append(current)
            before, current = current, cell(before, current)
        return [*maps, current]


def _average(x: Tensor, stride: int = 1) -> Tensor:
    return F.avg_pool2d(x, 3, stride=stride, padding=1, count_include_pad=False)


class NasnetBackbone(Backbone):
    """NASNet-A with the last feature map of each size."""

    def maps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        stages = self.model.stages(self.normalize(images))
        maps = dict(zip(self.map_names(), stages, strict=True))
        return {name: maps[name] for name in names}

    def map_names(self) -> list[str]:
        return ["stage1", "stage2", "stage3"]
