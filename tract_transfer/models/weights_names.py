"""Weights in the names of transformers, and what a file of unknown weights looks like."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# ViT and DINOv2 of transformers -> timm; the first names are those of files, older and newer.
_VIT = [
    (r"embeddings\.cls_token$", "cls_token"),
    (r"embeddings\.distillation_token$", "dist_token"),
    (r"embeddings\.register_tokens$", "reg_token"),
    (r"embeddings\.mask_token$", "mask_token"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"(?<![\w.])layernorm\.", "norm."),
]
_RESNET = [
    (r"embedder\.embedder\.convolution\.", "conv1."),
    (r"embedder\.embedder\.normalization\.", "bn1."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
]
_STAGE = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.")
_LAYER = re.compile(r"\.layer\.(\d)\.(convolution|normalization)\.")
_MODEL = re.compile(
    r"^(.*?)(?:vit\.|deit\.|dinov2\.|resnet\.)(?=embedd|encoder|layernorm|layers?\.)"
)


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of transformers' ViT, DeiT, DINOv2 or ResNet in timm's names; others as is."""
    if any("embeddings.patch_embeddings.projection." in name for name in tensors):
        renamed = {_substituted(_bare(name), _VIT): t for name, t in tensors.items()}
        return _joined(renamed)
    if any("embedder.embedder.convolution." in name for name in tensors):
        return {_resnet_name(_bare(name)): t for name, t in tensors.items()}
    return dict(tensors)


def looks_like(tensors: Mapping[str, Tensor]) -> str:
    """Say which architecture a set of weights is of, or nothing where that is not known."""
    names = list(tensors)
    blocks = {int(n) for name in names for n in re.findall(r"(?:^|\.)blocks\.(\d+)\.", name)}
    for name, tensor in tensors.items():
        if name.endswith("patch_embed.proj.weight") and tensor.ndim == 4 and blocks:
            width, size_px = tensor.shape[0], tensor.shape[-1]
            return (
                f"It looks like a ViT of timm's names: width {width}, {max(blocks) + 1} blocks, "
                f"patches of {size_px} px. "
            )
    if any("encoder.layers.encoder_layer_0." in name for name in names):
        return "It looks like a ViT of torchvision's: model.backbone.name=torchvision/vit_... "
    stages = {(int(s), int(b)) for n in names for s, b in re.findall(r"layer([1-4])\.(\d+)\.", n)}
    if stages:
        counts = tuple(sum(stage == s for s, _ in stages) for stage in (1, 2, 3, 4))
        kind = "bottleneck" if any(".conv3.weight" in name for name in names) else "basic"
        known = _RESNETS.get((kind, counts))
        return f"It looks like {known or f'a ResNet of {counts} {kind} blocks'}. "
    return ""


_RESNETS: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "a ResNet-18",
    ("basic", (3, 4, 6, 3)): "a ResNet-34",
    ("bottleneck", (3, 4, 6, 3)): "a ResNet-50",
    ("bottleneck", (3, 4, 23, 3)): "a ResNet-101",
    ("bottleneck", (3, 8, 36, 3)): "a ResNet-152",
}


def _bare(name: str) -> str:
    return _MODEL.sub(r"\1", name)


def _substituted(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _resnet_name(name: str) -> str:
    name = _substituted(name, _RESNET)
    name = _STAGE.sub(lambda m: f"layer{int(m[1]) + 1}.{m[2]}.", name)
    return _LAYER.sub(
        lambda m: f".{'conv' if m[2] == 'convolution' else 'bn'}{int(m[1]) + 1}.", name
    )


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put query, key and value, (D, D) each, into timm's one (3D, D)."""
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.attn)\.(query|q|key|k|value|v)\.(weight|bias)", name)
        if found is None:
            joined[name] = tensor
            continue
        attn, first, kind = found.groups()
        if first in ("query", "q"):
            others = ("key", "value") if first == "query" else ("k", "v")
            parts = [tensor, *(tensors.get(f"{attn}.{part}.{kind}") for part in others)]
            if all(part is not None for part in parts):
                joined[f"{attn}.qkv.{kind}"] = torch.cat(parts)  # type: ignore[arg-type]
    return joined
