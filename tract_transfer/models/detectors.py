"""Detectors on torchvision's parts, for any backbone whose strides fit."""

# B images, N boxes of an image, K classes

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from tract_transfer.models.backbones import Backbone
from tract_transfer.registry import Registry

DETECTORS = Registry("DETECTORS")
LOSS_NAMES = {
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_box",
    "loss_classifier": "loss_cls",
    "loss_box_reg": "loss_box",
}


class TwoStageDetector(nn.Module):
    """Faster R-CNN.

    In training `model(images, targets)` returns its four losses; in eval `model(images)` returns
    a dict an image: `boxes` (N, 4) float32 xyxy in that image's own pixels, `scores` (N,)
    descending, `labels` (N,) in 0..K-1. Images are a list of (3, H, W) RGB, uint8 or float in
    [0, 1]. Training images come at their training size; at test time the model resizes.
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: nn.Module,
        rpn: nn.Module,
        roi_heads: nn.Module,
        map_names: Sequence[str],
        *,
        short_side_px: int,
        max_side_px: int,
        size_divisor: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.map_names = list(map_names)
        self.short_side_px = short_side_px
        self.max_side_px = max_side_px
        self.size_divisor = size_divisor

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        inputs = images if self.training else [self._resize(image) for image in images]
        batch = self._pad(inputs)
        features = self.neck(self.backbone.maps(batch.tensors, self.map_names))
        if self.training:
            assert targets is not None
            # torchvision keeps class 0 for the background.
            shifted = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]
            proposals, rpn_losses = self.rpn(batch, features, shifted)
            _, box_losses = self.roi_heads(features, proposals, batch.image_sizes, shifted)
            losses = {**rpn_losses, **box_losses}
            return {LOSS_NAMES[name]: loss for name, loss in losses.items()}
        proposals, _ = self.rpn(batch, features)
        found, _ = self.roi_heads(features, proposals, batch.image_sizes)
        return [
            _in_pixels_of(image, resized, detections)
            for image, resized, detections in zip(images, inputs, found, strict=True)
        ]

    def _resize(self, image: Tensor) -> Tensor:
        """Resize (3, H, W) so that its short side is `short_side_px`, its long side at most max."""
        short, long = sorted(image.shape[-2:])
        scale = min(self.short_side_px / short, self.max_side_px / long)
        size = [max(1, round(side * scale)) for side in image.shape[-2:]]
        if size == list(image.shape[-2:]):
            return image
        return F.interpolate(_as_float(image)[None], size, mode="bilinear", antialias=False)[0]

    def _pad(self, images: list[Tensor]) -> ImageList:
        """Join images to one batch, padded with the mean colour: 0 after normalisation."""
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        height, width = (
            -(-max(sides) // self.size_divisor) * self.size_divisor
            for sides in zip(*sizes, strict=True)
        )
        batch = self.backbone.mean.expand(len(images), 3, height, width).clone()
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[-2], : image.shape[-1]] = _as_float(image)
        return ImageList(batch, sizes)


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
    anchor_scale: float = 8.0,
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    num_proposals: int = 1000,
    rois_per_image: int = 512,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
) -> TwoStageDetector:
    """Faster R-CNN on a feature pyramid (Lin et al., CVPR 2017).

    Args:
        num_classes: K, without a background.
        short_side_px, max_side_px: the size of test images.
        num_levels: how many of the backbone's strides, the last ones, the pyramid stands on; one
            pooled level comes on top.
        fpn_channels: channels of every pyramid level.
        head_dim: width of the two-layer box head.
        anchor_scale: an anchor's side over its level's stride.
        num_proposals: proposals kept an image after the region proposal's NMS, in both modes.
        rois_per_image: proposals the box head trains on, a quarter of them objects.
        score_threshold, nms_threshold, max_detections: what remains of the detections.

    Raises:
        ValueError: the backbone takes one image size alone, or has maps of fewer strides.
    """
    if backbone.image_size_px is not None:
        raise ValueError(
            "torchvision_fpn needs a backbone for images of any size, and this one takes "
            f"{backbone.image_size_px} px alone."
        )
    known = backbone.pyramid()
    if not 2 <= num_levels <= len(known):
        raise ValueError(
            f"torchvision_fpn needs maps of num_levels = {num_levels} strides (2 at least), and "
            f"this backbone has {[info.stride for info in known.values()]}."
        )
    pyramid = dict(list(known.items())[-num_levels:])
    strides = [info.stride for info in pyramid.values()]
    strides.append(2 * strides[-1])  # the pooled level
    anchors = AnchorGenerator(
        tuple((round(anchor_scale * stride),) for stride in strides),
        (tuple(anchor_ratios),) * len(strides),
    )
    neck = FeaturePyramidNetwork(
        [info.channels for info in pyramid.values()], fpn_channels, LastLevelMaxPool()
    )
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(fpn_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * num_proposals, "testing": num_proposals},
        post_nms_top_n={"training": num_proposals, "testing": num_proposals},
        nms_thresh=0.7,
    )
    roi_heads = RoIHeads(
        MultiScaleRoIAlign(list(pyramid), output_size=7, sampling_ratio=2),
        TwoMLPHead(fpn_channels * 7 * 7, head_dim),
        FastRCNNPredictor(head_dim, num_classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=rois_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=score_threshold,
        nms_thresh=nms_threshold,
        detections_per_img=max_detections,
    )
    # torchvision gives boxes and targets the type of the features: under autocast coordinates would
    # be rounded to 8 bits. What the convolutions computed goes on in float32.
    for part in (neck, rpn.head, roi_heads.box_predictor):
        part.register_forward_hook(_in_float32)
    return TwoStageDetector(
        backbone,
        neck,
        rpn,
        roi_heads,
        list(pyramid),
        short_side_px=short_side_px,
        max_side_px=max_side_px,
        size_divisor=strides[-2],
    )


def _in_float32(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
    """A forward hook: tensors, and those in a dict, list or tuple, as float32."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    if isinstance(outputs, dict):
        return {name: tensor.float() for name, tensor in outputs.items()}
    return type(outputs)(_in_float32(_module, _inputs, part) for part in outputs)


def _as_float(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image


def _in_pixels_of(image: Tensor, resized: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale boxes from the resized image back to the image, and put classes at 0..K-1."""
    ratio_x = image.shape[-1] / resized.shape[-1]
    ratio_y = image.shape[-2] / resized.shape[-2]
    scale = found["boxes"].new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])
    return {
        "boxes": found["boxes"].float() * scale,
        "scores": found["scores"].float(),
        "labels": found["labels"] - 1,
    }
