"""One contract over timm's, torchvision's and the paper's own backbones."""

# B images, H height and W width in pixels, C channels, D features

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn

from tract_transfer.models.stem import change_stem
from tract_transfer.models.weights_match import MatchReport
from tract_transfer.registry import Registry, did_you_mean

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

BACKBONES = Registry("BACKBONES")


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

    def set_colours(
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


class TimmBackbone(Backbone):
    """A timm model without its classifier."""

    def maps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        known = self._map_names()
        indices = sorted(known.index(name) for name in names)
        tensors = self.model.forward_intermediates(
            self.normalize(images), indices=indices, intermediates_only=True, stop_early=True
        )
        found = {known[index]: tensor for index, tensor in zip(indices, tensors, strict=True)}
        return {name: found[name] for name in names}

    def _map_names(self) -> list[str]:
        names = [info["module"] for info in self.model.feature_info]
        # A module that puts out several maps is named several times.
        return [f"{n}@{i}" if names.count(n) > 1 else n for i, n in enumerate(names)]


class TorchvisionBackbone(Backbone):
    """A torchvision classification model without its classifier."""

    def maps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        features = self.normalize(images)
        for name, layer in self._layers():
            features = layer(features)
            if name in names:
                found[name] = features
            if len(found) == len(names):
                break
        if isinstance(self.model, torchvision.models.SwinTransformer):  # channels come last
            found = {name: tensor.permute(0, 3, 1, 2) for name, tensor in found.items()}
        return {name: found[name] for name in names}

    def _map_names(self) -> list[str]:
        return [name for name, _ in self._layers() if name.startswith(("features.", "layer"))]

    def _layers(self) -> list[tuple[str, nn.Module]]:
        """The layers that follow each other from the image on, up to the last map."""
        children = list(self.model.named_children())
        if isinstance(features := dict(children).get("features"), nn.Sequential):
            return [(f"features.{name}", layer) for name, layer in features.named_children()]
        return children


def build_backbone(
    name: str,
    *,
    stem: str = "default",
    args: dict[str, Any] | None = None,
    pretrained: bool = False,
) -> Backbone:
    """Build `timm/<model>`, `torchvision/<model>` or an entry of BACKBONES such as cifar/resnet18.

    Args:
        stem: "default", or "cifar" to put a 3x3 convolution of stride 1 in place of a
            convolution stem, and leave its max-pool out; "patch_norm" or "dual_patch_norm" for
            LayerNorms around a patch embedding; "whitened" for a frozen 2x2 convolution, whose
            filters `stem.whiten` sets, before the first one.
        args: arguments of the model's own constructor.
        pretrained: load the source's pre-trained weights (from its hub).

    Raises:
        KeyError: no such entry or model; the message names the nearest.
        ValueError: the model refuses `args`, or has no stem to replace.
    """
    check_backbone_name(name)
    source, _, model_name = name.partition("/")
    from_source = source in ("timm", "torchvision")
    build = BACKBONES.get(source if from_source else name)
    if pretrained and not from_source:
        raise ValueError(f"{name} has no published weights; set model.weights to a path.")
    try:
        if from_source:
            backbone = build(model_name, args or {}, pretrained)
        else:
            backbone = build(**(args or {}))
    except (TypeError, AssertionError, RuntimeError) as error:  # what constructors raise
        raise ValueError(
            f"{name} cannot be built with model.backbone.args {args}: {error}"
        ) from error
    assert isinstance(backbone, Backbone)
    change_stem(backbone, stem)
    backbone.origin = {"name": name, "stem": stem, "args": args or {}}
    return backbone


def check_backbone_name(name: str) -> None:
    """Raise KeyError, which names the nearest, where there is no such backbone."""
    source, _, model = name.partition("/")
    if source not in ("timm", "torchvision"):
        BACKBONES.get(name)
    elif source == "timm" and not timm.is_model(model):
        near = did_you_mean(model, timm.list_models())
        raise KeyError(f"timm has no model {model!r}.{near} timm.list_models() names all.")
    elif source == "torchvision":
        known = torchvision.models.list_models(module=torchvision.models)
        if model not in known:
            near = did_you_mean(model, known)
            said = f"torchvision has no classification model {model!r}.{near} Known: {known}"
            raise KeyError(said)


@BACKBONES.register("timm")
def timm_backbone(model_name: str, args: dict[str, Any], pretrained: bool) -> Backbone:
    """Wrap `timm.create_model(model_name, **args)`."""
    model = timm.create_model(model_name, pretrained=pretrained, num_classes=0, **args)
    config = model.pretrained_cfg
    first = config["first_conv"]
    size_px = _fixed_size_px(model, config)
    backbone = TimmBackbone(
        model,
        feature_dim=getattr(model, "head_hidden_size", None) or model.num_features,
        first_layers=[first] if isinstance(first, str) else first,
        mean=config["mean"],
        std=config["std"],
        image_size_px=size_px,
    )
    backbone.library = ("timm", config["architecture"], args)
    backbone.usual_size_px = int(config["input_size"][-1])  # some ask for multiples of it
    return backbone


@BACKBONES.register("torchvision")
def torchvision_backbone(model_name: str, args: dict[str, Any], pretrained: bool) -> Backbone:
    """Wrap `torchvision.models.get_model(model_name, **args)`."""
    inception = model_name in ("googlenet", "inception_v3")
    if inception and pretrained:
        # These weights want colours in [-1, 1]. torchvision would convert to them inside the
        # model, where no saved card shows it.
        args = {"transform_input": False, **args}
    elif inception:
        args = {"aux_logits": False, "init_weights": True, **args}
    weights = "DEFAULT" if pretrained else None
    model = torchvision.models.get_model(model_name, weights=weights, **args)
    if inception and pretrained:
        model.aux_logits, model.AuxLogits = False, None
    first = next(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 3
    )
    backbone = TorchvisionBackbone(
        model,
        feature_dim=_remove_classifier(model),
        first_layers=[first],
        mean=(0.5, 0.5, 0.5) if inception and pretrained else IMAGENET_MEAN,
        std=(0.5, 0.5, 0.5) if inception and pretrained else IMAGENET_STD,
        image_size_px=getattr(model, "image_size", None),
    )
    plain = {"aux_logits": False, "init_weights": False, "transform_input": False}
    backbone.library = ("torchvision", model_name, {**args, **plain} if inception else args)
    return backbone


def _fixed_size_px(model: nn.Module, config: dict[str, Any]) -> int | None:
    """The size of timm's models that take one only: those with a grid of position embeddings."""
    patches: Any = getattr(model, "patch_embed", None)
    if hasattr(patches, "strict_img_size"):
        return int(patches.img_size[0]) if patches.strict_img_size else None
    return int(config["input_size"][-1]) if config.get("fixed_input_size") else None


def _stride(size_px: int, size: int) -> int:
    """Input pixels a cell spans; a convolution without padding makes a map a little smaller."""
    return size_px // size if size_px % size == 0 else 2 ** round(math.log2(size_px / size))


def _remove_classifier(model: nn.Module) -> int:
    """Put an identity in place of the last Linear of a torchvision model; return its inputs."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:  # SqueezeNet classifies by a convolution before the pool.
        model.classifier = nn.AdaptiveAvgPool2d(1)
        return 512
    parent, _, child = linears[-1].rpartition(".")
    feature_dim = int(model.get_submodule(linears[-1]).in_features)  # type: ignore[arg-type]
    setattr(model.get_submodule(parent), child, nn.Identity())
    return feature_dim
