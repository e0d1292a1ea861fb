"""Reads weights files as names and tensors, without executing anything in them."""

import argparse
import io
import json
import pathlib
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tract_transfer.files import sha256_of

WEIGHTS_NAME, METADATA_NAME = "model.safetensors", "model.json"
MAX_DEPTH = 50
# Plain values that published checkpoints store beside their weights.
_HARMLESS: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]
# How files start that are often saved by mistake -> what they are and what to do.
_NOT_WEIGHTS: dict[tuple[bytes, ...], str] = {
    (b"version https://git-lfs.github.com",): "a git-lfs pointer, not the weights. Run git lfs "
    "pull in the repository it comes from.",
    (b"<!doctype html", b"<html", b"<?xml"): "a web page, not weights: the download was refused or "
    "redirected. Download the file itself.",
}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return all tensors of a file by their dotted path in it, such as `state_dict.conv1.weight`.

    Raises:
        FileNotFoundError, ValueError: no such file; it cannot be read, or holds no tensors.
    """
    tensors, _ = read_content(file)
    if not tensors:
        raise ValueError(f"{file} holds no state dict. Set model.weights to a file of weights.")
    return tensors


def read_content(file: Path) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a `.safetensors`, `.pkl` or PyTorch file, and its complete content.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has another format, is truncated, or would run code.
    """
    with file.open("rb") as stream:
        beginning = stream.read(200).lstrip().lower()
    if not beginning:
        raise ValueError(f"{file} is empty. Copy or download it again.")
    for prefixes, problem in _NOT_WEIGHTS.items():
        if beginning.startswith(prefixes):
            raise ValueError(f"{file} is {problem}")
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        elif file.suffix == ".pkl":
            content = _Unpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
        else:
            with torch.serialization.safe_globals(_HARMLESS):
                content = torch.load(file, map_location="cpu", weights_only=True)
        return _flat_tensors(content), content
    except Exception as error:  # damaged files raise anything: RuntimeError, KeyError, EOFError
        if code := _code_in(error):
            raise ValueError(
                f"{file} holds more than tensors and was not opened, because it could run code: "
                f"{code}. If you trust it, save only its state dict, as safetensors."
            ) from error
        reason = str(error) or type(error).__name__
        if reason.startswith("Weights only load failed"):  # it advises to open the file anyway
            reason = "torch.save did not write it"
        raise ValueError(
            f"{file} cannot be read as weights: {reason}. It is cut short or has another format: "
            "copy it again, or save it as .safetensors or .pth."
        ) from error


def _code_in(error: Exception) -> str | None:
    """Return what a file names besides tensors, if it was refused for that."""
    if isinstance(error, Refused):
        return str(error)
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    return name[1] if name and isinstance(error, pickle.UnpicklingError) else None


def _flat_tensors(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors and arrays in nested dicts by dotted path; skip everything else."""
    if not isinstance(content, Mapping):
        return {}
    if prefix.count(".") > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep, or contains itself")
    flat: dict[str, Tensor] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_flat_tensors(value, f"{name}."))
        elif isinstance(value, Tensor):
            flat[name] = value.detach()
        elif (array := _array(value)) is not None:
            flat[name] = torch.from_numpy(array)
    return flat


def check_hash(file: Path) -> None:
    """Raise a ValueError if a model.safetensors has another sha256 than its model.json records."""
    expected = recorded_hash(file.parent) if file.name == WEIGHTS_NAME else None
    if expected is not None and (actual := sha256_of(file)) != expected:
        raise ValueError(
            f"{file} is not what was written, by the sha256 in {METADATA_NAME} ({expected[:12]}; "
            f"the file has {actual[:12]}). It is damaged, or from another run. Copy both files "
            "again, or remove the run's results.json and run it with --resume to write them."
        )


def recorded_hash(folder: Path) -> str | None:
    """Return the sha256 of the weights from `folder`/model.json, or None if it has none."""
    try:
        metadata = json.loads((folder / METADATA_NAME).read_bytes())
    except (ValueError, FileNotFoundError):  # `read_metadata` reports these
        return None
    digest = metadata.get("sha256") if isinstance(metadata, dict) else None
    return None if digest is None else str(digest)


# Pickles of arrays and plain values. The calls in a pickle are recorded, and none is made.

_RECORDED = {
    "_codecs.encode",
    "__builtin__.bytes",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.core.numeric._frombuffer",
}
_NUMBER = re.compile(r"[fiu]\d")  # codes of numpy's types


class Refused(pickle.UnpicklingError):
    """A pickle that names anything else than _RECORDED and dicts."""


@dataclass(eq=False)
class _Call:
    """A function or class that a pickle names, or a call of it with the state it is to set."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None

    def __call__(self, *args: Any) -> "_Call":
        return _Call(self.name, args)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler: C's allocates what a file claims, before it is read."""

    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if path == "collections.OrderedDict":
            return dict
        if path not in _RECORDED:
            raise Refused(f"{module}.{name}")
        return _Call(path)

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))  # read first: `length` may be a lie

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def _array(value: Any) -> np.ndarray | None:
    """Return the numbers that a recorded call would return as an array; None for other calls."""
    match value:
        case _Call("numpy.core.multiarray._reconstruct", _, (_, shape, dtype, is_fortran, raw)):
            order = "F" if is_fortran else "C"
        case _Call("numpy.core.numeric._frombuffer", (raw, dtype, shape, order)):  # protocol 5
            pass
        case _:
            return None
    match raw:
        case _Call("__builtin__.bytes"):  # empty, before protocol 3
            raw = b""
        case str(text) | _Call("_codecs.encode", (str(text), "latin1")):  # Python 2; protocol 2
            raw = text.encode("latin1")
    match dtype:
        case _Call("numpy.dtype", (str(code), *_), (_, byte_order, *_)) if _NUMBER.fullmatch(code):
            pass
        case _:
            return None
    flat: Any = np.frombuffer(raw, np.dtype(code).newbyteorder(byte_order))
    array: np.ndarray = flat.reshape(shape, order=order).astype(code, order="C")
    return array
