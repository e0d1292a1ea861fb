"""A model that looks at every image twice: as it is, and mirrored left to right."""

# B images, K classes, N boxes of an image

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms


class FlipClassifier(nn.Module):
    """In eval, (B, K) logits: the mean of the classifier's over an image and its mirror image."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(images) + self.classifier(images.flip(-1))
        return logits / 2


class FlipDetector(nn.Module):
    """In eval, the detections of both views, those of the mirror image mirrored back.

    Of boxes of a class that overlap by more than `nms_iou` the best-scored stays; of an image
    the `max_detections` best-scored boxes stay. The contract is the detector's own.
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
            self._joined(one, _mirror(other, image.shape[-1]))
            for image, one, other in zip(images, plain, mirrored, strict=True)
        ]

    def _joined(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
        both = {key: torch.cat([one[key], other[key]]) for key in ("boxes", "scores", "labels")}
        kept = batched_nms(both["boxes"], both["scores"], both["labels"], self.nms_iou)
        return {key: rows[kept[: self.max_detections]] for key, rows in both.items()}


def _mirror(found: dict[str, Tensor], width_px: int) -> dict[str, Tensor]:
    """Return detections of a mirror image in the image's own pixels; x2 is exclusive."""
    x1, y1, x2, y2 = found["boxes"].unbind(dim=1)
    return {**found, "boxes": torch.stack([width_px - x2, y1, width_px - x1, y2], dim=1)}
