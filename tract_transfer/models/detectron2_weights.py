"""ResNet weights to detectron2's names and back, and what must travel beside them.

detectron2's checkpoints do not say in which order and by what their images are normalised. So a
file goes with a YAML in detectron2's own keys, which `cfg.merge_from_file` takes as it stands.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from tract_transfer.models.backbones import Backbone, build_backbone
from tract_transfer.models.detectron2_names import (
    resnet_name,
    resnets_section,
    to_ours,
    to_theirs,
    without_prefix,
)
from tract_transfer.models.weights_file import flat_tensors, read_content

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
    backbone.set_colours(mean.tolist(), std.tolist())
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
