"""Weights files as names and tensors: nothing in a file is ever executed."""

import argparse
import json
import pathlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tract_transfer.files import sha256_of
from tract_transfer.models.plain_pickle import Refused, load_plain_pickle

WEIGHTS_NAME, CARD_NAME = "model.safetensors", "model.json"
# Plain values that published checkpoints keep beside their weights.
_HARMLESS: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]
_MAX_DEPTH = 50


def read_content(file: Path) -> Any:
    """Return what a `.safetensors`, `.pkl` or PyTorch file holds.

    A `.pkl` may hold arrays and plain values alone, a PyTorch file tensors and plain values.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is something else, is cut short, or would run code.
    """
    if not file.is_file():
        raise FileNotFoundError(f"No weights at {file}. Set model.weights to a file or run folder.")
    _check_beginning(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if file.suffix == ".pkl":
            return load_plain_pickle(file.read_bytes())
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors and was not opened, as it could run code: "
            f"{_met(error)}. Save its state dict alone, as safetensors, where you trust it."
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(_unreadable(file, error)) from error
    except Exception as error:  # a damaged pickle fails in any way: KeyError, IndexError, ...
        raise ValueError(_unreadable(file, error)) from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return all tensors of a file by their dotted path in it, `state_dict.conv1.weight`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or holds no tensors.
    """
    content = read_content(file)
    try:
        tensors = flat_tensors(content)
    except ValueError as error:
        raise ValueError(_unreadable(file, error)) from error
    if not tensors:
        raise ValueError(
            f"{file} holds no state dict (names to tensors). Set model.weights to a file of "
            "weights."
        )
    return tensors


def flat_tensors(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors and arrays in nested dicts by dotted path; what else is there is left.

    Raises:
        ValueError: the dicts are nested more than 50 deep, as one that holds itself is.
    """
    if not isinstance(content, Mapping):
        return {}
    if prefix.count(".") > _MAX_DEPTH:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
    flat: dict[str, Tensor] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flat_tensors(value, f"{name}."))
        elif isinstance(value, Tensor):
            flat[name] = value.detach()
        elif is_array(value):
            flat[name] = torch.from_numpy(np.array(value))
    return flat


def is_array(value: Any) -> bool:
    """Whether `value` is an array of numbers."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiu"


def check_hash(file: Path) -> str | None:
    """Compare model.safetensors with the hash in the model.json beside it; other files have none.

    Returns:
        None, or why it cannot be told whether the file is whole.

    Raises:
        ValueError: the file is not the one that model.json was written for.
    """
    if file.name != WEIGHTS_NAME or not (file.parent / CARD_NAME).is_file():
        return None
    told = hash_in_card(file.parent)
    if told is None:
        return f"{CARD_NAME} has no sha256: whether {file} is what was written cannot be told"
    found = sha256_of(file)
    if found != told:
        raise ValueError(
            f"{file} is not what was written, by the sha256 in {CARD_NAME} beside it ({told[:12]} "
            f"then, {found[:12]} now): it is damaged, or another run's. Copy both files again; a "
            "run writes them anew from its checkpoint where its results.json is removed and it "
            "goes on with --resume."
        )
    return None


def hash_in_card(folder: Path) -> str | None:
    """Return the sha256 of the weights as model.json in `folder` tells it; None where it does not.

    What is wrong with a card that is not whole, others say.
    """
    try:
        card = json.loads((folder / CARD_NAME).read_bytes())
    except (ValueError, FileNotFoundError):
        return None
    told = card.get("sha256") if isinstance(card, dict) else None
    return None if told is None else str(told)


def _check_beginning(file: Path) -> None:
    """Name what is often saved in the place of weights."""
    with file.open("rb") as opened:
        begins = opened.read(200).lstrip().lower()
    if not begins:
        raise ValueError(f"{file} is empty. Copy or download it again.")
    if begins.startswith(b"version https://git-lfs.github.com"):
        raise ValueError(
            f"{file} is a git-lfs pointer, not the weights. Run git lfs pull where it was cloned."
        )
    if begins.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise ValueError(
            f"{file} is a web page, not weights: the download was refused or led elsewhere. "
            "Download the file itself."
        )


def _met(error: pickle.UnpicklingError) -> str:
    """Return what stopped the reading, without torch's advice to open the file all the same."""
    if isinstance(error, Refused):
        return str(error)
    text = str(error)
    if called := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it calls {called[1]}"
    instruction = re.search(r"Unsupported operand \d+", text)
    return f"torch.save did not write it ({instruction[0] if instruction else 'no such pickle'})"


def _unreadable(file: Path, error: Exception) -> str:
    said = str(error) or type(error).__name__
    return (
        f"{file} cannot be read as weights: {said}. It is cut short or of another format: copy "
        "it again, or save it as .safetensors or .pth."
    )
