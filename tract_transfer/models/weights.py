"""Backbones on disk: `model.safetensors`, and beside it `model.json`, which says what they are."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tract_transfer.models.backbones import Backbone, build_backbone

WEIGHTS_NAME, CARD_NAME = "model.safetensors", "model.json"


def save_backbone(folder: Path, backbone: Backbone, card: Mapping[str, Any]) -> None:
    """Write the weights and their card; `card` tells method, seed, data and the like.

    Both files are written aside, synced and renamed. The card's `sha256` is the weights' own.
    """
    tensors = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    aside = folder / f".{WEIGHTS_NAME}"
    save_file(tensors, aside)
    complete = {
        **card,
        **backbone.origin,
        "first_layers": backbone.first_layers,
        "feature_dim": backbone.feature_dim,
        "maps": {name: info._asdict() for name, info in backbone.map_info.items()},
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
        "sha256": hashlib.sha256(aside.read_bytes()).hexdigest(),
    }
    (folder / f".{CARD_NAME}").write_text(json.dumps(complete, indent=2) + "\n")
    for name in (WEIGHTS_NAME, CARD_NAME):
        with (folder / f".{name}").open("rb") as file:
            os.fsync(file.fileno())
        (folder / f".{name}").replace(folder / name)


def has_card(path: Path) -> bool:
    """Whether a card lies in the run folder, or beside the weights file, `path`."""
    return ((path if path.is_dir() else path.parent) / CARD_NAME).is_file()


def read_card(path: Path) -> dict[str, Any]:
    """Return the card of the backbone in the run folder, or beside the weights file, `path`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the card is not JSON, or describes no backbone.
    """
    file = (path if path.is_dir() else path.parent) / CARD_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"No {CARD_NAME} at {file.parent}, so nothing says what backbone {path} is. Set "
            "model.backbone.name, or model.weights to a finished run folder."
        )
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Copy it from the run again.") from error
    if not isinstance(card, dict) or not {"name", "stem", "args"} <= card.keys():
        raise ValueError(f"{file} lacks the name, stem and args of a backbone. Copy it again.")
    return card


def build_from_card(card: Mapping[str, Any]) -> Backbone:
    """Build the backbone a card describes, without its weights."""
    return build_backbone(card["name"], stem=card["stem"], args=card["args"])


def load_weights(
    model: nn.Module, path: Path, *, allow_missing: Sequence[str] = (), prefix: str = ""
) -> None:
    """Load a safetensors or PyTorch file, or a run folder's, into `model`, strictly.

    Args:
        path: a `.safetensors` file, a `.pth`, `.pt` or `.bin` file (read weights-only: nothing in
            it is executed), or a folder that holds model.safetensors.
        allow_missing: beginnings of names the file may lack, such as `head.`.
        prefix: put before the names that are not the model's as they stand.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or its names or shapes are not the model's.
    """
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"No weights at {file}. Set model.weights to a file or run folder.")
    wanted = model.state_dict()
    found = {
        name if name in wanted else prefix + name: tensor
        for name, tensor in read_tensors(file).items()
    }
    missing = [n for n in wanted if n not in found and not n.startswith(tuple(allow_missing))]
    unexpected = [name for name in found if name not in wanted]
    misshapen = [
        f"{name} {tuple(found[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"{file} does not fit {type(model).__name__}: its weights are another architecture's. "
            f"Missing {_few(missing)}; unexpected {_few(unexpected)}; of another shape "
            f"{_few(misshapen)}. Set model.backbone to the one the weights were trained with."
        )
    model.load_state_dict(found, strict=False)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the state dict of a safetensors or PyTorch file; nothing in it is executed.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"{file} cannot be read as weights: {error}") from error
    except Exception as error:  # weights_only raises pickle.UnpicklingError and its kin
        raise ValueError(f"{file} holds more than tensors and was not opened: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise ValueError(f"{file} holds no state dict (names to tensors).")
    return content


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) + more) or "none"
