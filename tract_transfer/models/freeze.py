"""What changes about a backbone before training: frozen stages, BatchNorms, stochastic depth."""

from itertools import pairwise
from typing import Any, Literal

import timm
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tract_transfer.models.backbone import Backbone


def freeze_stages(backbone: Backbone, count: int) -> None:
    """Freeze the first `count` stages: their weights and the statistics of their BatchNorms.

    They are counted as detectron2 counts those of a ResNet: 1 is the stem, 2 also the first stage,
    5 everything. A VGG's are conv1_x to conv5_x; a plain ViT's its patch embedding and quarters of
    its blocks. More stages than the backbone has are a ValueError.
    """
    stages = stage_names(backbone) if count else []
    if not 0 <= count <= len(stages):
        raise ValueError(f"model.freeze_at {count} must be at most {len(stages)} here.")
    for name in (name for stage in stages[:count] for name in stage):
        module = backbone.model.get_submodule(name)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_eval_hook)


def stage_names(backbone: Backbone) -> list[list[str]]:
    """Return the names of the modules of each stage (inside `backbone.model`), in order.

    The stem is everything before the first feature map. A stage ends with the deepest feature map
    of a stride, or, if all have the same stride, with each quarter of them.
    """
    model = backbone.model
    names = [name for name, _ in model.named_modules()]
    maps = [name.partition("@")[0] for name in backbone.map_info]
    if not maps:
        raise ValueError("model.freeze_at counts feature maps, and this backbone has none. Set 0.")
    if unknown := [name for name in maps if name not in names]:
        raise ValueError(f"model.freeze_at cannot find the stages of this backbone: {unknown}.")
    ends = [name.partition("@")[0] for name in backbone.pyramid()]
    if len(ends) == 1:
        ends = [maps[len(maps) * quarter // 4 - 1] for quarter in (1, 2, 3, 4) if len(maps) >= 4]
    cuts = [0, names.index(maps[0])]
    for end in ends:
        inside = [i for i, n in enumerate(names) if n == end or n.startswith(f"{end}.")]
        cuts.append(max(inside) + 1)
    stages = [names[start:stop] for start, stop in pairwise(cuts)]
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    return [stage for stage in stages if owners & set(stage)]


def set_norm(backbone: Backbone, norm: Literal["trained", "frozen", "synced"]) -> Backbone:
    """Make the BatchNorms of a backbone `trained`, `frozen` or `synced`; return the backbone.

    `frozen` fixes statistics and weights; `synced` computes statistics over all processes. State
    dict names stay the same.
    """
    if norm == "trained":
        return backbone
    batch_norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    if not batch_norms:
        raise ValueError(f"model.norm: {norm} needs BatchNorms, and this backbone has none.")
    if norm == "synced":
        backbone.model = timm.layers.convert_sync_batchnorm(backbone.model)
        return backbone
    for module in batch_norms:
        module.requires_grad_(False)
        module.register_forward_pre_hook(_eval_hook)
    return backbone


def _eval_hook(module: nn.Module, _inputs: Any) -> None:
    """A forward hook: keep a BatchNorm in eval mode, even if the model is set to training."""
    module.eval()


def set_drop_path(model: nn.Module, rate: float, mode: Literal["constant", "linear"]) -> None:
    """Set stochastic depth (Huang et al. 2016) in a timm model: drop residual branches per sample.

    Args:
        rate: probability of dropping a branch in training, in [0, 1).
        mode: `constant`: `rate` for every block (DeiT III). `linear`: from 0 for the first block
            to `rate` for the last, as in timm.
    """
    kinds = DropPath | nn.Identity | None  # without a DropPath where the rate is 0
    blocks = []
    for block in model.modules():
        attributes = {**vars(block), **block._modules}.items()
        names = [n for n, v in attributes if n.startswith("drop_path") and isinstance(v, kinds)]
        if names:
            blocks.append((block, names))
    if not blocks:
        raise ValueError(
            "model.backbone.drop_path is for timm's models with residual branches. Set it to null."
        )
    for number, (block, names) in enumerate(blocks):
        share = 1.0 if mode == "constant" else number / max(len(blocks) - 1, 1)
        for name in names:
            layer = DropPath(rate * share) if rate * share else nn.Identity()
            setattr(block, name, layer.train(block.training))
