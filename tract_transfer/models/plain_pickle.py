"""Pickles of arrays and plain values, read without calling anything that a pickle names.

detectron2's model zoo has such files. Pickle builds an object by calling what the file names, and
even NumPy's own builders believe what a file says of a type's memory. So here a name stands for a
class of ours, which takes what is written, checks it and makes the array.
"""

import io
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

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
