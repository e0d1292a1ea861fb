"""Other first layers for a backbone: for small images, with normalised patches, or whitening."""

# B images, H height and W width in pixels, C channels, P side of a patch in pixels, L patches,
# N = C x P x P inputs a patch, O outputs

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from tract_transfer.models.backbone import Backbone

POOL_NAMES = ("maxpool", "features.pool0")
WHITENING_EPS = 5e-4  # airbench's, of the variance of inputs of standard deviation 1


def change_stem(backbone: "Backbone", stem: str) -> None:
    """Put the stem of that name into a backbone, whose `first_layers` follow.

    Raises:
        ValueError: an unknown stem, or one that does not fit the backbone.
    """
    if stem == "cifar":
        replace_stem(backbone)
    elif stem in ("patch_norm", "dual_patch_norm"):
        norm_patches(backbone, dual=stem == "dual_patch_norm")
    elif stem == "whitened":
        put_whitening_before(backbone)
    elif stem != "default":
        raise ValueError(
            "model.backbone.stem must be default, cifar, patch_norm, dual_patch_norm or whitened, "
            f"got {stem!r}."
        )


def replace_stem(backbone: "Backbone", *, keep_pool: bool = False) -> None:
    """Put a 3x3 convolution of stride 1 in place of the first one, and drop its max-pool.

    Raises:
        ValueError: the backbone does not begin with one convolution whose windows overlap.
    """
    names = backbone.first_layers
    old = _first_convolution(backbone)
    if old is None or _reads_patches(old):
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


def norm_patches(backbone: "Backbone", *, dual: bool) -> None:
    """Let a LayerNorm precede the patch embedding, and with `dual` another follow it.

    The weights of the embedding stay (Kumar et al. 2023: Dual PatchNorm).

    Raises:
        ValueError: the backbone does not begin with a convolution over patches.
    """
    old = _first_convolution(backbone)
    if old is None or not _reads_patches(old):
        raise ValueError(
            "model.backbone.stem: patch_norm and dual_patch_norm are for models that begin with a "
            f"convolution over patches that do not overlap; {backbone.first_layers} is {old}. Set "
            "model.backbone.stem: default."
        )
    (name,) = backbone.first_layers
    backbone.set_submodule(name, NormedPatches(old, dual=dual))
    backbone.first_layers = [f"{name}.linear"]


class NormedPatches(nn.Module):
    """A patch embedding of normalised patches, (B, C, H, W) -> (B, O, H / P, W / P)."""

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
        grid = [
            side // step for side, step in zip(images.shape[-2:], self.patch_size_px, strict=True)
        ]
        maps: Tensor = tokens.transpose(1, 2).unflatten(2, grid)
        return maps


def put_whitening_before(backbone: "Backbone") -> None:
    """Let a frozen 2x2 convolution and a GELU precede the first one, which takes their 24 channels.

    `whiten` sets its filters. After airbench (github.com/KellerJordan/cifar10-airbench).

    Raises:
        ValueError: the backbone does not begin with one convolution.
    """
    old = _first_convolution(backbone)
    if old is None or old.groups != 1:
        raise ValueError(
            "model.backbone.stem: whitened is for models that begin with one ungrouped "
            f"convolution; {backbone.first_layers} is {old}. Set model.backbone.stem: default."
        )
    (name,) = backbone.first_layers
    whitening = nn.Conv2d(old.in_channels, 8 * old.in_channels, 2, bias=False)
    whitening.weight.requires_grad_(False)
    settings: Any = {"bias": old.bias is not None}
    for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
        settings[key] = getattr(old, key)
    new = nn.Conv2d(whitening.out_channels, old.out_channels, **settings)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parts = {"whitening": whitening, "activation": nn.GELU(), "convolution": new}
    stem = nn.Sequential()
    for part, module in parts.items():
        stem.add_module(part, module)
    backbone.set_submodule(name, stem)
    backbone.first_layers = [f"{name}.whitening"]


def whiten(backbone: "Backbone", batches: Iterable[Tensor]) -> None:
    """Set a whitened stem's filters from images, (B, 3, H, W) uint8 or float in [0, 1].

    They turn 2x2 patches of normalised images to the directions of their second moment, each of
    mean square 1; their negatives follow, as a GELU takes half of each.
    """
    moment: Tensor | int = 0
    count = 0
    for images in batches:
        patches = F.unfold(backbone.normalize(images), 2).double()
        moment = moment + torch.einsum("bil,bjl->ij", patches, patches)
        count += patches.shape[0] * patches.shape[2]
    assert isinstance(moment, Tensor)
    variances, directions = torch.linalg.eigh(moment / count)
    filters = (directions / (variances + WHITENING_EPS).sqrt()).T
    layer = backbone.get_submodule(backbone.first_layers[0])
    assert isinstance(layer, nn.Conv2d)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([filters, -filters]).view_as(layer.weight))


def _first_convolution(backbone: "Backbone") -> nn.Conv2d | None:
    """The one convolution a backbone begins with, if it does."""
    names = backbone.first_layers
    first = backbone.get_submodule(names[0]) if len(names) == 1 else None
    return first if isinstance(first, nn.Conv2d) else None


def _reads_patches(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == layer.stride and layer.stride[0] > 1
