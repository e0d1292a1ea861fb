"""Which tensor of a file is which weight of a model, and a report of all that was found."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

# What a backbone has no place for, by reason: a published file's own classifier, and what only
# its pre-training needs.
HEADS = (
    "the file's own head",
    re.compile(
        r"(fc|heads?|head_\w+|classifier|classif|last_linear|logits|output|AuxLogits|aux\d|pooler|"
        r"proj_head|projection_head|projector|predictor|pre_logits)(\.|$)"
    ),
)
TRAINING_ONLY = "of its pre-training alone", re.compile(r"(mask_token$|decoder\w*(\.|$))")
OTHER = "outside of the backbone"
WRONG = ("started_anew", "missing", "misshapen", "unexpected", "not_finite")  # fields of a report
# Of two copies of all weights, the one that their authors evaluate.
_PREFERRED = ("ema", "teacher", "encoder_q", "base_encoder")


@dataclass
class MatchReport:
    """What became of the names of a weights file and of a model; names are the model's own.

    Attributes:
        file: the file, and `prefix`: where in it the weights stand, such as `module.encoder_q.`.
        num_parameters: of the model, and `num_loaded` of them from the file.
        resized: name -> shapes, before and after.
        dropped: reason -> names in the file.
        started_anew: missing or misshapen names that `ignore_missing` allows.
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
        wrong = self.missing or self.misshapen or self.unexpected or self.not_finite
        return bool(self.loaded) and not wrong

    def summary(self) -> dict[str, Any]:
        """Return it as plain values for results.json."""
        return {
            "fits": self.fits,
            "file": self.file,
            "prefix": self.prefix,
            "parameters": self.num_parameters,
            "parameters_loaded": self.num_loaded,
            "names_loaded": len(self.loaded),
            "resized": self.resized,
            "dropped": {reason: len(names) for reason, names in self.dropped.items()},
            **{what: getattr(self, what) for what in WRONG},
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """Return it as lines of text."""
        share = self.num_loaded / max(1, self.num_parameters)
        lines = [
            f"weights      {self.file}" + (f", below {self.prefix!r}" if self.prefix else ""),
            f"loaded       {len(self.loaded)} names, {self.num_loaded:,} of "
            f"{self.num_parameters:,} parameters ({share:.2%})",
        ]
        lines += [f"resized      {name}: {shapes}" for name, shapes in self.resized.items()]
        lines += [
            f"dropped      {few(names)} ({reason}, {len(names)} names)"
            for reason, names in self.dropped.items()
        ]
        for what in WRONG:
            if names := getattr(self, what):
                lines.append(f"{what.replace('_', ' '):<12} {few(names)} ({len(names)} names)")
        return [*lines, *(f"note         {note}" for note in self.notes)]


def few(names: Sequence[str]) -> str:
    """Return the first names and the number of the others."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) + more) or "none"


def find_prefix(wanted: Iterable[str], names: Iterable[str]) -> str:
    """Return what stands before most of the `wanted` names in a file: wrappers of any kind.

    Of copies of the same weights an average (`ema`, `teacher`, MoCo's query encoder) is taken.
    """
    known = set(wanted)
    votes: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in known:
                votes[".".join([*parts[:start], ""])] += 1
    if not votes:
        return ""

    def rank(prefix: str) -> tuple[int, bool, int]:
        preferred = any(word in prefix for word in _PREFERRED)
        return votes[prefix], preferred, -len(prefix)

    return max(votes, key=rank)


def split_tree(
    tensors: Mapping[str, Tensor],
    prefix: str,
    wanted: Mapping[str, Tensor],
    superfluous: tuple[str, re.Pattern[str]],
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Return the tensors below `prefix` by their inner names, and what was dropped and why."""
    reason, pattern = superfluous
    tree: dict[str, Tensor] = {}
    dropped: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix):
            dropped.setdefault(OTHER, []).append(name)
        elif inner not in wanted and pattern.match(inner):
            dropped.setdefault(reason, []).append(name)
        else:
            tree[inner] = tensor
    return tree, dropped


def fill(
    report: MatchReport,
    wanted: Mapping[str, Tensor],
    parameters: set[str],
    found: Mapping[str, Tensor],
    ignore_missing: Sequence[str],
) -> dict[str, Tensor]:
    """Compare names and shapes into `report`; return the tensors to load."""
    fitting: dict[str, Tensor] = {}
    for name, own in wanted.items():
        tensor, ignored = found.get(name), any(fnmatchcase(name, p) for p in ignore_missing)
        if name.endswith("num_batches_tracked") and tensor is None:  # older files have none
            continue
        problem = "" if tensor is None else _difference(own, tensor)
        if tensor is not None and not problem:
            fitting[name] = tensor
        elif ignored:
            report.started_anew.append(name)
        elif tensor is None:
            report.missing.append(name)
        else:
            report.misshapen.append(f"{name} {problem}")
    report.unexpected += [name for name in found if name not in wanted]
    report.not_finite += [name for name, tensor in fitting.items() if not _is_finite(tensor)]
    report.loaded += list(fitting)
    report.num_parameters = sum(wanted[name].numel() for name in parameters)
    report.num_loaded = sum(fitting[name].numel() for name in fitting if name in parameters)
    return fitting


def check_patterns(patterns: Sequence[str], names: Iterable[str]) -> None:
    """Refuse a pattern that no name of the model has, which would be a slip of the pen."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"model.ignore_missing: {pattern!r} is none of the backbone's names, which are "
                f"such as {few(names)}. Patterns are as of file names: conv1.*, *.bias."
            )


def resize_by(
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    tree: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return what a library's own conversion makes of `tree`, where it fits better; else None."""
    try:
        adapted = adapt(dict(tree))
    except (KeyError, IndexError, RuntimeError, ValueError, AssertionError, AttributeError):
        return None  # files of another architecture
    if _num_wrong(adapted, wanted) >= _num_wrong(tree, wanted):
        return None
    resized = {
        name: f"{tuple(tree[name].shape)} -> {tuple(tensor.shape)}"
        for name, tensor in adapted.items()
        if name in tree and tree[name].shape != tensor.shape
    }
    return adapted, resized


def _num_wrong(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> int:
    wrong = sum(name not in found or found[name].shape != own.shape for name, own in wanted.items())
    return wrong + sum(name not in wanted for name in found)


def _difference(own: Tensor, tensor: Tensor) -> str:
    if own.shape != tensor.shape:
        return f"{tuple(tensor.shape)} for {tuple(own.shape)}"
    if own.is_floating_point() != tensor.is_floating_point():
        return f"{tensor.dtype} for {own.dtype}"
    return ""


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


# --- Weights in the names of transformers, and what a file of unknown weights looks like.

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
