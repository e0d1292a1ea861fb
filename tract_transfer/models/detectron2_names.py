"""The names of a ResNet's weights in detectron2, and which ResNet a set of them is."""

# theirs are detectron2's names, ours those of timm and torchvision

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_NORM = "(weight|bias|running_mean|running_var)"
_TO_THEIRS = [
    (r"conv1\.weight", r"stem.conv1.weight"),
    (rf"bn1\.{_NORM}", r"stem.conv1.norm.\1"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.weight", r"res{stage}.\2.conv\3.weight"),
    (rf"layer(\d)\.(\d+)\.bn(\d)\.{_NORM}", r"res{stage}.\2.conv\3.norm.\4"),
    (r"layer(\d)\.(\d+)\.downsample\.0\.weight", r"res{stage}.\2.shortcut.weight"),
    (rf"layer(\d)\.(\d+)\.downsample\.1\.{_NORM}", r"res{stage}.\2.shortcut.norm.\3"),
]
_TO_OURS = [
    (r"stem\.conv1\.weight", r"conv1.weight"),
    (rf"stem\.conv1\.norm\.{_NORM}", r"bn1.\1"),
    (r"res(\d)\.(\d+)\.conv(\d)\.weight", r"layer{stage}.\2.conv\3.weight"),
    (rf"res(\d)\.(\d+)\.conv(\d)\.norm\.{_NORM}", r"layer{stage}.\2.bn\3.\4"),
    (r"res(\d)\.(\d+)\.shortcut\.weight", r"layer{stage}.\2.downsample.0.weight"),
    (rf"res(\d)\.(\d+)\.shortcut\.norm\.{_NORM}", r"layer{stage}.\2.downsample.1.\3"),
]
# Where a ResNet stands in an FPN, a C4 detector, or alone.
_PREFIX = re.compile(r"(?:backbone\.bottom_up\.|backbone\.|roi_heads\.(?=res5))?")
_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
# torchvision's name of a depth, number of groups and width of a group
_NAMES = {
    (50, 32, 4): "resnext50_32x4d",
    (101, 32, 8): "resnext101_32x8d",
    (101, 64, 4): "resnext101_64x4d",
    (50, 1, 128): "wide_resnet50_2",
    (101, 1, 128): "wide_resnet101_2",
    **{(depth, 1, 64): f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
}


def to_theirs(name: str) -> str | None:
    """Return detectron2's name of a weight called `name` by timm and torchvision, if it has one."""
    return _rename(name, _TO_THEIRS, stage_shift=1)


def to_ours(name: str) -> str | None:
    """Return the name in timm and torchvision of detectron2's `name`, which has no prefix."""
    return _rename(name, _TO_OURS, stage_shift=-1)


def without_prefix(name: str) -> str:
    """Return a name of detectron2's without the place the ResNet has in a detector."""
    return _PREFIX.sub("", name, count=1)


def _blocks(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """How many blocks each of the four stages has."""
    numbers = [re.match(r"res(\d)\.(\d+)\.", name) for name in tensors]
    found = {(int(n[1]), int(n[2])) for n in numbers if n is not None}
    return tuple(sum(stage == s for s, _ in found) for stage in (2, 3, 4, 5))


def resnets_section(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keys of MODEL.RESNETS that say which ResNet this is.

    Raises:
        ValueError: detectron2 has none of so many blocks.
    """
    bottleneck, blocks = "res2.0.conv3.weight" in tensors, _blocks(tensors)
    depth = _DEPTHS.get((bottleneck, blocks))
    if depth is None or "stem.conv1.weight" not in tensors:
        raise ValueError(
            f"detectron2's ResNets have the depths {sorted(_DEPTHS.values())}, and this one has "
            f"{blocks} {'bottleneck' if bottleneck else 'basic'} blocks in its stages."
        )
    width, inputs = tensors["res2.0.conv2.weight"].shape[:2]
    groups = width // inputs if bottleneck else 1
    return {
        "DEPTH": depth,
        "NUM_GROUPS": groups,
        "WIDTH_PER_GROUP": width // groups,
        "RES2_OUT_CHANNELS": tensors[f"res2.0.conv{3 if bottleneck else 2}.weight"].shape[0],
        "STEM_OUT_CHANNELS": tensors["stem.conv1.weight"].shape[0],
        "STRIDE_IN_1X1": False,
    }


def resnet_name(tensors: Mapping[str, Tensor]) -> str:
    """Torchvision's name of the ResNet that has these weights."""
    section = resnets_section(tensors)
    key = (section["DEPTH"], section["NUM_GROUPS"], section["WIDTH_PER_GROUP"])
    if key not in _NAMES:
        raise ValueError(
            f"No ResNet of torchvision has (depth, groups, width of a group) {key}; the known are "
            f"{sorted(_NAMES)}."
        )
    return _NAMES[key]


def _rename(name: str, rules: list[tuple[str, str]], stage_shift: int) -> str | None:
    """The name after the rule that matches all of it; `{stage}` is the first number, shifted."""
    for pattern, template in rules:
        if found := re.fullmatch(pattern, name):
            if "{stage}" in template:
                template = template.replace("{stage}", str(int(found[1]) + stage_shift))
            return found.expand(template)
    return None
