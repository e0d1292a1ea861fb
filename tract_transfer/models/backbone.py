"""The contract of every backbone: pooled features and named feature maps of normalised images."""

# B images, H height and W width in pixels, C channels, D features

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tract_transfer.models.weights_match import MatchReport


class MapInfo(NamedTuple):
    """What a feature map is: its channels, and the input pixels a cell of it spans."""

    channels: int
    stride: int


class Backbone(nn.Module):
    """A feature extractor of one state dict and two uses: pooled features and named maps.

    Images come in as RGB, (B, 3, H, W), uint8 or float in [0, 1]; they are normalised here, by
    buffers that travel with the weights.

    Attributes:
        origin: the name, stem and args `build_backbone` made it from.
        library: whose model it wraps, `timm` or `torchvision`, by which name and args there.
        feature_dim: D of the pooled features.
        first_layers: dotted names of the layers that read the image.
        image_size_px: the only size it takes, or None where it takes any.
        usual_size_px: the size it is meant for; maps are measured at it.
        loaded: what became of the weights file it was loaded from, if it was.
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
        self._map_info: dict[str, MapInfo] | None = None

    def set_normalization(
        self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        """Set what images are normalised by: per channel, in [0, 1]; None leaves it."""
        for buffer, values in ((self.mean, mean), (self.std, std)):
            if values is not None:
                buffer.copy_(torch.tensor(values).view(3, 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """Return (..., 3, H, W) images as float32 of the backbone's mean 0 and std 1."""
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        return (images - self.mean) / self.std

    def pooled(self, images: Tensor) -> Tensor:
        """Return the (B, D) features a classification head reads."""
        features: Tensor = self.model(self.normalize(images))
        return features

    def maps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the maps called `names` (see `map_info`), each (B, C, H / stride, W / stride)."""
        raise NotImplementedError

    @property
    def map_info(self) -> dict[str, MapInfo]:
        """Name, channels and stride of every map, finest first; measured once on a blank image."""
        if self._map_info is None:
            size_px = self.image_size_px or self.usual_size_px
            image = torch.zeros(1, 3, size_px, size_px, device=self.mean.device)
            in_training = [module for module in self.modules() if module.training]
            self.eval()
            with torch.no_grad():
                maps = self.maps(image, self._map_names())
            for module in in_training:  # what the caller keeps in eval mode stays there
                module.training = True
            self._map_info = {
                name: MapInfo(tensor.shape[1], _stride(size_px, tensor.shape[-1]))
                for name, tensor in maps.items()
            }
        return self._map_info

    def pyramid(self) -> dict[str, MapInfo]:
        """Return the deepest map of each stride: what a feature pyramid is built on."""
        deepest = {info.stride: name for name, info in self.map_info.items()}
        return {name: self.map_info[name] for _, name in sorted(deepest.items())}

    def _map_names(self) -> list[str]:
        raise NotImplementedError


def _stride(size_px: int, size: int) -> int:
    """Input pixels a cell spans; a convolution without padding makes a map a little smaller."""
    return size_px // size if size_px % size == 0 else 2 ** round(math.log2(size_px / size))
