"""Stochastic depth (Huang et al. 2016) in timm's models, at a rate of one's own."""

from collections.abc import Iterator

from timm.layers import DropPath
from torch import nn


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
