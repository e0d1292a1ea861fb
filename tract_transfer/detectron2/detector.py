"""detectron2's stages in our two-stage detector; importing this imports detectron2."""

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
from tract_transfer.models.detection.rpn import Objects
from tract_transfer.models.detection.two_stage import TwoStageDetector
from tract_transfer.registry import did_you_mean

# --- Our backbones under detectron2's contract; importing this imports detectron2.


class MapBackbone(detectron2.modeling.Backbone):  # type: ignore[misc]
    """The deepest map of each stride, named as in detectron2: `res4` has the stride 2^4.

    Images come as `backbone` takes them: it normalises, unless its mean is 0 and its std 1.

    Args:
        out_features: the maps that forward returns; None returns all.

    Raises:
        ValueError: a stride is no power of 2, the backbone takes one image size alone, or it has
            no such map.
    """

    def __init__(self, backbone: Backbone, out_features: Sequence[str] | None = None) -> None:
        super().__init__()
        if backbone.image_size_px is not None:
            raise ValueError(
                "detectron2 gives its backbone images of any size, and this one takes "
                f"{backbone.image_size_px} px alone."
            )
        known = named_by_stride(backbone)
        names = list(known) if out_features is None else list(out_features)
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ValueError(f"The backbone has the maps {list(known)}, got {names}.")
        self.backbone = backbone
        self.maps_of = {name: known[name] for name in names}
        self.largest_stride = max(info.stride for _, info in self.maps_of.values())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return {"res2": (B, C, H / 4, W / 4), ...} of images (B, 3, H, W)."""
        maps = self.backbone.maps(images, [name for name, _ in self.maps_of.values()])
        return dict(zip(self.maps_of, maps.values(), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every map that forward returns."""
        return _shapes(self.maps_of)

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of the largest stride: some backbones need it."""
        return self.largest_stride


class GivenMaps(detectron2.modeling.Backbone):  # type: ignore[misc]
    """Stands below detectron2's pyramid where the maps were computed already."""

    def __init__(self, maps_of: Mapping[str, tuple[str, MapInfo]]) -> None:
        super().__init__()
        self.maps_of = dict(maps_of)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the backbone's maps under detectron2's names."""
        return {name: maps[own] for name, (own, _) in self.maps_of.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every map."""
        return _shapes(self.maps_of)


def pooled_top(names: Sequence[str]) -> LastLevelMaxPool:
    """Return the pyramid's pooled top level, above the last of `names` (detectron2's is p5)."""
    top = LastLevelMaxPool()
    top.in_feature = f"p{names[-1].removeprefix('res')}"
    return top


def named_by_stride(backbone: Backbone) -> dict[str, tuple[str, MapInfo]]:
    """Return {"res2": (the backbone's own name, its channels and stride), ...}, finest first."""
    found = {}
    for name, info in backbone.pyramid().items():
        level = math.log2(info.stride)
        if not level.is_integer():
            raise ValueError(
                f"detectron2 takes strides that are powers of 2, and the backbone's {name} has "
                f"{info.stride}."
            )
        found[f"res{int(level)}"] = (name, info)
    return found


def _shapes(maps_of: Mapping[str, tuple[str, MapInfo]]) -> dict[str, ShapeSpec]:
    return {name: ShapeSpec(**info._asdict()) for name, (_, info) in maps_of.items()}


LOSS_NAMES = {
    "loss_rpn_cls": "loss_rpn_cls",
    "loss_rpn_loc": "loss_rpn_box",
    "loss_cls": "loss_cls",
    "loss_box_reg": "loss_box",
}
# Sides of anchors over their level's stride, as in detectron2's own configs.
ANCHOR_SCALES = {"fpn": (8,), "c4": (2, 4, 8, 16, 32)}
# What of detectron2's config the stages read, and backbone and data do not give.
_SECTIONS = {
    "fpn": ("FPN", "PROPOSAL_GENERATOR", "ANCHOR_GENERATOR", "RPN", "ROI_HEADS", "ROI_BOX_HEAD"),
    "c4": ("PROPOSAL_GENERATOR", "ANCHOR_GENERATOR", "RPN", "ROI_HEADS", "ROI_BOX_HEAD"),
}
_GIVEN = ("NAME", "HEAD_NAME", "IN_FEATURES", "NUM_CLASSES", "ANGLES", "TRAIN_ON_PRED_BOXES")
_OF_TWO_LAYER_HEAD = ("NUM_FC", "FC_DIM", "NUM_CONV", "CONV_DIM", "NORM")


class Detectron2Proposals(nn.Module):
    """detectron2's RPN as TwoStageDetector calls it; its proposals are Instances."""

    def __init__(self, rpn: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.rpn = rpn
        self.names = list(names)

    def forward(
        self,
        maps: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        scales: Sequence[float],
        objects: Sequence[Objects] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return proposals and, with objects, losses; `scales` are for MIN_SIZE, which has none."""
        images = ImageList(maps[0], list(image_sizes))  # of which the RPN reads the sizes
        truth = _instances(objects, image_sizes)
        with EventStorage():  # detectron2 writes statistics into one, and refuses without
            proposals, losses = self.rpn(images, dict(zip(self.names, maps, strict=True)), truth)
        return proposals, _renamed(losses)


class Detectron2Heads(nn.Module):
    """detectron2's ROI heads as TwoStageDetector calls them."""

    def __init__(self, heads: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.heads = heads
        self.names = list(names)

    def forward(
        self,
        maps: Sequence[Tensor],
        proposals: list[Instances],
        image_sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        # detectron2 gives the boxes the maps' type: under autocast they would have 8 bits.
        features = {name: each.float() for name, each in zip(self.names, maps, strict=False)}
        truth = _instances(objects, image_sizes)
        images = ImageList(maps[0], list(image_sizes))
        with EventStorage():
            found, losses = self.heads(images, features, proposals, truth)
        if objects is not None:
            return [], _renamed(losses)
        return [
            {"boxes": x.pred_boxes.tensor, "scores": x.scores, "labels": x.pred_classes}
            for x in found
        ], {}


class BorrowedStage(nn.Module):
    """A stage that stays the backbone's, so that it is saved whole, and no weight twice."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self._borrowed = (stage,)  # in a tuple torch takes no part of

    def forward(self, pooled: Tensor) -> Tensor:
        features: Tensor = self._borrowed[0](pooled)
        return features


def build_fpn(
    backbone: Backbone,
    num_classes: int,
    *,
    num_levels: int,
    options: Mapping[str, Any],
    short_side_px: int,
    max_side_px: int,
    difficult_in_training: str,
) -> TwoStageDetector:
    """detectron2's Base-RCNN-FPN; see `detectron2_detector` for arguments and errors."""
    known = named_by_stride(backbone)
    if not 2 <= num_levels <= len(known):
        raise ValueError(
            f"num_levels: {num_levels} of neck fpn must be 2 strides at least, and this backbone "
            f"has {[info.stride for _, info in known.values()]}."
        )
    used = dict(list(known.items())[-num_levels:])
    levels = [int(name.removeprefix("res")) for name in used]
    box_names = [f"p{level}" for level in levels]
    rpn_names = [*box_names, f"p{levels[-1] + 1}"]  # the pooled level on top
    cfg = _config("fpn", num_classes, rpn_names, box_names)
    strides = [2 ** int(name.removeprefix("p")) for name in rpn_names]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [_sides("fpn", stride) for stride in strides]
    _apply(options, cfg, "fpn")
    section = cfg.MODEL.FPN
    neck = FPN(
        GivenMaps(used),
        list(used),
        section.OUT_CHANNELS,
        norm=section.NORM,
        top_block=pooled_top(list(used)),
        fuse_type=section.FUSE_TYPE,
    )
    shapes = neck.output_shape()
    return TwoStageDetector(
        backbone,
        neck,
        Detectron2Proposals(_rpn(cfg, shapes), rpn_names),
        Detectron2Heads(_float32(build_roi_heads(cfg, shapes), "box_predictor"), box_names),
        [name for name, _ in used.values()],
        short_side_px=short_side_px,
        max_side_px=max_side_px,
        size_divisor=strides[-2],
        difficult_in_training=difficult_in_training,
    )


def build_c4(
    backbone: Backbone,
    num_classes: int,
    *,
    options: Mapping[str, Any],
    short_side_px: int,
    max_side_px: int,
    difficult_in_training: str,
) -> TwoStageDetector:
    """detectron2's Base-RCNN-C4, whose res5 is the backbone's layer4; see `detectron2_detector`."""
    stages = dict(backbone.model.named_children())
    names = [name for name, (own, _) in named_by_stride(backbone).items() if own == "layer3"]
    if not names or "layer4" not in stages:
        raise ValueError(
            "neck: c4 needs a ResNet of stages layer1 to layer4, each of its own stride, and this "
            f"{type(backbone.model).__name__} has {list(stages)}. Set fpn."
        )
    own, info = named_by_stride(backbone)[names[0]]
    feature_dim = backbone.map_info["layer4"].channels
    cfg = _config("c4", num_classes, names, names)
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [_sides("c4", info.stride)]
    _apply(options, cfg, "c4")
    section = cfg.MODEL.ROI_BOX_HEAD
    heads = Res5ROIHeads(
        in_features=names,
        pooler=ROIPooler(
            output_size=section.POOLER_RESOLUTION,
            scales=(1 / info.stride,),
            sampling_ratio=section.POOLER_SAMPLING_RATIO,
            pooler_type=section.POOLER_TYPE,
        ),
        res5=BorrowedStage(stages["layer4"]),
        box_predictor=FastRCNNOutputLayers(cfg, ShapeSpec(channels=feature_dim, height=1, width=1)),
        **ROIHeads.from_config(cfg),
    )
    return TwoStageDetector(
        backbone,
        nn.Identity(),
        Detectron2Proposals(_rpn(cfg, {names[0]: ShapeSpec(**info._asdict())}), names),
        Detectron2Heads(_float32(heads, "box_predictor"), names),
        [own],
        short_side_px=short_side_px,
        max_side_px=max_side_px,
        size_divisor=info.stride,
        difficult_in_training=difficult_in_training,
    )


def _config(
    neck: str, num_classes: int, rpn_names: Sequence[str], box_names: Sequence[str]
) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(f"Base-RCNN-{neck.upper()}.yaml"))
    cfg.MODEL.DEVICE = "cpu"  # where the parts are built; the model is moved as a whole
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.RPN.IN_FEATURES = list(rpn_names)
    cfg.MODEL.ROI_HEADS.IN_FEATURES = list(box_names)
    return cfg


def _sides(neck: str, stride: int) -> list[int]:
    return [scale * stride for scale in ANCHOR_SCALES[neck]]


def _rpn(cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> nn.Module:
    return _float32(build_proposal_generator(cfg, shapes), "rpn_head")


def _apply(options: Mapping[str, Any], cfg: CfgNode, neck: str) -> None:
    """Set detectron2's own keys.

    Raises:
        ValueError: a key is none that this detector reads, or its value is of another type.
    """
    known = _readable_keys(cfg, neck)
    for key, value in options.items():
        if key not in known:
            hint = did_you_mean(key, known) or f" Known: {', '.join(known)}."
            raise ValueError(
                f"options.{key}: no key that the stages of neck {neck} read, or one that backbone "
                f"and data give.{hint}"
            )
        try:
            cfg.merge_from_list([key, value])
        except (ValueError, AssertionError) as error:
            raise ValueError(f"options.{key}: {error}") from error


def _readable_keys(cfg: CfgNode, neck: str) -> list[str]:
    unread = _GIVEN if neck == "fpn" else (*_GIVEN, *_OF_TWO_LAYER_HEAD)
    keys = [
        f"MODEL.{section}.{key}"
        for section in _SECTIONS[neck]
        for key in cfg.MODEL[section]
        if key not in unread and "FED_LOSS" not in key  # that one needs a registered dataset
    ]
    return [*keys, "TEST.DETECTIONS_PER_IMAGE"]


def _instances(
    objects: Sequence[Objects] | None, image_sizes: Sequence[tuple[int, int]]
) -> list[Instances] | None:
    if objects is None:
        return None
    return [
        Instances(size, gt_boxes=Boxes(each.boxes), gt_classes=each.labels)
        for each, size in zip(objects, image_sizes, strict=True)
    ]


def _renamed(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {LOSS_NAMES[name]: loss for name, loss in losses.items()}


def _float32(stage: nn.Module, part: str) -> nn.Module:
    """Let `part` put out float32: under autocast scores and boxes would be rounded to 8 bits."""
    stage.get_submodule(part).register_forward_hook(_in_float32)
    return stage


def _in_float32(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_in_float32(_module, _inputs, part) for part in outputs)
