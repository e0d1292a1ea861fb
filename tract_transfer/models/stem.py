"""The stem of an ImageNet model, made fit for small images."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from tract_transfer.models.backbones import Backbone

POOL_NAMES = ("maxpool", "features.pool0")


def replace_stem(backbone: "Backbone", *, keep_pool: bool = False) -> None:
    """Put a 3x3 convolution of stride 1 in place of the first one, and drop its max-pool.

    Raises:
        ValueError: the backbone does not begin with one convolution whose windows overlap.
    """
    names = backbone.first_layers
    old = backbone.get_submodule(names[0]) if len(names) == 1 else None
    is_patch = isinstance(old, nn.Conv2d) and old.kernel_size == old.stride and old.stride[0] > 1
    if not isinstance(old, nn.Conv2d) or is_patch:
        raise ValueError(
            "model.backbone.stem: cifar replaces the convolution a model begins with, and this "
            f"one begins with {names}: {old}. Set its patch size instead, such as "
            "model.backbone.args.patch_size=4."
        )
    new = nn.Conv2d(
        old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=old.bias is not None
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    backbone.set_submodule(names[0], new)
    if keep_pool:
        return
    for pool in POOL_NAMES:
        if pool in dict(backbone.model.named_modules()):
            backbone.model.set_submodule(pool, nn.Identity())
