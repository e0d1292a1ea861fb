"""Matches the names in a weights file with those of a model, and reports the result."""

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Why names in a file are dropped: a backbone does not need them.
OTHER, HEAD = "outside of the backbone", "the file's own head"
TRAINING_ONLY = "used only in its pre-training"
_HEADS = re.compile(
    r"(fc|heads?|head_\w+|classifier|classif|last_linear|logits|output|AuxLogits|aux\d|pooler|"
    r"proj_head|projection_head|projector|predictor|pre_logits)(\.|$)"
)
# timm recognizes DINOv2 by its mask_token, so these are dropped after timm's conversion.
_TRAINING_ONLY = re.compile(r"(mask_token$|decoder\w*(\.|$))")
# Fields of a report -> what they are called in the log.
PROBLEMS = {
    "started_anew": "initialized",
    "missing": "missing",
    "misshapen": "misshapen",
    "unexpected": "unexpected",
    "not_finite": "not finite",
}
# Of several copies of all weights, the one that their authors evaluate; then the shorter prefix.
_PREFERRED = ("ema", "teacher", "encoder_q", "base_encoder")
# (has bottleneck blocks, blocks per stage) -> depth of a ResNet
RESNET_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


@dataclass
class MatchReport:
    """How the names in a weights file match those of a model; names are the model's own.

    Attributes:
        prefix: of the weights in the file, such as `module.encoder_q.`.
        num_parameters, num_loaded: of the model, and how many of them the file provides.
        resized: name -> shapes before and after.
        dropped: reason -> names in the file.
        started_anew: missing or misshapen names that `ignore_missing` allows; not loaded.
        missing, misshapen, unexpected, not_finite: why the file is refused.
    """

    file: str
    prefix: str
    num_parameters: int = 0
    num_loaded: int = 0
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    started_anew: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the file may be loaded."""
        problems = self.missing or self.misshapen or self.unexpected or self.not_finite
        return bool(self.loaded) and not problems

    def summary(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        return {
            "fits": self.fits,
            "file": self.file,
            "prefix": self.prefix,
            "parameters": self.num_parameters,
            "parameters_loaded": self.num_loaded,
            "names_loaded": len(self.loaded),
            "resized": self.resized,
            "dropped": {reason: len(names) for reason, names in self.dropped.items()},
            **{key: getattr(self, key) for key in PROBLEMS},
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        share = self.num_loaded / max(1, self.num_parameters)
        lines = [
            f"weights      {self.file}" + (f", below {self.prefix!r}" if self.prefix else ""),
            f"loaded       {len(self.loaded)} names, {self.num_loaded:,} of "
            f"{self.num_parameters:,} parameters ({share:.2%})",
        ]
        lines += [f"resized      {name}: {shapes}" for name, shapes in self.resized.items()]
        for reason, names in self.dropped.items():
            lines.append(f"dropped      {few(names)} ({reason}, {len(names)} names)")
        for key, title in PROBLEMS.items():
            if names := getattr(self, key):
                lines.append(f"{title:<12} {few(names)} ({len(names)} names)")
        return [*lines, *(f"note         {note}" for note in self.notes)]


def few(names: Sequence[str]) -> str:
    """Return the first names and the number of the others."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) + more) or "none"


def check_patterns(patterns: Sequence[str], names: Iterable[str]) -> None:
    """Raise a ValueError for a pattern that matches no name of the model: probably a typo."""
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"model.ignore_missing: {pattern!r} is none of the backbone's names, such as "
                f"{few(names)}. Use patterns such as conv1.* or *.bias."
            )


def find_prefix(model_names: Iterable[str], file_names: Iterable[str]) -> str:
    """Return the prefix below which most of the model's names are in a file; see _PREFERRED."""
    names = set(model_names)
    votes: Counter[str] = Counter()
    for name in file_names:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in names:
                votes[".".join([*parts[:start], ""])] += 1

    def rank(prefix: str) -> tuple[int, bool, int]:
        return votes[prefix], any(word in prefix for word in _PREFERRED), -len(prefix)

    return max(votes, key=rank, default="")


def drop_others(
    report: MatchReport, tensors: Mapping[str, Tensor], model_names: Iterable[str]
) -> dict[str, Tensor]:
    """Return the tensors below `report.prefix` without it and without heads; report the others."""
    names = set(model_names)
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(report.prefix)
        if not name.startswith(report.prefix):
            report.dropped.setdefault(OTHER, []).append(name)
        elif inner not in names and _HEADS.match(inner):
            report.dropped.setdefault(HEAD, []).append(name)
        else:
            weights[inner] = tensor
    return weights


def num_misfits(weights: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> int:
    """Return how many names are missing, unexpected or of another shape."""
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    misfits = sum(shapes.get(name) != weight.shape for name, weight in model_state.items())
    return misfits + len(shapes.keys() - model_state.keys())


def fill(
    report: MatchReport,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    ignore_missing: Sequence[str],
) -> dict[str, Tensor]:
    """Compare names, shapes and values into `report`; return the tensors to load."""
    model_state = model.state_dict()
    fitting: dict[str, Tensor] = {}
    for name, weight in model_state.items():
        tensor = weights.get(name)
        same = tensor is not None and tensor.shape == weight.shape
        if tensor is not None and same and tensor.is_floating_point() == weight.is_floating_point():
            fitting[name] = tensor
        elif tensor is None and name.endswith("num_batches_tracked"):  # older files lack it
            continue
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore_missing):
            report.started_anew.append(name)
        elif tensor is None:
            report.missing.append(name)
        else:
            theirs, ours = (t.dtype if same else tuple(t.shape) for t in (tensor, weight))
            report.misshapen.append(f"{name} {theirs} for {ours}")
    others = [name for name in weights if name not in model_state]
    if unused := [name for name in others if _TRAINING_ONLY.match(name)]:
        report.dropped[TRAINING_ONLY] = unused
    report.unexpected += [name for name in others if name not in unused]
    report.not_finite += [name for name, tensor in fitting.items() if not tensor.isfinite().all()]
    report.loaded += list(fitting)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    report.num_parameters = sum(sizes.values())
    report.num_loaded = sum(size for name, size in sizes.items() if name in fitting)
    return fitting


def looks_like(names_to_tensors: Mapping[str, Tensor]) -> str:
    """Return a sentence that names the architecture of some weights, or an empty string."""
    names = "\n".join(names_to_tensors)
    patches = [t for n, t in names_to_tensors.items() if n.endswith("patch_embed.proj.weight")]
    blocks = len(set(re.findall(r"\bblocks\.(\d+)\.", names)))
    counts = blocks_per_stage(names_to_tensors, r"layer([1-4])\.(\d+)\.", first=1)
    kind = ""
    if patches and blocks:
        width, *_, size_px = patches[0].shape
        kind = f"timm's ViT of width {width} with {blocks} blocks and patches of {size_px} px"
    elif "encoder.layers.encoder_layer_0." in names:
        kind = "a ViT of torchvision's: model.backbone.name=torchvision/vit_..."
    elif any(counts):
        depth = RESNET_DEPTHS.get((".conv3.weight" in names, counts))
        kind = f"a ResNet-{depth}" if depth else f"a ResNet of {counts} blocks"
    return f"It looks like {kind}. " if kind else ""


def blocks_per_stage(names: Iterable[str], pattern: str, first: int) -> tuple[int, ...]:
    """Return the number of blocks in the four stages from `first`; `pattern` is (stage, block)."""
    blocks = {block for name in names for block in re.findall(pattern, name)}
    counts = Counter(int(stage) for stage, _ in blocks)
    return tuple(counts[stage] for stage in range(first, first + 4))


# Names of transformers: ViT, DeiT and DINOv2, then ResNet -> timm. Files have older and newer ones.

_QKV = {"q": "query", "k": "key", "v": "value"}
_VIT: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"embeddings\.distillation_token$", "dist_token"),
    (r"embeddings\.register_tokens$", "reg_token"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", lambda m: f".attn.{_QKV[m[1]]}."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"(?<![\w.])layernorm\.", "norm."),
]
_RESNET: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"embedder\.embedder\.convolution\.", "conv1."),
    (r"embedder\.embedder\.normalization\.", "bn1."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}."),
    (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
]
_MODEL = r"^(.*?)(?:vit\.|deit\.|dinov2\.|resnet\.)(?=embedd|encoder|layernorm|layers?\.)"


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of transformers' ViT, DeiT, DINOv2 or ResNet to timm's names."""
    if any("embeddings.patch_embeddings.projection." in name for name in tensors):
        return _join_qkv({_rename(name, _VIT): tensor for name, tensor in tensors.items()})
    if any("embedder.embedder.convolution." in name for name in tensors):
        return {_rename(name, _RESNET): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _rename(name: str, rules: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]) -> str:
    for pattern, replacement in [(_MODEL, r"\1"), *rules]:
        name = re.sub(pattern, replacement, name)
    return name


def _join_qkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join query, key and value, (D, D) each, to timm's qkv (3D, D)."""
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.attn)\.(query|key|value)\.(weight|bias)", name)
        if match is None:
            joined[name] = tensor
        elif match[2] == "query":
            names = [f"{match[1]}.{part}.{match[3]}" for part in ("query", "key", "value")]
            if all(part in tensors for part in names):
                joined[f"{match[1]}.qkv.{match[3]}"] = torch.cat([tensors[part] for part in names])
    return joined
