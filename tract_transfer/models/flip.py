"""Test-time flipping: models that see each image as it is and mirrored left to right."""

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms


class FlipClassifier(nn.Module):
    """In eval, averages the (B, K) logits of each image and its mirror image."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(images) + self.classifier(images.flip(-1))
        return logits / 2


class FlipDetector(nn.Module):
    """In eval, merges the detections of each image with those of its mirror image.

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
        return [
            self._merge(first, mirror(second, image.shape[-1]))
            for image, first, second in zip(images, plain, mirrored, strict=True)
        ]

    def _merge(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        both = {key: torch.cat([first[key], second[key]]) for key in ("boxes", "scores", "labels")}
        kept = batched_nms(both["boxes"], both["scores"], both["labels"], self.nms_iou)
        return {key: rows[kept[: self.max_detections]] for key, rows in both.items()}


def mirror(detections: dict[str, Tensor], width_px: int) -> dict[str, Tensor]:
    """Return the detections of an image from those of its mirror image; x2 is exclusive."""
    x1, y1, x2, y2 = detections["boxes"].unbind(dim=1)
    return {**detections, "boxes": torch.stack([width_px - x2, y1, width_px - x1, y2], dim=1)}
