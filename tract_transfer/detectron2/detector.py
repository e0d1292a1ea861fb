"""detectron2's stages in our two-stage detector, and our backbones under its interface.

Importing this module imports detectron2.
"""

# B images, C channels, H height, W width

import math
from collections.abc import Mapping, Sequence
from typing import Any

import detectron2.modeling
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, build_proposal_generator, build_roi_heads
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, Res5ROIHeads, ROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from tract_transfer.models.backbone import Backbone, MapInfo
from tract_transfer.models.detection.detectors import check_any_size, check_num_levels
from tract_transfer.models.detection.roi_heads import last_stage
from tract_transfer.models.detection.rpn import Objects
from tract_transfer.registry import did_you_mean

# Arguments of a TwoStageDetector: neck, RPN, ROI heads, our names of their feature maps, divisor.
Stages = tuple[nn.Module, nn.Module, nn.Module, list[str], int]
_OUR_LOSS_NAMES = {"loss_rpn_loc": "loss_rpn_box", "loss_box_reg": "loss_box"}
# Anchor sides divided by the stride of their level, as in detectron2's own configs.
_ANCHOR_SCALES = {"fpn": (8,), "c4": (2, 4, 8, 16, 32)}
# The keys of detectron2's config that the stages read: these sections, without the keys that the
# backbone and the data determine, and without those of the two-layer head that c4 does not have.
_SECTIONS = ("PROPOSAL_GENERATOR", "ANCHOR_GENERATOR", "RPN", "ROI_HEADS", "ROI_BOX_HEAD")
_DETERMINED = ("NAME", "HEAD_NAME", "IN_FEATURES", "NUM_CLASSES", "ANGLES", "TRAIN_ON_PRED_BOXES")
_TWO_LAYER_HEAD = ("NUM_FC", "FC_DIM", "NUM_CONV", "CONV_DIM", "NORM")


def named_by_stride(backbone: Backbone) -> dict[str, tuple[str, MapInfo]]:
    """Return {"res2": (our name, channels and stride), ...}, finest first: res2 has stride 2^2."""
    check_any_size(backbone, "detectron2")
    named = {}
    for name, info in backbone.pyramid().items():
        level = math.log2(info.stride)
        if not level.is_integer():
            raise ValueError(
                f"detectron2 needs strides that are powers of 2; the stride of {name} is "
                f"{info.stride}."
            )
        named[f"res{int(level)}"] = (name, info)
    return named


class PrecomputedMaps(detectron2.modeling.Backbone):  # type: ignore[misc]
    """Takes the place of a backbone below detectron2's pyramid and passes feature maps through."""

    def __init__(self, maps_of: Mapping[str, tuple[str, MapInfo]]) -> None:
        super().__init__()
        self.maps_of = dict(maps_of)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return feature maps under detectron2's names."""
        return {name: maps[our_name] for name, (our_name, _) in self.maps_of.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every feature map."""
        return {name: ShapeSpec(**info._asdict()) for name, (_, info) in self.maps_of.items()}


class MapBackbone(PrecomputedMaps):
    """The deepest feature map of each stride, with detectron2's names: `res4` has stride 2^4.

    Images are given as `backbone` takes them: it normalizes, unless its mean is 0 and its std 1.

    Args:
        out_features: names of the feature maps to return; None returns all.
    """

    def __init__(self, backbone: Backbone, out_features: Sequence[str] | None = None) -> None:
        named = named_by_stride(backbone)
        names = list(named) if out_features is None else list(out_features)
        if not names or not set(names) <= named.keys():
            raise ValueError(f"The backbone has the feature maps {list(named)}, got {names}.")
        super().__init__({name: named[name] for name in names})
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Return {"res2": (B, C, H / 4, W / 4), ...} of images (B, 3, H, W)."""
        our_names = [our_name for our_name, _ in self.maps_of.values()]
        return super().forward(self.backbone.maps(images, our_names))

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of the largest stride: some backbones need it."""
        return max(info.stride for _, info in self.maps_of.values())


def build_pyramid(cfg: CfgNode, bottom_up: PrecomputedMaps, names: Sequence[str]) -> FPN:
    """Return MODEL.FPN on the feature maps `names`, with a pooled level on top."""
    top, section = LastLevelMaxPool(), cfg.MODEL.FPN
    top.in_feature = f"p{_level(names[-1])}"  # detectron2 assumes p5
    return FPN(bottom_up, list(names), section.OUT_CHANNELS, section.NORM, top, section.FUSE_TYPE)


def fpn_stages(
    backbone: Backbone, num_classes: int, options: Mapping[str, Any], num_levels: int | None
) -> Stages:
    """Return the stages of Base-RCNN-FPN."""
    named = named_by_stride(backbone)
    num_levels = num_levels or min(4, len(named))
    check_num_levels(backbone, num_levels)
    used = dict(list(named.items())[-num_levels:])
    levels = [_level(name) for name in used]
    box_names = [f"p{level}" for level in levels]
    rpn_names = [*box_names, f"p{levels[-1] + 1}"]
    cfg = _config("fpn", num_classes, rpn_names, box_names, options)
    neck = build_pyramid(cfg, PrecomputedMaps(used), list(used))
    shapes = neck.output_shape()
    rpn = Detectron2Proposals(build_proposal_generator(cfg, shapes), rpn_names)
    heads = Detectron2Heads(build_roi_heads(cfg, shapes), box_names)
    return neck, rpn, heads, [name for name, _ in used.values()], 2 ** levels[-1]


def c4_stages(backbone: Backbone, num_classes: int, options: Mapping[str, Any]) -> Stages:
    """Return the stages of Base-RCNN-C4, whose res5 is the backbone's layer4."""
    stage, info = last_stage(backbone), backbone.map_info["layer3"]
    shapes = {f"res{int(math.log2(info.stride))}": ShapeSpec(**info._asdict())}
    names = list(shapes)
    cfg = _config("c4", num_classes, names, names, options)
    section = cfg.MODEL.ROI_BOX_HEAD
    pooled = ShapeSpec(channels=backbone.map_info["layer4"].channels, height=1, width=1)
    resolution, ratio = section.POOLER_RESOLUTION, section.POOLER_SAMPLING_RATIO
    heads = Res5ROIHeads(
        in_features=names,
        pooler=ROIPooler(resolution, (1 / info.stride,), ratio, section.POOLER_TYPE),
        res5=stage,
        box_predictor=FastRCNNOutputLayers(cfg, pooled),
        **ROIHeads.from_config(cfg),
    )
    rpn = Detectron2Proposals(build_proposal_generator(cfg, shapes), names)
    return nn.Identity(), rpn, Detectron2Heads(heads, names), ["layer3"], info.stride


def _config(
    neck: str,
    num_classes: int,
    rpn_names: list[str],
    box_names: list[str],
    options: Mapping[str, Any],
) -> CfgNode:
    """Return detectron2's base config of the neck with the user's options."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(f"Base-RCNN-{neck.upper()}.yaml"))
    cfg.MODEL.DEVICE = "cpu"  # where the stages are built; the detector is moved later
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.RPN.IN_FEATURES, cfg.MODEL.ROI_HEADS.IN_FEATURES = rpn_names, box_names
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
        [scale * 2 ** _level(name) for scale in _ANCHOR_SCALES[neck]] for name in rpn_names
    ]
    sections = ("FPN", *_SECTIONS) if neck == "fpn" else _SECTIONS
    unread = _DETERMINED if neck == "fpn" else (*_DETERMINED, *_TWO_LAYER_HEAD)
    readable = [
        f"MODEL.{part}.{key}" for part in sections for key in cfg.MODEL[part] if key not in unread
    ]
    readable = [key for key in readable if "FED_LOSS" not in key]  # needs a registered dataset
    readable.append("TEST.DETECTIONS_PER_IMAGE")
    for key, value in options.items():
        if key not in readable:
            hint = did_you_mean(key, readable) or f" Known: {', '.join(readable)}."
            raise ValueError(
                f"options.{key}: the stages of neck {neck} do not read this key, or the backbone "
                f"and the data determine it.{hint}"
            )
        try:
            cfg.merge_from_list([key, value])
        except (ValueError, AssertionError) as error:
            raise ValueError(f"options.{key}: {error}") from error
    return cfg


def _level(name: str) -> int:
    """The level of `res4` and `p4` is 4, their stride 2^4."""
    return int(name.lstrip("pres"))


class Detectron2Proposals(nn.Module):
    """Adapts detectron2's RPN to TwoStageDetector; its proposals are Instances."""

    def __init__(self, rpn: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.rpn = rpn
        self.names = list(names)
        rpn.rpn_head.register_forward_hook(_to_float32)

    def forward(
        self,
        maps: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        scales: Sequence[float],
        objects: Sequence[Objects] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return proposals and, with objects, losses; detectron2 does not use `scales`."""
        return _run(self.rpn, self.names, maps, image_sizes, objects)


class Detectron2Heads(nn.Module):
    """Adapts detectron2's ROI heads to TwoStageDetector."""

    def __init__(self, heads: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.heads = heads
        self.names = list(names)
        heads.box_predictor.register_forward_hook(_to_float32)

    def forward(
        self,
        maps: Sequence[Tensor],
        proposals: list[Instances],
        image_sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections or, with objects, losses."""
        maps = [feature_map.float() for feature_map in maps]  # detectron2 casts boxes to their type
        instances, losses = _run(self.heads, self.names, maps, image_sizes, objects, proposals)
        return ([], losses) if objects else ([as_dict(of_image) for of_image in instances], {})


def _run(
    stage: nn.Module,
    names: Sequence[str],
    maps: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    objects: Sequence[Objects] | None,
    *proposals: list[Instances],
) -> tuple[list[Instances], dict[str, Tensor]]:
    """Call a stage of detectron2 and return its instances and losses, with our names."""
    images = ImageList(maps[0], list(image_sizes))  # the stages read only the sizes
    features = dict(zip(names, maps, strict=False))
    truth = objects and [
        Instances(size, gt_boxes=Boxes(of_image.boxes), gt_classes=of_image.labels)
        for of_image, size in zip(objects, image_sizes, strict=True)
    ]
    with EventStorage():  # detectron2 needs one to write statistics to
        instances, losses = stage(images, features, *proposals, truth)
    return instances, {_OUR_LOSS_NAMES.get(name, name): loss for name, loss in losses.items()}


def as_dict(instances: Instances) -> dict[str, Tensor]:
    """Return detectron2's detections of an image as our detectors return them."""
    boxes = instances.pred_boxes.tensor
    return {"boxes": boxes, "scores": instances.scores, "labels": instances.pred_classes}


def _to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """A forward hook: under autocast, scores and boxes would be rounded to 8 bits."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_to_float32(module, inputs, part) for part in outputs)
