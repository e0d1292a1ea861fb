"""One contract over timm's, torchvision's and the paper's own backbones."""

# B images, H height and W width in pixels, C channels, D features

from collections.abc import Sequence
from typing import Any

import timm
import torchvision
from torch import Tensor, nn

from tract_transfer.models.backbone import Backbone
from tract_transfer.models.stem import change_stem
from tract_transfer.registry import Registry, did_you_mean

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

BACKBONES = Registry("BACKBONES")


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
