"""The contract of every backbone: pooled features and named feature maps of RGB images."""

# B images, H height and W width in pixels, C channels, D features

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    `model` maps normalized images to features (B, D), or a subclass defines `pooled`. Feature maps
    are for detectors: a subclass that has some defines `maps` and `map_names`.

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
        """Return the feature maps `names` (see `map_info`), (B, C, H / stride, W / stride) each.

        Only detectors need them; a subclass that has some defines this and `map_names`.
        """
        raise ValueError(f"{type(self).__name__} has no feature maps {list(names)}.")

    def map_names(self) -> list[str]:
        """Return the names of all feature maps, finest first; a backbone may have none."""
        return []

    @cached_property
    def map_info(self) -> dict[str, MapInfo]:
        """Channels and stride of each feature map, finest first, measured once on a blank image."""
        if not (names := self.map_names()):
            return {}
        image = self._blank_images(1)
        with self._evaluating():
            maps = self.maps(image, names)
        return {
            name: MapInfo(features.shape[1], _stride(image.shape[-1], features.shape[-1]))
            for name, features in maps.items()
        }

    def _blank_images(self, count: int) -> Tensor:
        size_px = self.image_size_px or self.usual_size_px
        return torch.zeros(count, 3, size_px, size_px, device=self.mean.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluate without gradients; modules that the caller keeps in eval mode stay there."""
        in_training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in in_training:
                module.training = True

    def pyramid(self) -> dict[str, MapInfo]:
        """Return the deepest feature map of each stride: the inputs of a feature pyramid."""
        deepest = {info.stride: name for name, info in self.map_info.items()}
        return {name: self.map_info[name] for _, name in sorted(deepest.items())}


def check_contract(backbone: Any, name: str) -> None:
    """Refuse a backbone that would fail during its training, or when it is saved after it.

    Args:
        backbone: what the function of a plug-in returns.
        name: of the backbone, for errors.

    Raises:
        ValueError: names what is missing.
    """
    if not isinstance(backbone, Backbone):
        raise ValueError(
            f"{name} returns {type(backbone).__name__}. Return a tract_transfer.Backbone(model, "
            "feature_dim=..., first_layers=[...], mean=[...], std=[...])."
        )
    if backbone.mean.is_meta:
        return
    modules = dict(backbone.named_modules())
    if missing := [layer for layer in backbone.first_layers if layer not in modules]:
        own = [layer.removeprefix("model.") for layer in missing]
        raise ValueError(f"{name} has no module {own}. Correct the backbone's first_layers.")
    owners: dict[int, str] = {}
    for key, tensor in backbone.state_dict().items():
        if tensor.numel() and (other := owners.setdefault(tensor.data_ptr(), key)) != key:
            raise ValueError(
                f"{name}: {other} and {key} are one tensor, which model.safetensors cannot store. "
                "Register it once."
            )
    has_maps = type(backbone).maps is not Backbone.maps
    if has_maps != (type(backbone).map_names is not Backbone.map_names):
        raise ValueError(f"{name} needs both maps and map_names to have feature maps, or neither.")
    images = backbone._blank_images(2)
    with torch.random.fork_rng(devices=[]), backbone._evaluating():
        try:
            shape = tuple(backbone.pooled(images).shape)
            backbone.map_info  # noqa: B018 - measured once
        except Exception as error:  # whatever the model of a plug-in raises
            raise ValueError(
                f"{name} fails on a blank image of {images.shape[-1]} px: {type(error).__name__}: "
                f"{error}. If it takes images of one size alone, set image_size_px."
            ) from error
    if shape != (2, backbone.feature_dim):
        raise ValueError(
            f"{name} returns features of shape {shape} for 2 images, and feature_dim "
            f"{backbone.feature_dim} promises {(2, backbone.feature_dim)}. Correct one of them."
        )


def _stride(size_px: int, cells: int) -> int:
    """Return the stride of a feature map; without padding it has slightly fewer cells."""
    return size_px // cells if size_px % cells == 0 else 2 ** round(math.log2(size_px / cells))
