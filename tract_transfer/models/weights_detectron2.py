"""Converts ResNet weights to detectron2's names and back, with the config that belongs to them.

detectron2's checkpoints do not record the channel order and normalization of their images. So each
file comes with a YAML in detectron2's own keys, which `cfg.merge_from_file` reads.
"""

import copy
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tract_transfer.models.backbone import Backbone
from tract_transfer.models.backbones import build_backbone
from tract_transfer.models.weights_file import read_content
from tract_transfer.models.weights_match import RESNET_DEPTHS, blocks_per_stage

# Where a ResNet is in the file of an FPN detector, of a C4 detector, or of a ResNet alone.
_PREFIX = re.compile(r"(?:model\.)?(?:backbone\.bottom_up\.|backbone\.|roi_heads\.(?=res5))?")
# The names of timm and torchvision -> detectron2's, rule by rule.
_RULES = [
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    *((rf"^layer{stage}\.", f"res{stage + 1}.") for stage in (1, 2, 3, 4)),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
]
_NAME = re.compile(
    r"(stem\.conv1|res[2-5]\.\d+\.(conv\d|shortcut))"
    r"\.(weight|norm\.(weight|bias|running_mean|running_var))"
)
# (depth, groups, width of a group) -> torchvision's name
_RESNETS = {
    (50, 32, 4): "resnext50_32x4d",
    (101, 32, 8): "resnext101_32x8d",
    (101, 64, 4): "resnext101_64x4d",
    (50, 1, 128): "wide_resnet50_2",
    (101, 1, 128): "wide_resnet101_2",
    **{(depth, 1, 64): f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
}


def save_detectron2(path: Path, backbone: Backbone, metadata: Mapping[str, Any]) -> Path:
    """Write a ResNet as detectron2's `.pkl` or `.pth`, and its config beside it; return the latter.

    `metadata` is stored in the file; detectron2 ignores it. A ValueError reports a backbone that
    detectron2 cannot build.
    """
    if path.suffix not in (".pkl", ".pth"):
        raise ValueError(f"detectron2 reads .pkl and .pth files, got {path}.")
    tensors, resnets = _convert(backbone)
    # matching_heuristics lets detectron2 match names below `backbone.bottom_up.` too.
    content = {"__author__": "tract_transfer", "matching_heuristics": True, "card": dict(metadata)}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        torch.save({"model": tensors, **content}, path)
    else:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        path.write_bytes(pickle.dumps({"model": arrays, **content}, protocol=4))
    config_file = path.with_suffix(".yaml")
    model = {**pixel_normalization(backbone), "RESNETS": resnets, "WEIGHTS": str(path)}
    config = {"INPUT": {"FORMAT": "RGB"}, "MODEL": model}
    config_file.write_text(yaml.safe_dump(config, sort_keys=False, default_flow_style=None))
    return config_file


def pixel_normalization(backbone: Backbone) -> dict[str, list[float]]:
    """Return MODEL.PIXEL_MEAN and PIXEL_STD for a backbone, of RGB images in 0..255."""
    # 4 decimals in 0..255 are finer than float32 in 0..1, and give familiar values: 123.675.
    return {
        key: [round(255 * value, 4) for value in buffer.flatten().tolist()]
        for key, buffer in (("PIXEL_MEAN", backbone.mean), ("PIXEL_STD", backbone.std))
    }


@torch.no_grad()
def _convert(backbone: Backbone) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights in the names of detectron2's ResNet, on the CPU, and MODEL.RESNETS.

    Stems and pools have no names there, so the outputs are compared with torchvision's ResNet.
    """
    model = copy.deepcopy(backbone.model).cpu().eval()
    state = model.state_dict()
    tensors = {
        _detectron2_name(name): tensor
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")  # detectron2's frozen norms have none
    }
    try:
        name, resnets = _architecture(tensors)
        reference = build_backbone(f"torchvision/{name}").model.eval()
        reference.load_state_dict(state)
        images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        output, expected = model(images), reference(images)
        if not torch.allclose(output, expected, 1e-3, 1e-4 * float(expected.abs().max())):
            raise ValueError(f"It is not the {name} that detectron2 would build.")
    except (ValueError, RuntimeError) as error:  # load_state_dict raises a RuntimeError
        raise ValueError(
            f"detectron2's ResNet cannot be {backbone.origin['name']} (stem "
            f"{backbone.origin['stem']}). {error} Convert a plain ResNet of timm or torchvision, "
            "or use the backbone itself there: build_tract_transfer_backbone."
        ) from error
    return tensors, resnets


def load_detectron2(
    path: Path, config_file: Path | None = None
) -> tuple[Backbone, dict[str, Any], list[str]]:
    """Return the ResNet in detectron2's `.pkl` or `.pth` file, our metadata in it, skipped names.

    The input channels of weights for BGR images are reversed.

    Args:
        path: a ResNet alone, or a complete detector, whose heads and pyramid are skipped.
        config_file: the config.yaml of its training; by default a YAML beside the weights.

    Raises:
        FileNotFoundError, ValueError: no weights or config; or no ResNet that torchvision has.
    """
    config_file = config_file or path.with_suffix(".yaml")
    channels, mean, std, has_stride_in_1x1 = _read_config(config_file, path)
    tensors, content = read_content(path)
    resnet: dict[str, Tensor] = {}
    skipped = []
    for name, tensor in tensors.items():
        bare = _PREFIX.sub("", name, count=1)
        if bare in resnet or _NAME.fullmatch(bare) is None:
            skipped.append(name)
        else:
            resnet[bare] = tensor
    if not resnet:
        raise ValueError(
            f"{path} holds no ResNet in detectron2's names (stem.conv1.weight, ...). Load and save "
            "a file in Caffe2's names with detectron2 first."
        )
    backbone = build_backbone(f"torchvision/{_architecture(resnet)[0]}")
    if "res2.0.conv3.weight" in resnet and has_stride_in_1x1:
        raise ValueError(
            f"{path} has its strides in the 1x1 convolutions (MODEL.RESNETS.STRIDE_IN_1X1, the "
            "original MSRA models), and torchvision's ResNet in the 3x3. Convert a model trained "
            "with STRIDE_IN_1X1 False."
        )
    _load(backbone, resnet, path)
    if channels == "BGR":
        weight, mean, std = backbone.model.conv1.weight.data, mean[::-1], std[::-1]
        weight.copy_(weight.flip(1))
    backbone.set_normalization(*((torch.tensor(v) / 255).tolist() for v in (mean, std)))
    metadata = content.get("card")
    return backbone, metadata if isinstance(metadata, dict) else {}, skipped


def _load(backbone: Backbone, resnet: Mapping[str, Tensor], path: Path) -> None:
    state = backbone.model.state_dict()
    names = {name: _detectron2_name(name) for name in state}
    counts = {name: count for name, count in state.items() if name.endswith("num_batches_tracked")}
    tensors = {name: resnet[theirs] for name, theirs in names.items() if theirs in resnet}
    try:
        backbone.model.load_state_dict({**counts, **tensors})
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit {backbone.origin['name']}: convert the complete ResNet. {error}"
        ) from error


def _detectron2_name(name: str) -> str:
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def _architecture(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Return torchvision's name of the ResNet with these weights, and MODEL.RESNETS for it."""
    bottleneck = "res2.0.conv3.weight" in tensors
    kind, last = ("bottleneck", 3) if bottleneck else ("basic", 2)
    blocks = blocks_per_stage(tensors, r"res([2-5])\.(\d+)\.conv2.weight", first=2)
    depth = RESNET_DEPTHS.get((bottleneck, blocks), 0)
    width, inputs = tensors["res2.0.conv2.weight"].shape[:2] if depth else (0, 1)
    groups = width // inputs if bottleneck and depth else 1
    if (depth, groups, width // groups) not in _RESNETS:
        raise ValueError(
            f"torchvision has no ResNet with {blocks} {kind} blocks in its stages and {groups} "
            f"groups of {width // groups} channels, only {sorted(_RESNETS.values())}."
        )
    section = {
        "DEPTH": depth,
        "NUM_GROUPS": groups,
        "WIDTH_PER_GROUP": width // groups,
        "RES2_OUT_CHANNELS": tensors[f"res2.0.conv{last}.weight"].shape[0],
        "STEM_OUT_CHANNELS": 64,
        "STRIDE_IN_1X1": False,
    }
    return _RESNETS[depth, groups, width // groups], section


def _read_config(file: Path, weights: Path) -> tuple[str, list[float], list[float], bool]:
    """Return the channel order, mean and std in 0..255, and whether 1x1 convolutions stride."""
    if not file.is_file():
        raise FileNotFoundError(
            f"No {file}, so the channel order and normalization of {weights} are unknown. Give the "
            "config of its training: detectron2 writes OUTPUT_DIR/config.yaml."
        )
    try:
        config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        model, channels = config["MODEL"], config["INPUT"]["FORMAT"]
        values = model["PIXEL_MEAN"], model["PIXEL_STD"], model["RESNETS"]["STRIDE_IN_1X1"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} must have INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and "
            f"MODEL.RESNETS.STRIDE_IN_1X1: {error}. Take the config.yaml that detectron2 wrote."
        ) from error
    if channels not in ("RGB", "BGR"):
        raise ValueError(f"{file}: INPUT.FORMAT must be RGB or BGR, got {channels}.")
    return channels, *values
