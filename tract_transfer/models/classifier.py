"""A backbone and a head."""

# B images, H height and W width in pixels, K classes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tract_transfer.models.backbones import Backbone


class Classifier(nn.Module):
    """Classifies images.

    In training `model(images, targets)` returns {"loss_cls": scalar}; in eval `model(images)`
    returns (B, K) logits. Images are (B, 3, H, W) RGB, uint8 or float in [0, 1]; targets are (B,)
    class indices, or (B, K) probabilities.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        features = self.backbone.pooled(images)
        with torch.autocast(features.device.type, enabled=False):  # scores are ranked unrounded
            logits: Tensor = self.head(features.float())
        if not self.training:
            return logits
        assert targets is not None
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        return {"loss_cls": loss}
