"""Box heads made of a backbone's own last layers: a ResNet's fourth stage, a VGG's fc6 and fc7.

They read the layers and do not own them: the layers stay the backbone's, so that it is saved
whole, and no weight is in a state dict twice.
"""

# R proposals, C channels, S pooled side, D features

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tract_transfer.models.backbones import Backbone


class StageHead(nn.Module):
    """(R, C, S, S) -> (R, D): a stage of convolutions, `norm`, and the mean over cells."""

    def __init__(self, stage: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self._borrowed = (stage,)  # in a tuple torch takes no part of
        self.norm = norm

    def forward(self, pooled: Tensor) -> Tensor:
        features: Tensor = self.norm(self._borrowed[0](pooled))
        return features.mean((2, 3))


class LayersHead(nn.Module):
    """(R, C, S, S) -> (R, D): linear layers, or convolutions as wide as S, each with ReLU and
    dropout."""

    def __init__(self, layers: Sequence[nn.Linear | nn.Conv2d], dropout: float) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: must lie in [0, 1), got {dropout}.")
        self._borrowed = tuple(layers)
        self.dropout = dropout

    def forward(self, features: Tensor) -> Tensor:
        for layer in self._borrowed:
            inputs = features.flatten(1) if isinstance(layer, nn.Linear) else features
            features = F.dropout(F.relu(layer(inputs)), self.dropout, self.training)
        return features.flatten(1)


def fully_connected(backbone: Backbone) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """Return fc6 and fc7 of a torchvision or timm VGG.

    Raises:
        ValueError: the backbone is no VGG.
    """
    for fc6, fc7 in (("classifier.0", "classifier.3"), ("pre_logits.fc1", "pre_logits.fc2")):
        known = dict(backbone.model.named_modules())
        layers = known.get(fc6), known.get(fc7)
        if "features" in known and all(isinstance(x, nn.Linear | nn.Conv2d) for x in layers):
            return layers  # type: ignore[return-value]
    raise ValueError(
        "torchvision_c5 needs a VGG, whose fc6 and fc7 become the box head, and this backbone is "
        f"a {type(backbone.model).__name__}. Use torchvision_c4 or torchvision_fpn."
    )


def norm_like(backbone: Backbone, channels: int) -> nn.Module:
    """Return a BatchNorm, synchronised over processes if the backbone's are."""
    synced = any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules())
    return nn.SyncBatchNorm(channels) if synced else nn.BatchNorm2d(channels)
