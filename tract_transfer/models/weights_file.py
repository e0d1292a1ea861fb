"""Reads weights files as names and tensors, without executing anything in them."""

import argparse
import io
import json
import pathlib
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
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
    content = read_content(file)
    try:
        tensors = flat_tensors(content)
    except ValueError as error:
        raise ValueError(_unreadable(file, error)) from error
    if not tensors:
        raise ValueError(f"{file} holds no state dict. Set model.weights to a file of weights.")
    return tensors


def read_content(file: Path) -> Any:
    """Return the content of a `.safetensors`, `.pkl` or PyTorch file: tensors and plain values.

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
            return load_file(file)
        if file.suffix == ".pkl":
            return load_plain_pickle(file.read_bytes())
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors and was not opened, because it could run code: "
            f"{_reason(error)}. If you trust it, save only its state dict, as safetensors."
        ) from error
    except Exception as error:  # damaged files raise anything: RuntimeError, KeyError, EOFError
        raise ValueError(_unreadable(file, error)) from error


def flat_tensors(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors and arrays in nested dicts by dotted path; skip everything else."""
    if not isinstance(content, Mapping):
        return {}
    if prefix.count(".") > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep, or contains itself")
    flat: dict[str, Tensor] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flat_tensors(value, f"{name}."))
        elif isinstance(value, Tensor):
            flat[name] = value.detach()
        elif isinstance(value, np.ndarray | _Array):
            array = np.array(value.array if isinstance(value, _Array) else value)
            if array.dtype.kind in "fiu":
                flat[name] = torch.from_numpy(array)
    return flat


def check_hash(file: Path) -> str | None:
    """Compare model.safetensors with the sha256 in the model.json beside it, if there is one.

    Returns a warning if model.json has no hash; raises a ValueError if the hashes differ.
    """
    if file.name != WEIGHTS_NAME or not (file.parent / METADATA_NAME).is_file():
        return None
    expected = recorded_hash(file.parent)
    if expected is None:
        return f"{METADATA_NAME} has no sha256: {file} cannot be verified"
    actual = sha256_of(file)
    if actual != expected:
        raise ValueError(
            f"{file} is not what was written, by the sha256 in {METADATA_NAME} ({expected[:12]}; "
            f"the file has {actual[:12]}). It is damaged, or from another run. Copy both files "
            "again, or remove the run's results.json and run it with --resume to write them."
        )
    return None


def recorded_hash(folder: Path) -> str | None:
    """Return the sha256 of the weights from `folder`/model.json, or None if it has none."""
    try:
        metadata = json.loads((folder / METADATA_NAME).read_bytes())
    except (ValueError, FileNotFoundError):  # `read_metadata` reports these
        return None
    digest = metadata.get("sha256") if isinstance(metadata, dict) else None
    return None if digest is None else str(digest)


def _reason(error: pickle.UnpicklingError) -> str:
    """Return what was refused, without torch's advice to open the file anyway."""
    text = str(error)
    if isinstance(error, Refused):
        return text
    if name := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it calls {name[1]}"
    instruction = re.search(r"Unsupported operand \d+", text)
    return f"torch.save did not write it ({instruction[0] if instruction else 'no such pickle'})"


def _unreadable(file: Path, error: Exception) -> str:
    return (
        f"{file} cannot be read as weights: {str(error) or type(error).__name__}. It is cut short "
        "or has another format: copy it again, or save it as .safetensors or .pth."
    )


# Pickles of arrays and plain values, read without calling anything that a pickle names.

# bool, numbers and text: types that hold values, not addresses of objects.
_DTYPE_CODE = re.compile(r"[biufcSU]\d{0,9}")


class Refused(pickle.UnpicklingError):
    """A pickle that holds more than arrays and plain values."""


def load_plain_pickle(data: bytes) -> Any:
    """Return the dicts, lists, strings, numbers and arrays (`_Array`) of numbers in a pickle.

    Raises:
        Refused: it holds anything else.
        ValueError: it is damaged.
    """
    try:
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except Refused:
        raise
    except Exception as error:  # damaged: UnpicklingError, KeyError, IndexError, ...
        raise ValueError(str(error) or type(error).__name__) from error


class _Dtype:
    """Stands for numpy.dtype("f4", False, True); of its state only the byte order is used."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _DTYPE_CODE.fullmatch(code):
            raise Refused(f"an array of type {code!r}")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy's `_reconstruct`: `array` is empty until its state fills it."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if is_fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Stand for numpy's `_frombuffer` (protocol 5)."""
    if isinstance(raw, str):
        raw = raw.encode("latin1")  # written by Python 2
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
        raise Refused("an array of objects")
    # A copy, because the bytes are read-only. Sizes that do not match raise a ValueError.
    flat = np.frombuffer(raw, dtype.dtype)
    array: np.ndarray = flat.reshape(shape, order="F" if order == "F" else "C").copy()
    return array


def _scalar(dtype: Any, raw: Any) -> Any:
    return _array(raw, dtype, (), "C")[()]


def _encode(text: Any, encoding: Any) -> bytes:
    """Stand for `_codecs.encode`: how protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused(f"a text in {encoding!r}")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    """Stand for `bytes()`; called with a size, bytes would allocate it."""
    return b""


def _ndarray(*_: Any) -> None:
    """Stand for numpy.ndarray, which a pickle names as an argument and never calls."""
    raise Refused("a call of numpy.ndarray")


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array for core in ("core", "_core")},
}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler: C's allocates what a file claims, before it is read."""

    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise Refused(f"{module}.{name}")
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise Refused(f"a reference to {pid!r}, which is not in the file")

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) not in (_Dtype, _Array):
            raise Refused(f"a state for {self.stack[-1]!r:.50}")
        self.stack[-1].__setstate__(state)

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))  # read first: `length` may be a lie

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }
