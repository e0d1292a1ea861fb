"""Weights files as names and tensors: nothing in a file is ever executed."""

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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tract_transfer.files import sha256_of

# --- Pickles of arrays and plain values, read without calling anything that a pickle names.

# bool, numbers and text: types that hold their values and not addresses of them.
_CODE = re.compile(r"[biufcSU]\d{0,9}")
MAX_DEPTH = 50


class Refused(pickle.UnpicklingError):
    """A pickle that holds more than arrays and plain values."""


def load_plain_pickle(data: bytes) -> Any:
    """Return what a pickle of dicts, lists, strings, numbers and arrays of numbers holds.

    Raises:
        Refused: it holds anything else.
        ValueError: it is damaged, or nested more than 50 deep.
    """
    try:
        # Python's own, whose memory follows what the file holds and not what it says.
        found = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except Refused:
        raise
    except Exception as error:  # of damage: UnpicklingError, KeyError, IndexError, ...
        raise ValueError(str(error) or type(error).__name__) from error
    return _arrays(found, 0)


class _Dtype:
    """numpy.dtype("f4", False, True), and its state, of which the byte order is read."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise Refused(f"an array of type {code!r}")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """numpy's `_reconstruct`: an empty array, which its state then fills."""

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, of, is_fortran, raw = state
        self.array = _filled(raw, of, shape, "F" if is_fortran else "C")


class _Ndarray:
    """numpy.ndarray, which is only named."""

    def __init__(self, *_: Any) -> None:
        raise Refused("a call of numpy.ndarray")


def _from_buffer(raw: Any, of: Any, shape: Any, order: Any) -> np.ndarray:
    """numpy's `_frombuffer`, of pickles by protocol 5."""
    return _filled(raw, of, shape, order)


def _scalar(of: Any, raw: Any) -> Any:
    """numpy's `scalar`."""
    return _filled(raw, of, (), "C")[()]


def _encoded(text: Any, encoding: Any) -> bytes:
    """`_codecs.encode`: how protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused(f"a text in {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How protocol 2 writes no bytes."""
    return b""


def _filled(raw: Any, of: Any, shape: Any, order: Any) -> np.ndarray:
    if isinstance(raw, str):
        raw = raw.encode("latin1")  # written by Python 2
    if not isinstance(of, _Dtype) or not isinstance(raw, bytes | bytearray):
        raise Refused("an array of objects")
    # A copy: the bytes cannot be written to. Sizes that do not fit are a ValueError.
    flat = np.frombuffer(raw, of.dtype)
    filled: np.ndarray = flat.reshape(shape, order="F" if order == "F" else "C").copy()
    return filled


_BUILDERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encoded,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
}
for _core in ("core", "_core"):
    _BUILDERS[f"numpy.{_core}.multiarray", "_reconstruct"] = _Array
    _BUILDERS[f"numpy.{_core}.multiarray", "scalar"] = _scalar
    _BUILDERS[f"numpy.{_core}.numeric", "_frombuffer"] = _from_buffer


class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def find_class(self, module: str, name: str) -> Any:
        builder = _BUILDERS.get((module, name))
        if builder is None:
            raise Refused(f"{module}.{name}")
        return builder

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) not in (_Dtype, _Array):
            raise Refused(f"a state for {self.stack[-1]!r:.50}")
        self.stack[-1].__setstate__(state)

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))  # not as long as the file says

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }

    def persistent_load(self, pid: Any) -> Any:
        raise Refused(f"a reference to {pid!r}, which is not in the file")


def _arrays(value: Any, depth: int) -> Any:
    """Return a tree with the arrays that its `_Array`s hold."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, Mapping):
        return {key: _arrays(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_arrays(each, depth + 1) for each in value]
    return value


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
