"""Faster R-CNN as one module, and its test-time flipping."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from tract_transfer.models.backbone import Backbone
from tract_transfer.models.detection.rpn import Objects

Difficult = Literal["keep", "drop", "ignore"]


class TwoStageDetector(nn.Module):
    """Faster R-CNN (Ren et al., NeurIPS 2015).

    In training `model(images, targets)` returns its four losses; in eval `model(images)` returns a
    dict per image: `boxes` (N, 4) float32 xyxy in pixels of the input image, `scores` (N,)
    descending, `labels` (N,) in 0..K-1. Images are a list of (3, H, W) RGB, uint8 or float in
    [0, 1]. Training images have their final size; test images are resized here.

    Args:
        neck: {name: backbone feature map} -> {name: feature map for both stages}, finest first.
        rpn: (maps, image_sizes, scales, objects) -> (proposals, losses).
        roi_heads: (maps, proposals, image_sizes, objects) -> (detections, losses).
        map_names: the feature maps that the neck reads.
        size_divisor: batches are padded to a multiple of it.
        short_side_px, max_side_px: size of test images.
        difficult_in_training: whether objects marked difficult are objects (`keep`), background
            (`drop`), or neither (`ignore`).
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: nn.Module,
        rpn: nn.Module,
        roi_heads: nn.Module,
        map_names: Sequence[str],
        size_divisor: int,
        short_side_px: int,
        max_side_px: int,
        difficult_in_training: Difficult = "keep",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.map_names = list(map_names)
        self.size_divisor = size_divisor
        self.short_side_px = short_side_px
        self.max_side_px = max_side_px
        self.difficult_in_training = difficult_in_training

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses or detections; see the class.

        Args:
            targets: `boxes` (N, 4) float32 xyxy, `labels` (N,), `difficult` (N,) bool, and
                `scale`, the factor by which the image was resized (default 1).
        """
        inputs = images if self.training else [self._resize(image) for image in images]
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in inputs]
        features = self.backbone.maps(self._pad(inputs, sizes), self.map_names)
        maps = list(self.neck(features).values())
        if self.training:
            assert targets is not None
            scales = [float(target.get("scale", 1.0)) for target in targets]
            objects = [self._objects(target) for target in targets]
            proposals, rpn_losses = self.rpn(maps, sizes, scales, objects)
            _, box_losses = self.roi_heads(maps, proposals, sizes, objects)
            return {**rpn_losses, **box_losses}
        scales = [size[0] / image.shape[-2] for size, image in zip(sizes, images, strict=True)]
        proposals, _ = self.rpn(maps, sizes, scales)
        detections: list[dict[str, Tensor]] = self.roi_heads(maps, proposals, sizes)[0]
        for image, size, detected in zip(images, sizes, detections, strict=True):
            ratio_y, ratio_x = image.shape[-2] / size[0], image.shape[-1] / size[1]
            ratios = detected["boxes"].new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])
            detected["boxes"] = detected["boxes"] * ratios
        return detections

    def _objects(self, target: dict[str, Any]) -> Objects:
        boxes, labels = target["boxes"], target["labels"]
        if self.difficult_in_training == "keep":
            # A crowd is a region, not an object to learn.
            kept = ~target["crowd"] if "crowd" in target else slice(None)
            return Objects(boxes[kept], labels[kept], boxes[:0])
        difficult = target["difficult"]
        ignored = boxes[difficult] if self.difficult_in_training == "ignore" else boxes[:0]
        return Objects(boxes[~difficult], labels[~difficult], ignored)

    def _resize(self, image: Tensor) -> Tensor:
        """Resize (3, H, W) to `short_side_px`, or less to keep the long side at `max_side_px`."""
        short, long = sorted(image.shape[-2:])
        scale = min(self.short_side_px / short, self.max_side_px / long)
        size = [max(1, round(side * scale)) for side in image.shape[-2:]]
        if size == list(image.shape[-2:]):
            return image
        return F.interpolate(_as_float(image)[None], size, mode="bilinear", antialias=False)[0]

    def _pad(self, images: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Join images to one batch, padded with the mean color: 0 after normalization."""
        step = self.size_divisor
        height, width = (-(-max(sides) // step) * step for sides in zip(*sizes, strict=True))
        batch = self.backbone.mean.expand(len(images), 3, height, width).clone()
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[-2], : image.shape[-1]] = _as_float(image)
        return batch


def _as_float(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image


class FlipDetector(nn.Module):
    """Test-time flipping: in eval, merges the detections of each image and of its mirror image.

    Per class, non-maximum suppression at `nms_iou` keeps the best of overlapping boxes; the
    `max_detections` best boxes of an image remain. Inputs and outputs are the detector's.
    """

    def __init__(
        self, detector: nn.Module, nms_iou: float = 0.5, max_detections: int = 100
    ) -> None:
        super().__init__()
        self.detector = detector
        self.nms_iou = nms_iou
        self.max_detections = max_detections

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        plain = self.detector(images)
        mirrored = self.detector([image.flip(-1) for image in images])
        detections = []
        for image, first, second in zip(images, plain, mirrored, strict=True):
            second = mirror(second, image.shape[-1])
            both = {key: torch.cat([rows, second[key]]) for key, rows in first.items()}
            kept = batched_nms(both["boxes"], both["scores"], both["labels"], self.nms_iou)
            detections.append({k: rows[kept[: self.max_detections]] for k, rows in both.items()})
        return detections


def mirror(detections: dict[str, Tensor], width_px: int) -> dict[str, Tensor]:
    """Return the detections of an image from those of its mirror image; x2 is exclusive."""
    x1, y1, x2, y2 = detections["boxes"].unbind(dim=1)
    return {**detections, "boxes": torch.stack([width_px - x2, y1, width_px - x1, y2], dim=1)}
