"""Faster R-CNN on torchvision's parts, for any backbone whose feature maps fit.

Each detector takes the options `rpn` (RpnOptions) and `box` (BoxOptions) as dicts, and
`short_side_px`, `max_side_px` and `difficult_in_training` (see TwoStageDetector). A backbone that
does not fit is a ValueError.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError
from timm.layers import Format, LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from tract_transfer.models.backbone import Backbone
from tract_transfer.models.detection.roi_heads import (
    Borrowed,
    BoxHeads,
    BoxOptions,
    fully_connected,
    last_stage,
)
from tract_transfer.models.detection.rpn import RegionProposals, RpnOptions
from tract_transfer.models.detection.two_stage import Difficult, TwoStageDetector
from tract_transfer.registry import Registry, did_you_mean

DETECTORS = Registry("DETECTORS")
NOTHING: Mapping[str, Any] = {}
Options = TypeVar("Options")

ONE_MAP_RPN = RpnOptions(
    anchor_scales=(2.0, 4.0, 8.0, 16.0, 32.0),
    pre_nms_train=12000,
    pre_nms_test=6000,
    post_nms_train=2000,
    post_nms_test=1000,
)


@DETECTORS.register("torchvision_fpn")
def torchvision_fpn(
    backbone: Backbone,
    num_classes: int,
    *,
    short_side_px: int = 800,
    max_side_px: int = 1333,
    num_levels: int = 4,
    fpn_channels: int = 256,
    head_dim: int = 1024,
    difficult_in_training: Difficult = "keep",
    rpn: Mapping[str, Any] = NOTHING,
    box: Mapping[str, Any] = NOTHING,
) -> TwoStageDetector:
    """Faster R-CNN on a feature pyramid (Lin et al., CVPR 2017).

    Args:
        num_levels: number of the backbone's strides, counted from the last, in the pyramid. The RPN
            also reads a pooled level.
        fpn_channels: channels of each pyramid level.
        head_dim: width of the two-layer box head.
    """
    rpn_options = with_options(RpnOptions(), rpn, "rpn")
    box_options = with_options(BoxOptions(), box, "box")
    check_any_size(backbone, "torchvision_fpn")
    check_num_levels(backbone, num_levels)
    maps = dict(list(backbone.pyramid().items())[-num_levels:])
    strides = [info.stride for info in maps.values()]
    channels = [info.channels for info in maps.values()]
    neck = FeaturePyramidNetwork(channels, fpn_channels, LastLevelMaxPool())
    proposals = RegionProposals(fpn_channels, [*strides, 2 * strides[-1]], rpn_options)
    box_head = TwoMLPHead(fpn_channels * box_options.pool_size**2, head_dim)
    heads = BoxHeads(strides, box_head, head_dim, num_classes, box_options)
    images = short_side_px, max_side_px, difficult_in_training
    return TwoStageDetector(backbone, neck, proposals, heads, list(maps), strides[-1], *images)


@DETECTORS.register("torchvision_vitdet")
def torchvision_vitdet(
    backbone: Backbone,
    num_classes: int,
    *,
    short_side_px: int = 800,
    max_side_px: int = 1333,
    fpn_channels: int = 256,
    head_dim: int = 1024,
    difficult_in_training: Difficult = "keep",
    rpn: Mapping[str, Any] = NOTHING,
    box: Mapping[str, Any] = NOTHING,
) -> TwoStageDetector:
    """Faster R-CNN on the last feature map of a plain ViT (Li et al., ECCV 2022).

    The pyramid has 1/4, 1/2, 1 and 2 times the patch size, and a pooled level. Position embeddings
    are resampled for each image; attention is global in every block. Both heads are those of
    `torchvision_fpn`.
    """
    rpn_options = with_options(RpnOptions(), rpn, "rpn")
    box_options = with_options(BoxOptions(), box, "box")
    accept_any_size(backbone)
    check_any_size(backbone, "torchvision_vitdet")
    (name, info), *others = reversed(backbone.pyramid().items())
    if others or info.stride % 4:
        raise ValueError(
            "torchvision_vitdet needs a plain ViT, with feature maps of one stride that 4 divides, "
            f"and this backbone has {[m.stride for m in backbone.pyramid().values()]}. Use "
            "torchvision_fpn."
        )
    strides = [info.stride // 4, info.stride // 2, info.stride, 2 * info.stride]
    neck = SimplePyramid(info.channels, fpn_channels)
    proposals = RegionProposals(fpn_channels, [*strides, 2 * strides[-1]], rpn_options)
    box_head = TwoMLPHead(fpn_channels * box_options.pool_size**2, head_dim)
    heads = BoxHeads(strides, box_head, head_dim, num_classes, box_options)
    images = short_side_px, max_side_px, difficult_in_training
    return TwoStageDetector(backbone, neck, proposals, heads, [name], strides[-1], *images)


def accept_any_size(backbone: Backbone) -> None:
    """Make a timm ViT resample its position embeddings for every image size.

    Its state dict, and its outputs for images of its own size, stay the same. Other backbones are
    not changed.
    """
    model = backbone.model
    if backbone.image_size_px is None or not hasattr(model, "dynamic_img_size"):
        return
    patch_embed = model.patch_embed  # as timm builds it for dynamic_img_size=True
    patch_embed.strict_img_size, patch_embed.flatten = False, False
    patch_embed.output_fmt = Format.NHWC
    model.dynamic_img_size = True
    backbone.image_size_px = None


def check_any_size(backbone: Backbone, detector: str) -> None:
    """Raise a ValueError for a backbone without feature maps, or of only one image size."""
    if not backbone.map_info:
        raise ValueError(
            f"{detector} needs feature maps, and {backbone.origin.get('name')} has none: its "
            "Backbone defines no maps and map_names. Use another backbone."
        )
    if backbone.image_size_px is not None:
        raise ValueError(
            f"{detector} needs a backbone for images of any size, and this one takes "
            f"{backbone.image_size_px} px alone."
        )


def check_num_levels(backbone: Backbone, num_levels: int) -> None:
    """Raise a ValueError for a backbone without feature maps of `num_levels` strides."""
    strides = [info.stride for info in backbone.pyramid().values()]
    if not 2 <= num_levels <= len(strides):
        raise ValueError(
            f"num_levels: {num_levels}; a feature pyramid needs at least 2 strides, and this "
            f"backbone has {strides}."
        )


class SimplePyramid(nn.Module):
    """ViTDet's feature pyramid: one feature map -> maps of 1/4, 1/2, 1, 2 and 4 times its stride.

    Transposed convolutions make the finer levels, pooling the coarser ones; each ends with a 1x1
    and a 3x3 convolution and LayerNorms over channels. The last level is the one before, pooled.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4

        def level(inputs: int, *layers: nn.Module) -> nn.Sequential:
            return nn.Sequential(
                *layers,
                nn.Conv2d(inputs, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )

        def double(inputs: int) -> nn.Module:
            return nn.ConvTranspose2d(inputs, inputs // 2, 2, stride=2)

        finest = [double(channels), LayerNorm2d(half), nn.GELU(), double(half)]
        self.levels = nn.ModuleList(
            [
                level(quarter, *finest),
                level(half, double(channels)),
                level(channels),
                level(channels, nn.MaxPool2d(2)),
            ]
        )
        self.coarsest = nn.MaxPool2d(1, stride=2)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        (features,) = maps.values()
        pyramid = {str(number): level(features) for number, level in enumerate(self.levels)}
        return {**pyramid, "pool": self.coarsest(pyramid["3"])}


@DETECTORS.register("torchvision_c4")
def torchvision_c4(
    backbone: Backbone,
    num_classes: int,
    *,
    short_side_px: int = 800,
    max_side_px: int = 1333,
    extra_norm: bool = False,
    difficult_in_training: Difficult = "keep",
    rpn: Mapping[str, Any] = NOTHING,
    box: Mapping[str, Any] = NOTHING,
) -> TwoStageDetector:
    """Faster R-CNN on a ResNet's third stage, with the fourth as box head (He et al., 2016).

    RoIAlign gives 14 x 14 cells, which the fourth stage halves; their mean is the feature. The
    stage remains part of the backbone, so that a saved backbone is complete.
    `extra_norm` adds a BatchNorm behind the last stage (MoCo), synchronized if the backbone's are.
    """
    rpn_options = with_options(ONE_MAP_RPN, rpn, "rpn")
    box_options = with_options(BoxOptions(pool_size=14), box, "box")
    stage = last_stage(backbone)
    info, feature_dim = backbone.map_info["layer3"], backbone.map_info["layer4"].channels
    norm: nn.Module = nn.Identity()
    if extra_norm:
        synced = any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules())
        norm = (nn.SyncBatchNorm if synced else nn.BatchNorm2d)(feature_dim)
    pool = nn.AdaptiveAvgPool2d(1)
    layers = {"stage": stage, "norm": norm, "mean": pool, "end": nn.Flatten()}
    box_head = nn.Sequential(OrderedDict(layers))
    proposals = RegionProposals(info.channels, [info.stride], rpn_options)
    heads = BoxHeads([info.stride], box_head, feature_dim, num_classes, box_options)
    images = short_side_px, max_side_px, difficult_in_training
    return TwoStageDetector(
        backbone, nn.Identity(), proposals, heads, ["layer3"], info.stride, *images
    )


@DETECTORS.register("torchvision_c5")
def torchvision_c5(
    backbone: Backbone,
    num_classes: int,
    *,
    short_side_px: int = 600,
    max_side_px: int = 1000,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    difficult_in_training: Difficult = "keep",
    rpn: Mapping[str, Any] = NOTHING,
    box: Mapping[str, Any] = NOTHING,
) -> TwoStageDetector:
    """Faster R-CNN on a VGG's conv5, without the last pool (Ren et al., NeurIPS 2015).

    The box head is fc6 and fc7 of the classifier, with the backbone's weights, and `dropout` behind
    each. They remain part of the backbone, so that a saved backbone is complete.
    """
    defaults = replace(ONE_MAP_RPN, anchor_scales=(8.0, 16.0, 32.0), post_nms_test=300)
    rpn_options = with_options(defaults, rpn, "rpn")
    box_options = with_options(BoxOptions(), box, "box")
    fc6, fc7 = fully_connected(backbone)
    name, info = list(backbone.pyramid().items())[-2]  # the last one is pool5
    inputs = fc6.weight[0].numel()
    if info.channels * box_options.pool_size**2 != inputs:
        raise ValueError(
            f"box.pool_size: {box_options.pool_size} gives fc6 {info.channels} x "
            f"{box_options.pool_size}^2 inputs, and it reads {inputs}. Set 7."
        )
    flatten = nn.Flatten() if isinstance(fc6, nn.Linear) else nn.Identity()  # timm's convolve
    layers = [
        layer for fc in (fc6, fc7) for layer in (Borrowed(fc), nn.ReLU(), nn.Dropout(dropout))
    ]
    box_head, feature_dim = nn.Sequential(flatten, *layers, nn.Flatten()), fc7.weight.shape[0]
    proposals = RegionProposals(info.channels, [info.stride], rpn_options)
    heads = BoxHeads([info.stride], box_head, feature_dim, num_classes, box_options)
    images = short_side_px, max_side_px, difficult_in_training
    return TwoStageDetector(backbone, nn.Identity(), proposals, heads, [name], info.stride, *images)


def with_options(defaults: Options, given: Mapping[str, Any], group: str) -> Options:
    """Return `defaults` updated with `given`; `group` is the name of the argument.

    Raises:
        ValueError: an unknown name, or a value of the wrong type or range: `group.name: problem`.
    """
    assert is_dataclass(defaults) and not isinstance(defaults, type)
    try:
        return replace(defaults, **given)
    except ValidationError as error:
        problem = error.errors()[0]
        path = [str(part) for part in problem["loc"]]
        message = f"{problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}."
        if problem["type"] == "unexpected_keyword_argument":
            names = [field.name for field in fields(defaults)]
            message = f"unknown.{did_you_mean(path[0], names)} {group} takes {names}."
        raise ValueError(f"{'.'.join([group, *path])}: {message}") from error
