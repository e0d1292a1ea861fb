"""What of a backbone stays as it is while a detector trains on it."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import timm
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tract_transfer.models.backbone import Backbone


def freeze_stages(backbone: Backbone, count: int) -> None:
    """Freeze the first `count` stages: their weights, and the statistics of their BatchNorms.

    Stages are counted as detectron2 counts a ResNet's: 1 is the stem, 2 the stem and the first
    stage, 5 everything. Of a VGG, 1 is conv1_x and 5 conv5_x; of a plain ViT, 1 is the patch
    embedding, and each quarter of its blocks one more.

    Raises:
        ValueError: there are fewer stages.
    """
    stages = stage_names(backbone) if count else []
    if not 0 <= count <= len(stages) and count:
        raise ValueError(
            f"model.freeze_at {count} must be at most {len(stages)}, the stages of this backbone."
        )
    for name in (name for stage in stages[:count] for name in stage):
        module = backbone.model.get_submodule(name)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if isinstance(module, _BatchNorm):
            _fix(module)


def set_norm(backbone: Backbone, norm: str) -> Backbone:
    """Make the BatchNorms of a backbone `trained`, `frozen` or `synced`; return the backbone.

    `trained` leaves them as they are; `frozen` fixes statistics and weights (small batches, a
    pre-trained backbone); `synced` takes the statistics over all processes. No name in the state
    dict changes.

    Raises:
        ValueError: there are none to freeze or to synchronise.
    """
    if norm not in ("trained", "frozen", "synced"):
        raise ValueError(f"model.norm must be trained, frozen or synced, got {norm!r}.")
    if norm == "trained":
        return backbone
    found = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    if not found:
        raise ValueError(f"model.norm: {norm} is for BatchNorms, and this backbone has none.")
    if norm == "synced":
        backbone.model = timm.layers.convert_sync_batchnorm(backbone.model)
        return backbone
    for module in found:
        module.requires_grad_(False)
        _fix(module)
    return backbone


def stage_names(backbone: Backbone) -> list[list[str]]:
    """Return the names of the modules of each stage (inside `backbone.model`), in their order.

    The stem is what stands before the first map; a stage ends with the deepest map of a stride,
    or, where all maps have one stride, with a quarter of them.
    """
    names = [name for name, _ in backbone.model.named_modules()]
    maps = [name.partition("@")[0] for name in backbone.map_info]
    if unknown := [name for name in maps if name not in names]:
        raise ValueError(f"model.freeze_at cannot tell the stages of this backbone: {unknown}.")
    ends = [name.partition("@")[0] for name in backbone.pyramid()]
    if len(ends) == 1:
        ends = [maps[len(maps) * quarter // 4 - 1] for quarter in (1, 2, 3, 4) if len(maps) >= 4]
    cuts = [0, names.index(maps[0])]
    for end in ends:
        inside = [i for i, n in enumerate(names) if n == end or n.startswith(f"{end}.")]
        cuts.append(max(inside) + 1)
    slices = [names[start:stop] for start, stop in pairwise(cuts)]
    return [part for part in slices if any(_own_parameters(backbone, name) for name in part)]


def _own_parameters(backbone: Backbone, name: str) -> list[nn.Parameter]:
    return list(backbone.model.get_submodule(name).parameters(recurse=False))


def _fix(norm: _BatchNorm) -> None:
    """Keep a BatchNorm in eval mode, whatever mode the model is set to."""
    norm.register_forward_pre_hook(_to_eval)


def _to_eval(module: nn.Module, _inputs: Any) -> None:
    module.eval()


# --- Stochastic depth (Huang et al. 2016) in timm's models, at a rate of one's own.


def set_drop_path(model: nn.Module, rate: float, mode: str) -> None:
    """Let each residual branch of `model` be left out in training, a sample at a time.

    Args:
        rate: probability of being left out, in [0, 1).
        mode: `constant`: `rate` for every block (DeiT III). `linear`: from 0 for the first block
            to `rate` for the last, as in timm's ViTs, ResNets, ConvNeXts and Swins.

    Raises:
        ValueError: an unknown mode, or a model without timm's stochastic depth.
    """
    if mode not in ("constant", "linear"):
        raise ValueError(f"model.backbone.drop_path.mode must be constant or linear, got {mode!r}.")
    blocks = list(_blocks(model))
    if not blocks:
        raise ValueError(
            "model.backbone.drop_path is for timm's models with residual branches, and this one "
            "has none it could leave out. Set it to null."
        )
    for number, (block, names) in enumerate(blocks):
        share = 1.0 if mode == "constant" else number / max(len(blocks) - 1, 1)
        for name in names:
            part = DropPath(rate * share) if rate * share else nn.Identity()
            setattr(block, name, part.train(block.training))


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    """Yield the blocks in their order, with the names of their places for stochastic depth.

    timm leaves None or an Identity there where the rate is 0.
    """
    for block in model.modules():
        held = {**vars(block), **block._modules}
        names = [
            name
            for name, part in held.items()
            if name.startswith("drop_path")
            and (part is None or isinstance(part, DropPath | nn.Identity))
        ]
        if names:
            yield block, names
