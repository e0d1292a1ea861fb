"""Networks for 32 px that neither timm nor torchvision has.

SqueezeNet (Iandola 2016, arXiv 1602.07360, with the simple bypass of its section 6, and batch
normalisation, without which it does not train at the zoo's learning rate), ShuffleNet v1 (Zhang
2018, arXiv 1707.01083, table 1) and NASNet-A (Zoph 2018, arXiv 1707.07012, figure 4).
"""

# B images, C channels, H height and W width of a map

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def squeezenet() -> Pooled:
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


def shufflenet(
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
