"""Replacements for the first layer of a backbone: small images, normalized patches, whitening."""

# B images, H height and W width in pixels, C channels, P side of a patch in pixels, L patches,
# N = C x P x P inputs of a patch, O outputs

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tract_transfer.models.backbone import Backbone

POOL_NAMES = ("maxpool", "features.pool0")
_PATCHES = "a convolution over patches that do not overlap"
# Replacement -> what a model must start with.
_NEEDS = {
    "cifar": "one convolution whose windows overlap (set the patch size of a ViT in its args)",
    "patch_norm": _PATCHES,
    "dual_patch_norm": _PATCHES,
    "whitened": "one ungrouped convolution",
}
WHITENING_EPS = 5e-4  # airbench's, for the variance of inputs with standard deviation 1


def change_stem(backbone: Backbone, stem: str) -> None:
    """Replace the stem of a backbone, and update its `first_layers`.

    `cifar` is a 3x3 convolution of stride 1 without the max-pool. `patch_norm` and
    `dual_patch_norm` add LayerNorms around a patch embedding. `whitened` puts a frozen 2x2
    convolution, whose filters `whiten` sets, before the first convolution. A stem that does not fit
    the backbone is a ValueError.
    """
    if stem == "default":
        return
    if stem not in _NEEDS:
        names = ", ".join(["default", *_NEEDS])
        raise ValueError(f"model.backbone.stem must be one of {names}, got {stem!r}.")
    old = _first_convolution(backbone)
    has_patches = old is not None and old.kernel_size == old.stride and old.stride[0] > 1
    fits = {"cifar": not has_patches, "whitened": old is not None and old.groups == 1}
    if old is None or not fits.get(stem, has_patches):
        raise ValueError(
            f"model.backbone.stem: {stem} needs a model that starts with {_NEEDS[stem]}; "
            f"{backbone.first_layers} is {old}. Set model.backbone.stem: default."
        )
    (name,) = backbone.first_layers
    if stem == "cifar":
        replace_stem(backbone)
    elif stem == "whitened":
        backbone.set_submodule(name, _whitened(old))
        backbone.first_layers = [f"{name}.whitening"]
    else:
        backbone.set_submodule(name, NormedPatches(old, dual=stem == "dual_patch_norm"))
        backbone.first_layers = [f"{name}.linear"]


def replace_stem(backbone: Backbone, *, keep_pool: bool = False) -> None:
    """Replace the first convolution by a 3x3 one of stride 1, and remove its max-pool."""
    old = _first_convolution(backbone)
    assert old is not None
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    backbone.set_submodule(backbone.first_layers[0], new)
    for name, _ in list(backbone.model.named_modules()):
        if name in POOL_NAMES and not keep_pool:
            backbone.model.set_submodule(name, nn.Identity())


class NormedPatches(nn.Module):
    """A patch embedding of normalized patches, (B, C, H, W) -> (B, O, H / P, W / P).

    `dual` adds a second LayerNorm behind it (Dual PatchNorm, Kumar et al. 2023).
    """

    def __init__(self, embedding: nn.Conv2d, *, dual: bool) -> None:
        super().__init__()
        weight = embedding.weight.detach().flatten(1)
        self.patch_size_px = embedding.kernel_size
        self.before = nn.LayerNorm(weight.shape[1])
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], embedding.bias is not None)
        self.after = nn.LayerNorm(weight.shape[0]) if dual else nn.Identity()
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            if embedding.bias is not None:
                self.linear.bias.copy_(embedding.bias)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, self.patch_size_px, stride=self.patch_size_px)  # (B, N, L)
        tokens: Tensor = self.after(self.linear(self.before(patches.transpose(1, 2))))
        features: Tensor = tokens.transpose(1, 2).unflatten(
            2, (-1, images.shape[-1] // self.patch_size_px[1])
        )
        return features


def _whitened(old: Any) -> nn.Module:
    """Return a frozen 2x2 convolution of 24 channels, a GELU, and the convolution `old` on these.

    After airbench (github.com/KellerJordan/cifar10-airbench).
    """
    whitening = nn.Conv2d(old.in_channels, 8 * old.in_channels, 2, bias=False)
    whitening.weight.requires_grad_(False)
    shape = whitening.out_channels, old.out_channels, old.kernel_size, old.stride, old.padding
    new = nn.Conv2d(*shape, old.dilation, bias=old.bias is not None, padding_mode=old.padding_mode)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(whitening=whitening, activation=nn.GELU(), convolution=new))


def whiten(backbone: Backbone, batches: Iterable[Tensor]) -> None:
    """Set the filters of a whitened stem from images, (B, 3, H, W) uint8 or float in [0, 1].

    The filters rotate 2x2 patches of normalized images to their principal directions and scale
    each to mean square 1. Their negatives follow, because a GELU keeps only half of each.
    """
    layer = _first_convolution(backbone)
    assert layer is not None
    moment, count = layer.weight.new_zeros((), dtype=torch.double), 0
    for images in batches:
        patches = F.unfold(backbone.normalize(images), 2).double()
        moment = moment + torch.einsum("bil,bjl->ij", patches, patches)
        count += patches.shape[0] * patches.shape[2]
    variances, directions = torch.linalg.eigh(moment / count)
    filters = (directions / (variances + WHITENING_EPS).sqrt()).T
    with torch.no_grad():
        layer.weight.copy_(torch.cat([filters, -filters]).view_as(layer.weight))


def _first_convolution(backbone: Backbone) -> nn.Conv2d | None:
    """Return the convolution that a backbone starts with, if it starts with exactly one."""
    names = backbone.first_layers
    first = backbone.get_submodule(names[0]) if len(names) == 1 else None
    return first if isinstance(first, nn.Conv2d) else None
