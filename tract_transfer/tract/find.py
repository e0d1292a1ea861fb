"""Which layer reads the image."""

from difflib import get_close_matches

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tract_transfer.tract.gram import is_dynamic_same

IMAGE_CHANNELS = (1, 2, 3, 4)
MAX_INPUTS = 16384  # of a layer: its matrix is 1 GiB then


def find_first_layers(model: nn.Module) -> list[str]:
    """Return the dotted names of the layers that read the image.

    Asked in this order: `first_layers` of the model or of a part of it (our backbones have it),
    timm's `pretrained_cfg["first_conv"]`, the one convolution of 3 input channels, else the one
    of 1, 2 or 4, and, in a model without convolutions, its first Linear.

    Raises:
        ValueError: none or several layers could be the first; the message lists them.
    """
    for prefix, module in model.named_modules():
        names = _own_first_layers(module) or _timm_first_layers(module)
        if names:
            return [f"{prefix}.{name}" if prefix else name for name in names]
    convs = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed
    ]
    candidates = [name for name in convs if _channels(model.get_submodule(name)) == 3]
    candidates = candidates or [
        name for name in convs if _channels(model.get_submodule(name)) in IMAGE_CHANNELS
    ]
    if not convs:
        readers = (nn.Linear, nn.Embedding)
        candidates = [name for name, each in model.named_modules() if isinstance(each, readers)][:1]
    if len(candidates) == 1:
        _refuse_tokens(model, candidates[0])
        return candidates
    kinds = {type(model.get_submodule(name)) for name in convs}
    if kinds and not any(issubclass(kind, nn.Conv2d) for kind in kinds):
        raise ValueError(
            f"TrAct treats Linear and Conv2d layers; the convolutions of {type(model).__name__} "
            f"are {', '.join(sorted(kind.__name__ for kind in kinds))}."
        )
    found = f"{len(candidates)} could: {candidates[:5]}" if candidates else "none does"
    raise ValueError(
        f"TrAct needs the layer that reads the image, and of {type(model).__name__}'s layers "
        f'{found}. Name it: TrAct(model, layers=["..."]), or tract.layers in a config.'
    )


def _refuse_tokens(model: nn.Module, name: str) -> None:
    if isinstance(model.get_submodule(name), nn.Embedding):
        raise ValueError(
            f"The first layer of {type(model).__name__} is {name}, an embedding of tokens, and "
            'TrAct is for layers that read images. Name one: TrAct(model, layers=["..."]).'
        )


def check_layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """Return the layer called `name`, or raise ValueError that says why TrAct cannot treat it."""
    layer = _layer_called(model, name)
    kind = type(layer).__name__
    if not isinstance(layer, nn.Linear | nn.Conv2d) or isinstance(layer, nn.LazyConv2d):
        raise ValueError(f"TrAct treats Linear and Conv2d layers; {name} is a {kind}.")
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise ValueError(
            f"TrAct needs an ungrouped convolution; {name} has groups={layer.groups}: "
            "its outputs do not share their inputs, so there is no one matrix to multiply by."
        )
    if _changes_what_it_multiplies(layer):
        raise ValueError(
            f"TrAct needs a layer whose weight multiplies its input as it stands; {name} "
            f"({kind}) changes its weight or its input in the forward (weight standardisation, "
            "a parametrization). Use a model with a plain first layer."
        )
    sharers = [
        other
        for other, module in model.named_modules()
        if module is not layer and any(layer.weight is p for p in module._parameters.values())
    ]
    if sharers:
        raise ValueError(
            f"{name}.weight is also that of {sharers}: its gradient comes from inputs that TrAct "
            "does not see. Untie them."
        )
    num_inputs = layer.weight.shape[1:].numel()
    if num_inputs > MAX_INPUTS:
        raise ValueError(
            f"TrAct needs an n x n matrix of a layer with n inputs; {name} has {num_inputs:,} "
            f"({num_inputs**2 * 4 / 2**30:,.0f} GiB), and {MAX_INPUTS:,} are the most. Read the "
            "image by patches or a convolution."
        )
    if not layer.weight.requires_grad:
        raise ValueError(
            f"{name}.weight is frozen, so TrAct would do nothing. Unfreeze the stem, or leave "
            "TrAct off (tract.enabled: false in a config)."
        )
    return layer


def _layer_called(model: nn.Module, name: str) -> nn.Module:
    known: dict[str, nn.Module] = dict(model.named_modules())
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        begins = [key for key, each in known.items() if isinstance(each, nn.Linear | nn.Conv2d)][:3]
        hint = f"Nearest: {near}" if near else f"It begins with {begins}"
        raise ValueError(f"{type(model).__name__} has no layer {name!r}. {hint}.")
    return known[name]


def _changes_what_it_multiplies(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether a parametrization, or a forward of its own, may change the weight or the input."""
    if is_parametrized(layer) or "weight" not in layer._parameters:  # weight_norm and kin
        return True
    if "forward" in vars(layer):  # of the object itself
        return True
    if isinstance(layer, nn.Conv2d) and type(layer)._conv_forward is not nn.Conv2d._conv_forward:
        return True
    is_torch_s = type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward)
    return not (is_torch_s or is_dynamic_same(layer) or _is_detectron2_s(layer))


def _is_detectron2_s(layer: nn.Module) -> bool:
    """Whether `layer` is detectron2's Conv2d: norm and activation follow, padding is of zeros."""
    forward = type(layer).forward
    place = (forward.__module__, forward.__qualname__)
    known = place == ("detectron2.layers.wrappers", "Conv2d.forward")
    return known and getattr(layer, "padding_mode", None) == "zeros"


def _channels(module: nn.Module) -> int | None:
    return module.in_channels if isinstance(module, nn.Conv2d) else None


def _own_first_layers(module: nn.Module) -> list[str]:
    """`first_layers` of our backbones; a foreign attribute of that name is none."""
    names = getattr(module, "first_layers", None)
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return list(names) if known else []  # type: ignore[arg-type]


def _timm_first_layers(module: nn.Module) -> list[str]:
    config = getattr(module, "pretrained_cfg", None)
    names = config.get("first_conv") if isinstance(config, dict) else None
    names = [names] if isinstance(names, str) else list(names or [])
    known = {name for name, _ in module.named_modules()} if names else set()
    return names if all(name in known for name in names) else []
