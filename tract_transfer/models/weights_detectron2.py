"""ResNet weights to detectron2's names and back, and what must travel beside them.

detectron2's checkpoints do not say in which order and by what their images are normalised. So a
file goes with a YAML in detectron2's own keys, which `cfg.merge_from_file` takes as it stands.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from tract_transfer.models.backbone import Backbone
from tract_transfer.models.backbones import build_backbone
from tract_transfer.models.weights_file import flat_tensors, read_content

# --- The names of a ResNet's weights in detectron2, and which ResNet a set of them is.

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


AUTHOR = "tract_transfer"


def save_detectron2(path: Path, backbone: Backbone, card: Mapping[str, Any]) -> Path:
    """Write a ResNet as detectron2's `.pkl` or `.pth`, and beside it what its config must say.

    Args:
        path: ends in .pkl or .pth.
        backbone: any ResNet of torchvision's architecture, of timm or torchvision.
        card: goes into the file as it is; detectron2 passes it over.

    Returns:
        The path of the YAML, `path` with the suffix .yaml.

    Raises:
        ValueError: the backbone is none that detectron2 can build, or `path` ends otherwise.
    """
    if path.suffix not in (".pkl", ".pth"):
        raise ValueError(f"detectron2 reads .pkl and .pth files, got {path}.")
    tensors = to_detectron2(backbone)
    config = _config_of(tensors, backbone)
    config["MODEL"]["WEIGHTS"] = str(path)
    # matching_heuristics lets the names be found below `backbone.bottom_up.` too.
    content = {"__author__": AUTHOR, "matching_heuristics": True, "card": dict(card)}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        torch.save({"model": tensors, **content}, path)
    else:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        path.write_bytes(pickle.dumps({"model": arrays, **content}, protocol=4))
    beside = path.with_suffix(".yaml")
    beside.write_text(yaml.safe_dump(config, sort_keys=False, default_flow_style=None))
    return beside


def to_detectron2(backbone: Backbone) -> dict[str, Tensor]:
    """Return the weights under the names of detectron2's ResNet, on the CPU.

    Raises:
        ValueError: detectron2's ResNet has no place for them, or would compute something else.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in backbone.model.state_dict().items():
        if name.endswith("num_batches_tracked"):  # detectron2's frozen norms have none
            continue
        renamed = to_theirs(name)
        if renamed is None:
            raise ValueError(
                f"{backbone.origin.get('name')} has a {name}, and detectron2's ResNet has no such "
                "layer. A plain ResNet of timm or torchvision with its 7x7 stem can be converted; "
                "for others use the backbone itself: build_tract_transfer_backbone."
            )
        tensors[renamed] = tensor.detach().cpu().clone()
    _check_computes_the_same(backbone, resnet_name(tensors))
    return tensors


class Converted(NamedTuple):
    """A ResNet of detectron2's; the card its file held, if any; and names that were left aside."""

    backbone: Backbone
    card: dict[str, Any]
    aside: list[str]


def load_detectron2(path: Path, config_file: Path | None = None) -> Converted:
    """Return the ResNet of detectron2's `.pkl` or `.pth` file.

    Colours come out RGB in [0, 1]: of weights for BGR images the first layer's inputs are turned.

    Args:
        path: alone, or a whole detector's; heads and pyramid are left aside.
        config_file: a YAML with INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and
            MODEL.RESNETS.STRIDE_IN_1X1, as detectron2 writes into every OUTPUT_DIR; None takes
            the one beside the weights.

    Raises:
        FileNotFoundError: no weights, or nothing that says how images are normalised.
        ValueError: the file cannot be read, holds no ResNet, or one that is not torchvision's.
    """
    config = _read_config(config_file or path.with_suffix(".yaml"), path)
    ours: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    aside = []
    tensors, card = _read(path)
    for name, tensor in tensors.items():
        bare = without_prefix(name)
        renamed = to_ours(bare)
        if renamed is None or renamed in ours:
            aside.append(name)
        else:
            ours[renamed], theirs[bare] = tensor, tensor
    if not theirs:
        raise ValueError(
            f"{path} holds no ResNet in detectron2's names (stem.conv1.weight, ...). Files in "
            "Caffe2's names become such ones when detectron2 loads and saves them."
        )
    backbone = build_backbone(f"torchvision/{resnet_name(theirs)}")
    _check_strides(config, path, bottleneck="res2.0.conv3.weight" in theirs)
    mean, std = (torch.tensor(config["MODEL"][key]) / 255 for key in ("PIXEL_MEAN", "PIXEL_STD"))
    if config["INPUT"]["FORMAT"] == "BGR":
        ours["conv1.weight"], mean, std = ours["conv1.weight"].flip(1), mean.flip(0), std.flip(0)
    backbone.set_normalization(mean.tolist(), std.tolist())
    _load(backbone, ours, path)
    return Converted(backbone, card, aside)


def _load(backbone: Backbone, tensors: Mapping[str, Tensor], path: Path) -> None:
    wanted = backbone.model.state_dict()
    missing = [n for n in wanted if n not in tensors and not n.endswith("num_batches_tracked")]
    misshapen = [n for n, tensor in tensors.items() if wanted[n].shape != tensor.shape]
    if missing or misshapen:
        raise ValueError(
            f"{path} does not fit torchvision's {backbone.origin['name']}: missing {missing[:4]}, "
            f"of another shape {misshapen[:4]}. Convert weights that hold the whole ResNet."
        )
    backbone.model.load_state_dict(tensors, strict=False)


def _config_of(tensors: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Any]:
    def pixels(values: Tensor) -> list[float]:
        # 4 decimals of 255 are finer than float32's of 1, and read as what people know: 123.675.
        return [round(255 * value, 4) for value in values.flatten().tolist()]

    return {
        "INPUT": {"FORMAT": "RGB"},
        "MODEL": {
            "PIXEL_MEAN": pixels(backbone.mean),
            "PIXEL_STD": pixels(backbone.std),
            "RESNETS": resnets_section(tensors),
        },
    }


@torch.no_grad()
def _check_computes_the_same(backbone: Backbone, name: str) -> None:
    """Refuse a ResNet whose names are torchvision's and whose layers are not (stem, pools, ...)."""
    reference = build_backbone(f"torchvision/{name}")
    weights = {key: t.detach().cpu() for key, t in backbone.model.state_dict().items()}
    try:
        reference.model.load_state_dict(weights)
        images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        was_training = backbone.training
        expected = reference.eval().model(images)
        found = backbone.eval().model(images.to(backbone.mean.device)).cpu()
        backbone.train(was_training)
        same = torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    except RuntimeError:  # a weight of another shape
        same = False
    if not same:
        raise ValueError(
            f"{backbone.origin.get('name')} (stem {backbone.origin.get('stem')}) is not the "
            f"{name} that detectron2 would build of its weights. Use the backbone itself "
            "there: build_tract_transfer_backbone."
        )


def _read_config(file: Path, weights: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"No {file}, so nothing says in which order and by what the images of {weights} are "
            "normalised. Name the config of its training: detectron2 writes OUTPUT_DIR/config.yaml."
        )
    try:
        config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        config["MODEL"]["PIXEL_MEAN"], config["MODEL"]["PIXEL_STD"]
        config["MODEL"]["RESNETS"]["STRIDE_IN_1X1"]
        known = config["INPUT"]["FORMAT"] in ("RGB", "BGR")
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} must say INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and "
            f"MODEL.RESNETS.STRIDE_IN_1X1: {error}. Take the config.yaml that detectron2 wrote."
        ) from error
    if not known:
        raise ValueError(f"{file}: INPUT.FORMAT is RGB or BGR, got {config['INPUT']['FORMAT']}.")
    return config


def _check_strides(config: Mapping[str, Any], path: Path, *, bottleneck: bool) -> None:
    if bottleneck and config["MODEL"]["RESNETS"]["STRIDE_IN_1X1"]:
        raise ValueError(
            f"{path} has its strides in the 1x1 convolutions (MODEL.RESNETS.STRIDE_IN_1X1, the "
            "original MSRA models), and torchvision's ResNet in the 3x3: the same weights would "
            "compute something else. Convert a model trained with STRIDE_IN_1X1 False."
        )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a .pkl or .pth file, and our card if it holds one; executes nothing."""
    content = read_content(path)
    content = content if isinstance(content, dict) else {}
    model, card = content.get("model", content), content.get("card")
    tensors = flat_tensors(model)
    if not tensors or len(tensors) != len(model):
        raise ValueError(f"{path} holds no dict of names to arrays, alone or as its 'model'.")
    return tensors, card if isinstance(card, dict) else {}
