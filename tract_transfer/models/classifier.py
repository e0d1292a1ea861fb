"""A backbone and a head."""

# B images, H height and W width in pixels, K classes

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from tract_transfer.models.backbones import Backbone

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
