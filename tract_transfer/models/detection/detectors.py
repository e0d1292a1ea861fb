"""Faster R-CNN on torchvision's parts, for any backbone whose maps fit.

Four kinds: `torchvision_fpn` on a feature pyramid, `torchvision_c4` with a ResNet's last stage as
its box head, `torchvision_c5` with a VGG's fc6 and fc7, `torchvision_vitdet` on a plain ViT. All
take the groups of arguments `rpn` (RpnOptions) and `box` (BoxOptions) of options.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from timm.layers import Format, LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from tract_transfer.models.backbone import Backbone
from tract_transfer.models.detection.options import BoxOptions, RpnOptions, with_options
from tract_transfer.models.detection.roi_heads import (
    BoxHeads,
    LayersHead,
    RoiPooler,
    StageHead,
    fully_connected,
    norm_like,
)
from tract_transfer.models.detection.rpn import RegionProposals
from tract_transfer.models.detection.two_stage import TwoStageDetector
from tract_transfer.registry import Registry

# --- A plain ViT under a detector: images of any size, and a pyramid of its one map.


def accept_any_size(backbone: Backbone) -> None:
    """Let a ViT of timm's resample its position embeddings to every image it sees.

    Its state dict, and what it makes of images of its own size, stay. A backbone that is no such
    ViT, or takes any size anyway, stays as it is.
    """
    model = backbone.model
    if backbone.image_size_px is None or not hasattr(model, "dynamic_img_size"):
        return
    patches = model.patch_embed  # as timm makes them for dynamic_img_size=True
    patches.strict_img_size, patches.flatten = False, False
    patches.output_fmt = Format.NHWC
    model.dynamic_img_size = True
    backbone.image_size_px = None


class SimplePyramid(nn.Module):
    """The simple feature pyramid (Li et al., ECCV 2022): one map -> maps of 1/4 to 2 times its
    stride, and one of 4 times, each {name: (B, out_channels, H / 2^level, W / 2^level)}.

    Finer maps come from transposed convolutions, coarser ones from pooling; each level ends with a
    1x1 and a 3x3 convolution, with LayerNorms over the channels.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(channels, half, 2, stride=2),
                    LayerNorm2d(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                    *_output(quarter, out_channels),
                ),
                nn.Sequential(
                    nn.ConvTranspose2d(channels, half, 2, stride=2), *_output(half, out_channels)
                ),
                nn.Sequential(*_output(channels, out_channels)),
                nn.Sequential(nn.MaxPool2d(2), *_output(channels, out_channels)),
            ]
        )
        self.coarsest = nn.MaxPool2d(1, stride=2)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        (features,) = maps.values()
        found = {str(number): level(features) for number, level in enumerate(self.levels)}
        return {**found, "pool": self.coarsest(found["3"])}


def _output(channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    ]


DETECTORS = Registry("DETECTORS")
Difficult = Literal["keep", "drop", "ignore"]
NOTHING: Mapping[str, Any] = {}

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
        num_classes: K, without a background.
        num_levels: how many of the backbone's strides, the last ones, the pyramid stands on; one
            pooled level comes on top, which the box head does not read.
        fpn_channels: channels of every pyramid level.
        head_dim: width of the two-layer box head.

    Raises:
        ValueError: the backbone takes one image size alone, or has maps of fewer strides.
    """
    rpn_options, box_options = _options(rpn, box, RpnOptions())
    _check_any_size(backbone, "torchvision_fpn")
    known = backbone.pyramid()
    if not 2 <= num_levels <= len(known):
        raise ValueError(
            f"torchvision_fpn needs maps of num_levels = {num_levels} strides (2 at least), and "
            f"this backbone has {[info.stride for info in known.values()]}."
        )
    pyramid = dict(list(known.items())[-num_levels:])
    strides = [info.stride for info in pyramid.values()]
    neck = FeaturePyramidNetwork(
        [info.channels for info in pyramid.values()], fpn_channels, LastLevelMaxPool()
    )
    return TwoStageDetector(
        backbone,
        neck,
        RegionProposals(fpn_channels, [*strides, 2 * strides[-1]], rpn_options),
        _two_layer_heads(fpn_channels, strides, head_dim, num_classes, box_options),
        list(pyramid),
        short_side_px=short_side_px,
        max_side_px=max_side_px,
        size_divisor=strides[-1],
        difficult_in_training=difficult_in_training,
    )


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
    """Faster R-CNN on a ResNet's third stage, its fourth being the box head (He et al., 2016).

    RoIAlign takes 14 x 14 cells, which the fourth stage halves, and the mean over cells is the
    feature. The stage stays the backbone's: a saved backbone is whole.

    Args:
        num_classes: K, without a background.
        extra_norm: a BatchNorm behind the last stage (MoCo); synchronised if the backbone's are.

    Raises:
        ValueError: the backbone is no ResNet of stages layer1 to layer4.
    """
    rpn_options, box_options = _options(rpn, box, ONE_MAP_RPN, BoxOptions(pool_size=14))
    stages = dict(backbone.model.named_children())
    if not {"layer3", "layer4"} <= stages.keys():
        raise ValueError(
            "torchvision_c4 needs a ResNet, whose stage layer4 becomes the box head, and this "
            f"{type(backbone.model).__name__} has {list(stages)}. Use torchvision_fpn."
        )
    info, feature_dim = backbone.map_info["layer3"], backbone.map_info["layer4"].channels
    norm = norm_like(backbone, feature_dim) if extra_norm else nn.Identity()
    return TwoStageDetector(
        backbone,
        nn.Identity(),
        RegionProposals(info.channels, [info.stride], rpn_options),
        BoxHeads(
            RoiPooler([info.stride], box_options),
            StageHead(stages["layer4"], norm),
            feature_dim,
            num_classes,
            box_options,
        ),
        ["layer3"],
        short_side_px=short_side_px,
        max_side_px=max_side_px,
        size_divisor=info.stride,
        difficult_in_training=difficult_in_training,
    )


@DETECTORS.register("torchvision_c5")
def torchvision_c5(
    backbone: Backbone,
    num_classes: int,
    *,
    short_side_px: int = 600,
    max_side_px: int = 1000,
    dropout: float = 0.5,
    difficult_in_training: Difficult = "keep",
    rpn: Mapping[str, Any] = NOTHING,
    box: Mapping[str, Any] = NOTHING,
) -> TwoStageDetector:
    """Faster R-CNN on a VGG's conv5, without the last pool (Ren et al., NeurIPS 2015).

    The box head is the classifier's own fc6 and fc7 with what weights the backbone came with;
    they stay the backbone's, so that a saved backbone is whole.

    Args:
        num_classes: K, without a background.
        dropout: behind fc6 and fc7, in training.

    Raises:
        ValueError: the backbone is no VGG, or `box.pool_size` is not what its fc6 reads.
    """
    defaults = replace(ONE_MAP_RPN, anchor_scales=(8.0, 16.0, 32.0), post_nms_test=300)
    rpn_options, box_options = _options(rpn, box, defaults)
    fc6, fc7 = fully_connected(backbone)
    name, info = list(backbone.pyramid().items())[-2]  # the last one is pool5
    inputs = fc6.weight[0].numel()
    if info.channels * box_options.pool_size**2 != inputs:
        raise ValueError(
            f"box.pool_size: {box_options.pool_size} gives fc6 {info.channels} x "
            f"{box_options.pool_size}^2 inputs, and it reads {inputs}. Set 7."
        )
    return TwoStageDetector(
        backbone,
        nn.Identity(),
        RegionProposals(info.channels, [info.stride], rpn_options),
        BoxHeads(
            RoiPooler([info.stride], box_options),
            LayersHead([fc6, fc7], dropout),
            fc7.weight.shape[0],
            num_classes,
            box_options,
        ),
        [name],
        short_side_px=short_side_px,
        max_side_px=max_side_px,
        size_divisor=info.stride,
        difficult_in_training=difficult_in_training,
    )


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
    """Faster R-CNN on a plain ViT's last map (Li et al., ECCV 2022).

    A simple pyramid of 1/4, 1/2, 1 and 2 times the patch size, and a pooled level. Position
    embeddings are resampled to each image; attention is global in every block. Both heads are
    those of `torchvision_fpn`.

    Args:
        num_classes: K, without a background.
        fpn_channels: channels of every pyramid level.
        head_dim: width of the two-layer box head.

    Raises:
        ValueError: the backbone is no plain ViT of timm's whose patches are a multiple of 4.
    """
    rpn_options, box_options = _options(rpn, box, RpnOptions())
    accept_any_size(backbone)
    _check_any_size(backbone, "torchvision_vitdet")
    pyramid = backbone.pyramid()
    (name, info), *others = reversed(pyramid.items())
    if others or info.stride % 4:
        raise ValueError(
            "torchvision_vitdet needs a plain ViT, with maps of one stride that 4 divides, and "
            f"this backbone has {[each.stride for each in pyramid.values()]}. Use torchvision_fpn."
        )
    strides = [info.stride // 4, info.stride // 2, info.stride, 2 * info.stride]
    return TwoStageDetector(
        backbone,
        SimplePyramid(info.channels, fpn_channels),
        RegionProposals(fpn_channels, [*strides, 2 * strides[-1]], rpn_options),
        _two_layer_heads(fpn_channels, strides, head_dim, num_classes, box_options),
        [name],
        short_side_px=short_side_px,
        max_side_px=max_side_px,
        size_divisor=strides[-1],
        difficult_in_training=difficult_in_training,
    )


def _options(
    rpn: Mapping[str, Any],
    box: Mapping[str, Any],
    rpn_defaults: RpnOptions,
    box_defaults: BoxOptions | None = None,
) -> tuple[RpnOptions, BoxOptions]:
    return (
        with_options(rpn_defaults, rpn, "rpn"),
        with_options(box_defaults or BoxOptions(), box, "box"),
    )


def _check_any_size(backbone: Backbone, detector: str) -> None:
    if backbone.image_size_px is not None:
        raise ValueError(
            f"{detector} needs a backbone for images of any size, and this one takes "
            f"{backbone.image_size_px} px alone."
        )


def _two_layer_heads(
    channels: int, strides: list[int], head_dim: int, num_classes: int, options: BoxOptions
) -> BoxHeads:
    box_head = TwoMLPHead(channels * options.pool_size**2, head_dim)
    return BoxHeads(RoiPooler(strides, options), box_head, head_dim, num_classes, options)
