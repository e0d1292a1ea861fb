"""A backbone and a head."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torchvision.ops import batched_nms

from tract_transfer.models.backbone import Backbone
from tract_transfer.registry import Registry

_TRUNK = "backbone.model."


class Classifier(nn.Module):
    """Classifies images.

    In training `model(images, targets)` returns {"loss_cls": scalar}; in eval `model(images)`
    returns (B, K) logits. Images are (B, 3, H, W) RGB, uint8 or float in [0, 1]; targets are (B,)
    class indices, or (B, K) probabilities.

    Args:
        label_smoothing: the share of every target that is spread evenly over all classes.
        loss: `cross_entropy`; or `bce`, a binary cross-entropy for each class, of mean over images
            and classes (Wightman et al. 2021).
        bce_target_threshold: targets of `bce` above it become 1, and all others 0: with 0, DeiT
            III's, both classes of a mixed image are wholly there. None leaves them.

    Raises:
        ValueError: an unknown loss, or a threshold with cross-entropy or smoothing.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        label_smoothing: float = 0.0,
        *,
        loss: str = "cross_entropy",
        bce_target_threshold: float | None = None,
    ) -> None:
        super().__init__()
        if loss not in ("cross_entropy", "bce"):
            raise ValueError(f"loss must be cross_entropy or bce, got {loss!r}.")
        if bce_target_threshold is not None and (loss != "bce" or label_smoothing):
            raise ValueError(
                "bce_target_threshold is for loss: bce, and makes of any smoothed target 0 or 1 "
                "again. Leave it out, or set label_smoothing: 0."
            )
        self.backbone = backbone
        self.head = head
        self.label_smoothing = label_smoothing
        self.loss = loss
        self.bce_target_threshold = bce_target_threshold

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """Return the loss in training, logits in eval; see the class."""
        features = self.backbone.pooled(images)
        with torch.autocast(features.device.type, enabled=False):  # scores are ranked unrounded
            logits: Tensor = self.head(features.float())
        if not self.training:
            return logits
        assert targets is not None
        return {"loss_cls": self._loss_of(logits, targets)}

    def no_weight_decay(self) -> set[str]:
        """Return the names of what timm's recipes do not decay, such as position embeddings."""
        names: set[str] = getattr(self.backbone.model, "no_weight_decay", set)()
        return {f"{_TRUNK}{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the function from a parameter's name to its layer, the head's being the last.

        It is what timm's layer decay asks for.

        Raises:
            ValueError: the backbone tells no layers; timm's do.
        """
        if not hasattr(self.backbone.model, "group_matcher"):
            raise ValueError(
                "solver.layer_decay needs a backbone that tells its layers, as timm's do; "
                f"{self.backbone.origin.get('name')} does not. Set it to null."
            )
        trunk = self.backbone.model
        # Where timm's own classifier would be: in a ConvNeXt, with the norm before it.
        head = f"{trunk.pretrained_cfg['classifier']}.weight"
        named = ((name, name) for name in (*dict(trunk.named_parameters()), head))
        layers = group_with_matcher(named, trunk.group_matcher(coarse=coarse), reverse=True)
        return lambda name: int(layers.get(name.removeprefix(_TRUNK), layers[head]))

    def _loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.loss == "cross_entropy":
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        num_classes = logits.shape[1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, num_classes)
        smoothing = self.label_smoothing
        soft = targets.to(logits.dtype) * (1 - smoothing) + smoothing / num_classes
        if self.bce_target_threshold is not None:
            soft = (soft > self.bce_target_threshold).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, soft)


# --- A model that looks at every image twice: as it is, and mirrored left to right.


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


# --- What turns pooled features into class scores.

HEADS = Registry("HEADS")


@HEADS.register("linear")
def linear(feature_dim: int, num_classes: int, *, zero_init: bool = False) -> nn.Module:
    """(B, D) -> (B, K) by one matrix; `zero_init` starts all scores at 0 (BiT's fine-tuning)."""
    head = nn.Linear(feature_dim, num_classes)
    if zero_init:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return head


@HEADS.register("mlp")
def mlp(
    feature_dim: int, num_classes: int, *, hidden_dim: int = 512, dropout: float = 0.0
) -> nn.Module:
    """(B, D) -> (B, K) over one hidden layer of `hidden_dim` with GELU."""
    return nn.Sequential(
        nn.Linear(feature_dim, hidden_dim),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden_dim, num_classes),
    )
