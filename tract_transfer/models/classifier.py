"""The classifier: a backbone and a head."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from tract_transfer.models.backbone import Backbone
from tract_transfer.registry import Registry

HEADS = Registry("HEADS")
_PREFIX = "backbone.model."


class Classifier(nn.Module):
    """Classifies images into K classes.

    In training `model(images, targets)` returns {"loss_cls": scalar}; in eval `model(images)`
    returns (B, K) logits. Images are (B, 3, H, W) RGB, uint8 or float in [0, 1]; targets are (B,)
    class indices, or (B, K) probabilities.

    Args:
        label_smoothing: the share of each target that is spread evenly over all classes.
        loss: `cross_entropy`, or `bce`: binary cross-entropy per class, averaged over images and
            classes (Wightman et al. 2021).
        bce_target_threshold: targets of bce above it become 1, all others 0. With 0 (DeiT III)
            both classes of a mixed image are fully present. None keeps targets as they are.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        label_smoothing: float = 0.0,
        *,
        loss: Literal["cross_entropy", "bce"] = "cross_entropy",
        bce_target_threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.label_smoothing = label_smoothing
        self.loss = loss
        self.bce_target_threshold = bce_target_threshold

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        features = self.backbone.pooled(images)
        with torch.autocast(features.device.type, enabled=False):  # rounding would tie scores
            logits: Tensor = self.head(features.float())
        if not self.training:
            return logits
        assert targets is not None
        return {"loss_cls": self._loss(logits, targets)}

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing, num_classes = self.label_smoothing, logits.shape[1]
        if self.loss == "cross_entropy":
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if targets.ndim == 1:
            targets = F.one_hot(targets, num_classes)
        soft = targets.to(logits.dtype) * (1 - smoothing) + smoothing / num_classes
        if self.bce_target_threshold is not None:
            soft = (soft > self.bce_target_threshold).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, soft)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's recipes do not decay, such as position embeddings."""
        names: set[str] = getattr(self.backbone.model, "no_weight_decay", set)()
        return {f"{_PREFIX}{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the function from parameter name to layer number that timm's layer decay uses.

        Backbones that do not define their layers raise a ValueError; timm's do.
        """
        trunk = self.backbone.model
        if not hasattr(trunk, "group_matcher"):
            raise ValueError(
                "solver.layer_decay needs a backbone that defines its layers, as timm's do; "
                f"{self.backbone.origin.get('name')} does not. Set it to null."
            )
        # The head is in the layer of timm's own classifier; in a ConvNeXt that includes the norm.
        head = f"{trunk.pretrained_cfg['classifier']}.weight"
        named = ((name, name) for name in (*dict(trunk.named_parameters()), head))
        layers = group_with_matcher(named, trunk.group_matcher(coarse=coarse), reverse=True)
        return lambda name: int(layers.get(name.removeprefix(_PREFIX), layers[head]))


class FlipClassifier(nn.Module):
    """Test-time flipping: in eval, the mean logits (B, K) of each image and its mirror image."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(images) + self.classifier(images.flip(-1))
        return logits / 2


@HEADS.register("linear")
def linear(feature_dim: int, num_classes: int, *, zero_init: bool = False) -> nn.Module:
    """(B, D) -> (B, K) by one matrix; `zero_init` starts with all scores 0, as BiT does."""
    head = nn.Linear(feature_dim, num_classes)
    if zero_init:
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    return head


@HEADS.register("mlp")
def mlp(
    feature_dim: int, num_classes: int, *, hidden_dim: int = 512, dropout: float = 0.0
) -> nn.Module:
    """(B, D) -> (B, K) with one hidden layer of `hidden_dim` and GELU."""
    hidden, output = nn.Linear(feature_dim, hidden_dim), nn.Linear(hidden_dim, num_classes)
    return nn.Sequential(hidden, nn.GELU(), nn.Dropout(dropout), output)
