"""Backbones from timm and torchvision, and the registry of all backbones."""

# B images, H height and W width in pixels, C channels, D features

import warnings
from collections.abc import Sequence
from typing import Any

import timm
import torchvision
from torch import Tensor, nn

from tract_transfer.models.backbone import Backbone, check_contract
from tract_transfer.models.stem import change_stem
from tract_transfer.registry import Registry, did_you_mean, load_plugins

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

BACKBONES = Registry("BACKBONES")
_ZOO = "paper/cifar_zoo.py"


def build_backbone(
    name: str,
    *,
    stem: str = "default",
    args: dict[str, Any] | None = None,
    pretrained: bool = False,
) -> Backbone:
    """Build `timm/<model>`, `torchvision/<model>` or an entry of BACKBONES such as cifar/resnet18.

    Args:
        stem: "default", or a replacement; see `change_stem`.
        args: arguments of the model's constructor.
        pretrained: load the library's pre-trained weights (from its hub).

    Raises:
        KeyError: no such entry or model; the message names the nearest.
        ValueError: the constructor rejects `args`, or the stem does not fit.
    """
    check_backbone_name(name)
    args = args or {}
    source, _, model_name = name.partition("/")
    is_library = source in ("timm", "torchvision")
    build = BACKBONES.get(source if is_library else name)
    if pretrained and not is_library:
        raise ValueError(f"{name} has no published weights; set model.weights to a path.")
    try:
        backbone = build(model_name, args, pretrained) if is_library else build(**args)
    except (TypeError, AssertionError, RuntimeError) as error:  # what constructors raise
        message = f"{name} cannot be built with model.backbone.args {args}: {error}"
        raise ValueError(message) from error
    except OSError as error:  # of the hub, also if it cannot be reached
        reason = str(error).partition("\n")[0].rstrip(".")
        raise FileNotFoundError(
            f"The published weights of {name} cannot be loaded: {reason}. Connect to the hub once, "
            "or load a file: model.weights=FILE (in Python: create_backbone(..., weights=FILE))."
        ) from error
    if not is_library and not BACKBONES.is_built_in(name):
        check_contract(backbone, name)
    assert isinstance(backbone, Backbone)
    change_stem(backbone, stem)
    backbone.origin = {"name": name, "stem": stem, "args": args}
    return backbone


def check_backbone_name(name: str) -> None:
    """Raise a KeyError that names the nearest backbone if there is no `name`."""
    source, _, model = name.partition("/")
    if source not in ("timm", "torchvision"):
        if source == "cifar" and name not in BACKBONES:
            load_plugins([_ZOO])  # until 0.2, its networks were built in
            if name in BACKBONES:
                text = f"{name} is in a plug-in now. Name it: --plugin {_ZOO}, or plugins: [{_ZOO}]"
                warnings.warn(f"{text} in the config.", FutureWarning, stacklevel=3)
        BACKBONES.get(name)
    elif source == "timm" and not timm.is_model(model):
        hint = did_you_mean(model, timm.list_models())
        raise KeyError(f"timm has no model {model!r}.{hint} timm.list_models() lists all.")
    elif source == "timm" and "." in model:
        try:
            timm.get_pretrained_cfg(model)
        except RuntimeError:
            architecture = model.partition(".")[0]
            names = timm.list_pretrained(f"{architecture}.*")
            hint = did_you_mean(model, names)
            raise KeyError(f"timm has no weights {model!r}.{hint} {names}") from None
    elif source == "torchvision":
        models = torchvision.models.list_models(module=torchvision.models)
        if model not in models:
            hint = did_you_mean(model, models)
            raise KeyError(f"torchvision has no classification model {model!r}.{hint} {models}")


class TimmBackbone(Backbone):
    """A timm model without its classifier."""

    def maps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        known = self.map_names()
        indices = sorted(known.index(name) for name in names)
        tensors = self.model.forward_intermediates(
            self.normalize(images), indices=indices, intermediates_only=True, stop_early=True
        )
        features = {known[i]: tensor for i, tensor in zip(indices, tensors, strict=True)}
        return {name: features[name] for name in names}

    def map_names(self) -> list[str]:
        names = [info["module"] for info in self.model.feature_info]
        # A module with several feature maps is listed several times.
        return [f"{n}@{i}" if names.count(n) > 1 else n for i, n in enumerate(names)]


@BACKBONES.register("timm")
def timm_backbone(model_name: str, args: dict[str, Any], pretrained: bool) -> Backbone:
    """Wrap `timm.create_model(model_name, **args)`."""
    model = timm.create_model(model_name, pretrained=pretrained, num_classes=0, **args)
    config = model.pretrained_cfg
    first = config["first_conv"]
    backbone = TimmBackbone(
        model,
        feature_dim=getattr(model, "head_hidden_size", None) or model.num_features,
        first_layers=[first] if isinstance(first, str) else first,
        mean=config["mean"],
        std=config["std"],
        image_size_px=_fixed_size_px(model, config),
    )
    backbone.library = ("timm", config["architecture"], args)
    backbone.usual_size_px = int(config["input_size"][-1])  # some models need multiples of it
    return backbone


def _fixed_size_px(model: nn.Module, config: dict[str, Any]) -> int | None:
    """Return the size of timm models that accept only one: those with position embeddings."""
    patch_embed: Any = getattr(model, "patch_embed", None)
    if hasattr(patch_embed, "strict_img_size"):
        return int(patch_embed.img_size[0]) if patch_embed.strict_img_size else None
    return int(config["input_size"][-1]) if config.get("fixed_input_size") else None


class TorchvisionBackbone(Backbone):
    """A torchvision classification model without its classifier."""

    def maps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        features = self.normalize(images)
        for name, layer in self._layers():
            features = layer(features)
            if name in names:
                maps[name] = features
            if len(maps) == len(names):
                break
        if isinstance(self.model, torchvision.models.SwinTransformer):  # channels last
            maps = {name: features.permute(0, 3, 1, 2) for name, features in maps.items()}
        return {name: maps[name] for name in names}

    def map_names(self) -> list[str]:
        return [name for name, _ in self._layers() if name.startswith(("features.", "layer"))]

    def _layers(self) -> list[tuple[str, nn.Module]]:
        """Return the layers in order, from the image up to the last feature map."""
        children = list(self.model.named_children())
        if isinstance(features := dict(children).get("features"), nn.Sequential):
            return [(f"features.{name}", layer) for name, layer in features.named_children()]
        return children


@BACKBONES.register("torchvision")
def torchvision_backbone(model_name: str, args: dict[str, Any], pretrained: bool) -> Backbone:
    """Wrap `torchvision.models.get_model(model_name, **args)`."""
    inception = model_name in ("googlenet", "inception_v3")
    if inception and pretrained:  # convert images to [-1, 1] here, where model.json records it
        args = {"transform_input": False, **args}
    elif inception:
        args = {"aux_logits": False, "init_weights": True, **args}
    weights = "DEFAULT" if pretrained else None
    model = torchvision.models.get_model(model_name, weights=weights, **args)
    if inception and pretrained:
        model.aux_logits, model.AuxLogits = False, None
    readers = [n for n, m in model.named_modules() if getattr(m, "in_channels", None) == 3]
    backbone = TorchvisionBackbone(
        model,
        feature_dim=_remove_classifier(model),
        first_layers=readers[:1],
        mean=(0.5, 0.5, 0.5) if inception and pretrained else IMAGENET_MEAN,
        std=(0.5, 0.5, 0.5) if inception and pretrained else IMAGENET_STD,
        image_size_px=getattr(model, "image_size", None),
    )
    plain = {"aux_logits": False, "init_weights": False, "transform_input": False}
    backbone.library = ("torchvision", model_name, {**args, **plain} if inception else args)
    return backbone


def _remove_classifier(model: nn.Module) -> int:
    """Replace the last Linear of a torchvision model by an identity; return its input size."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:  # SqueezeNet classifies with a convolution before the pool
        model.classifier = nn.AdaptiveAvgPool2d(1)
        return 512
    parent, _, child = linears[-1].rpartition(".")
    feature_dim = int(model.get_submodule(linears[-1]).in_features)  # type: ignore[arg-type]
    setattr(model.get_submodule(parent), child, nn.Identity())
    return feature_dim
