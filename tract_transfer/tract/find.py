"""Find the layer that reads the image, and check that TrAct can treat it."""

from difflib import get_close_matches

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tract_transfer.tract.gram import is_dynamic_same

MAX_INPUTS = 16384  # of a layer: its matrix takes 1 GiB


def find_first_layers(model: nn.Module) -> list[str]:
    """Return the dotted names of the layers that read the image.

    In this order: `first_layers` of the model or of one of its parts (our backbones have it),
    timm's `pretrained_cfg["first_conv"]`, the only convolution with 3 input channels, the only one
    with 1, 2 or 4, and, in a model without convolutions, its first Linear, unless an Embedding
    precedes it.

    Raises:
        ValueError: no layer or several could be the first; the message lists them.
    """
    for prefix, module in model.named_modules():
        if names := _declared_first_layers(module):
            return [f"{prefix}.{name}" if prefix else name for name in names]
    kind, layers = type(model).__name__, dict(model.named_modules())
    convs = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, nn.modules.conv._ConvNd) and not layer.transposed
    }
    channels = {n: conv.in_channels for n, conv in convs.items() if isinstance(conv, nn.Conv2d)}
    candidates = [name for name, count in channels.items() if count == 3]
    candidates = candidates or [name for name, count in channels.items() if count in (1, 2, 4)]
    if not convs:
        readers = [name for name, x in layers.items() if isinstance(x, nn.Linear | nn.Embedding)]
        candidates = [name for name in readers[:1] if isinstance(layers[name], nn.Linear)]
    hint = 'Name it: TrAct(model, layers=["..."]), or tract.layers in a config.'
    if len(candidates) != 1:
        could = f"{len(candidates)} could: {candidates[:5]}" if candidates else "none does"
        raise ValueError(
            f"TrAct needs the Linear or Conv2d layer that reads the image, and of {kind}'s layers "
            f"{could}. {hint}"
        )
    return candidates


def _declared_first_layers(module: nn.Module) -> list[str]:
    """`first_layers` of our backbones, or `first_conv` of timm's models."""
    names = getattr(module, "first_layers", None)
    if names and isinstance(names, list) and all(isinstance(name, str) for name in names):
        return list(names)
    config = getattr(module, "pretrained_cfg", None)
    names = config.get("first_conv") if isinstance(config, dict) else None
    names = [names] if isinstance(names, str) else list(names or [])
    modules = dict(module.named_modules()) if names else {}
    return names if all(name in modules for name in names) else []


def check_layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """Return the layer called `name`, or raise ValueError that says why TrAct cannot treat it."""
    layers: dict[str, nn.Module] = dict(model.named_modules())
    if name not in layers:
        near = get_close_matches(name, layers, n=3, cutoff=0.5)
        plain = [key for key, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv2d)]
        hint = f"Nearest: {near}" if near else f"Its first layers are {plain[:3]}"
        raise ValueError(f"{type(model).__name__} has no layer {name!r}. {hint}.")
    layer = layers[name]
    if not isinstance(layer, nn.Linear | nn.Conv2d) or isinstance(layer, nn.LazyConv2d):
        problem = f"TrAct treats Linear and Conv2d layers; {name} is a {type(layer).__name__}"
    elif isinstance(layer, nn.Conv2d) and layer.groups != 1:
        problem = f"TrAct needs an ungrouped convolution; {name} has groups={layer.groups}"
    elif _changes_what_it_multiplies(layer):
        problem = (
            f"{name} ({type(layer).__name__}) changes its weight or its input in the forward "
            "(weight standardization, a parametrization). TrAct needs a plain first layer"
        )
    elif sharers := [
        other
        for other, module in layers.items()
        if module is not layer and any(layer.weight is p for p in module._parameters.values())
    ]:
        problem = (
            f"{name}.weight is also the weight of {sharers}, so its gradient comes from inputs "
            "that TrAct does not see. Untie them"
        )
    elif (num_inputs := layer.weight.shape[1:].numel()) > MAX_INPUTS:
        problem = (
            f"TrAct needs an n x n matrix for a layer with n inputs; {name} has {num_inputs:,} "
            f"({num_inputs**2 * 4 / 2**30:,.0f} GiB), more than {MAX_INPUTS:,}. Read the image by "
            "patches or a convolution"
        )
    elif not layer.weight.requires_grad:
        problem = (
            f"{name}.weight is frozen, so TrAct would do nothing. Unfreeze it, or turn TrAct off "
            "(tract.enabled: false in a config)"
        )
    else:
        return layer
    raise ValueError(f"{problem}.")


def _changes_what_it_multiplies(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether a parametrization or an overridden forward may change the weight or the input."""
    if is_parametrized(layer) or "weight" not in layer._parameters or "forward" in vars(layer):
        return True  # weight_norm and the like, or a forward set on the instance
    if isinstance(layer, nn.Conv2d) and type(layer)._conv_forward is not nn.Conv2d._conv_forward:
        return True
    forward = type(layer).forward
    if forward in (nn.Linear.forward, nn.Conv2d.forward) or is_dynamic_same(layer):
        return False
    # detectron2's Conv2d applies norm and activation afterwards, and pads by zeros only.
    full_name = f"{forward.__module__}.{forward.__qualname__}"
    is_detectron2 = full_name == "detectron2.layers.wrappers.Conv2d.forward"
    return not (is_detectron2 and getattr(layer, "padding_mode", None) == "zeros")
