"""The contract of every backbone: pooled features and named feature maps of RGB images."""

# B images, H height and W width in pixels, C channels, D features

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tract_transfer.models.weights_match import MatchReport


class MapInfo(NamedTuple):
    """The channels of a feature map, and the input pixels that a cell spans."""

    channels: int
    stride: int


class Backbone(nn.Module):
    """A feature extractor with one state dict and two outputs: pooled features and feature maps.

    Images are RGB, (B, 3, H, W), uint8 or float in [0, 1]; buffers `mean` and `std` normalize them.

    Attributes:
        origin: name, stem and args of the `build_backbone` call that made it.
        library: (`timm` or `torchvision`, model name, args) of the wrapped model.
        feature_dim: D of the pooled features.
        first_layers: dotted names of the layers that read the image.
        image_size_px: the only image size it accepts, or None for any.
        usual_size_px: the image size it is designed for, used to measure its feature maps.
        loaded: the report of the weights file it was loaded from, if any.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        feature_dim: int,
        first_layers: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        image_size_px: int | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.origin: dict[str, Any] = {}
        self.loaded: MatchReport | None = None
        self.library: tuple[str, str, dict[str, Any]] | None = None
        self.feature_dim = feature_dim
        self.first_layers = [f"model.{name}" for name in first_layers]
        self.image_size_px = image_size_px
        self.usual_size_px = 128
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def set_normalization(
        self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        """Set the normalization mean and std per channel, in [0, 1]; None keeps the current one."""
        for buffer, values in ((self.mean, mean), (self.std, std)):
            if values is not None:
                buffer.copy_(torch.tensor(values).view(3, 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """Return normalized float32 (..., 3, H, W) images."""
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        return (images - self.mean) / self.std

    def pooled(self, images: Tensor) -> Tensor:
        """Return the (B, D) features for a classification head."""
        features: Tensor = self.model(self.normalize(images))
        return features

    def maps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the feature maps `names` (see `map_info`), (B, C, H / stride, W / stride) each."""
        raise NotImplementedError

    def _map_names(self) -> list[str]:
        raise NotImplementedError

    @cached_property
    def map_info(self) -> dict[str, MapInfo]:
        """Channels and stride of each feature map, finest first, measured once on a blank image."""
        size_px = self.image_size_px or self.usual_size_px
        image = torch.zeros(1, 3, size_px, size_px, device=self.mean.device)
        in_training = [module for module in self.modules() if module.training]
        self.eval()
        with torch.no_grad():
            maps = self.maps(image, self._map_names())
        for module in in_training:  # modules that the caller keeps in eval mode stay there
            module.training = True
        return {
            name: MapInfo(features.shape[1], _stride(size_px, features.shape[-1]))
            for name, features in maps.items()
        }

    def pyramid(self) -> dict[str, MapInfo]:
        """Return the deepest feature map of each stride: the inputs of a feature pyramid."""
        deepest = {info.stride: name for name, info in self.map_info.items()}
        return {name: self.map_info[name] for _, name in sorted(deepest.items())}


def _stride(size_px: int, cells: int) -> int:
    """Return the stride of a feature map; without padding it has slightly fewer cells."""
    return size_px // cells if size_px % cells == 0 else 2 ** round(math.log2(size_px / cells))
