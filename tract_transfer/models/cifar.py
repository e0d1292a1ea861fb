"""Backbones for 32 px: the paper's ResNet-18 and ViT (figures 3 and 4).

The other networks of its table 1 are a plug-in: configs/paper/cifar_zoo.py.
"""

from tract_transfer.models.backbone import Backbone
from tract_transfer.models.backbones import BACKBONES, timm_backbone
from tract_transfer.models.stem import replace_stem

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@BACKBONES.register("cifar/resnet18")
def cifar_resnet18(width: int = 64, max_pool: bool = True) -> Backbone:
    """The paper's ResNet-18 for 32 px: a 3x3 stem of stride 1 that keeps the max-pool (figure 3).

    `width` is the width of the first of four stages, 64 in the paper; the stem always has 64
    channels. Table 1's network has no max-pool.
    """
    channels = tuple(width * factor for factor in (1, 2, 4, 8))
    backbone = timm_backbone("resnet18", {"channels": channels, "zero_init_last": False}, False)
    replace_stem(backbone, keep_pool=max_pool)
    backbone.set_normalization(CIFAR_MEAN, CIFAR_STD)
    return backbone


@BACKBONES.register("cifar/vit")
def cifar_vit(
    depth: int = 7, width: int = 384, num_heads: int = 12, patch_size_px: int = 4
) -> Backbone:
    """The paper's ViT for 32 px: 4x4 patches, a class token, MLPs of the same width (figure 4)."""
    args = {"img_size": 32, "patch_size": patch_size_px, "depth": depth, "num_heads": num_heads}
    args |= {"embed_dim": width, "mlp_ratio": 1}
    backbone = timm_backbone("vit_small_patch16_224", args, False)
    backbone.set_normalization(CIFAR_MEAN, CIFAR_STD)
    return backbone
