"""Weights files of all formats are read, and nothing in a file is executed."""

import argparse
import io
import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tract_transfer.models.weights_file import (
    Refused,
    flat_tensors,
    load_plain_pickle,
    read_content,
    read_tensors,
)

WEIGHT = torch.arange(6.0).view(2, 3)


class Calls:
    """Is pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def save(content, file):
    """Write `content` (tensors by name) in the format of the file's suffix."""
    if file.suffix == ".safetensors":
        save_file(content, file)
    elif file.suffix == ".pkl":
        file.write_bytes(pickle.dumps({name: tensor.numpy() for name, tensor in content.items()}))
    else:
        torch.save(content, file)


@pytest.mark.parametrize("name", ["w.pth", "w.pkl"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_file_is_refused_and_not_executed(tmp_path, name, how, refused):
    file, touched = tmp_path / name, tmp_path / "touched"
    content = {"conv1.weight": WEIGHT if how == "torch" else 1, "evil": Calls(open, (touched, "w"))}
    if how == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    match = f"{name} (holds more than tensors and was not opened|cannot be read)"
    with refused(f"{name} that would run code ({how})", ValueError, match=match):
        read_tensors(file)
    assert not touched.exists()
    torch.load(file, weights_only=False) if how == "torch" else pickle.loads(file.read_bytes())
    assert touched.exists()  # the test would notice


UNREADABLE = "cannot be read as weights|was not opened"
# content of a file -> what the message says
NOT_WEIGHTS = {
    b"": r"is empty\. Copy or download it again",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n": "git lfs pull",
    b"\n <!DOCTYPE html><html>Sign in</html>": "is a web page, not weights",
    b"<html><body>404</body></html>": "Download the file itself",
    b"PK\x03\x04 cut short": UNREADABLE,
    b"not weights": UNREADABLE,
}


@pytest.mark.parametrize("content", NOT_WEIGHTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
def test_files_that_are_not_weights_are_named(tmp_path, suffix, content):
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=NOT_WEIGHTS[content]) as caught:
        read_tensors(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize("percent", [20, 90])
def test_truncated_file_is_refused(tmp_path, suffix, percent, refused):
    file = tmp_path / f"w{suffix}"
    save({"a": torch.rand(100, 100)}, file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * percent // 100])
    match = rf"w\{suffix} cannot be read as weights"
    with refused(f"{suffix} weights cut to {percent} %", ValueError, match=match):
        read_tensors(file)


@pytest.mark.parametrize("content", [{"a": 1}, [WEIGHT], {"state_dict": {"a": "b"}}])
def test_file_without_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_tensors(tmp_path / "w.pth")


def test_plain_values_beside_weights_are_read(tmp_path):
    content = {
        "model": {"a": WEIGHT},
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "epoch": 3,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save(content, tmp_path / "w.pth")
    assert read_content(tmp_path / "w.pth")["args"].lr == 0.1
    tensors = read_tensors(tmp_path / "w.pth")
    assert tensors.keys() == {"model.a", "optimizer.state.0.step"}
    assert torch.equal(tensors["model.a"], WEIGHT)


# Plain pickles

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
ARRAYS = {
    "floats": np.arange(6.0, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(4, dtype=">i4"),
    "halves": np.arange(3, dtype=np.float16),
    "bools": np.array([True, False]),
    "empty": np.zeros((0, 3), dtype=np.int64),
    "a number": np.float32(0.1),
    "text": np.array(["ab", "c"]),
    "scalar array": np.array(3.5),
    "part": np.arange(10)[::2],
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_read_exactly(name, protocol):
    expected = ARRAYS[name]
    array = load_plain_pickle(pickle.dumps({"model": [expected]}, protocol))["model"][0]
    array = getattr(array, "array", array)  # a number is not in an `_Array`
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    assert np.asarray(array).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_are_read(protocol):
    plain = {"a": [1, 2.5, None, True], "b": {"c": "ü", "d": b"\x00\xff"}, "e": (1, 2)}
    content = pickle.dumps(OrderedDict(plain), protocol)
    assert load_plain_pickle(content) == plain


def calls(path):
    return {
        "os.system": Calls(os.system, (f"touch {path}",)),
        "eval": Calls(eval, (f"open({str(path)!r}, 'w')",)),
        "open": Calls(open, (str(path), "w")),
        "getattr": Calls(getattr, ("text", "upper")),
        "a numpy function": Calls(np.fromfile, (str(path),)),
        "ndarray": Calls(np.ndarray, ((2,),)),
        "an array of objects": np.array([Calls(open, (str(path), "w"))], dtype=object),
        "a record of objects": np.zeros(2, dtype=[("a", "O"), ("b", "f4")]),
    }


@pytest.mark.parametrize("name", calls(""))
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickle_calls_nothing(tmp_path, name, protocol):
    content = pickle.dumps({"w": calls(tmp_path / "touched")[name]}, protocol)
    with pytest.raises(Refused):
        load_plain_pickle(content)
    assert not (tmp_path / "touched").exists()


def code(opcodes):
    """Return a pickle of protocol 2 from opcodes."""
    return b"\x80\x02" + opcodes + b"."


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
DTYPE = b"cnumpy\ndtype\n"
HOSTILE = {
    # A type that claims to be numbers, and whose state turns its bytes into addresses of objects.
    "a type turned into objects": DTYPE + b"(X\x02\0\0\0O8I0\nI1\ntR",
    "objects by the flags of a type": RECONSTRUCT + b"(cnumpy\nndarray\n(I0\ntX\x01\0\0\0btR(I1\n"
    + b"(I1\nt" + DTYPE + b"(X\x02\0\0\0V8I0\nI1\ntRI0\nX\x08\0\0\0AAAAAAAAtb",
    "a class given another method": b"cnumpy\ndtype\n(N}X\x0c\0\0\0__setstate__cnumpy\ndtype\nstb",
    "a function given other code": b"c_codecs\nencode\n(N}X\x08\0\0\0__code__I1\nstb",
    "a dict given attributes": b"ccollections\nOrderedDict\n(tR(N}X\x05\0\0\0itemsI1\nstb",
    "a persistent reference": b"X\x01\0\0\0aQ",
    "an instance by name": b"(X\x02\0\0\0idios\nsystem\n",
    "another encoding": b"c_codecs\nencode\n(X\x01\0\0\0aX\x05\0\0\0rot13tR",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_opcodes_are_refused(name):
    content = code(HOSTILE[name])
    pickletools.dis(content, io.StringIO())  # well-formed
    with pytest.raises(Refused):
        load_plain_pickle(content)
    assert (
        load_plain_pickle(pickle.dumps(ARRAYS["floats"])).array.sum() == 15
    )  # the reader is intact


DAMAGED = {
    "nothing": b"",
    "text": b"not a pickle",
    "cut short": pickle.dumps(ARRAYS["floats"])[:-10],
    "a shape larger than its bytes": RECONSTRUCT
    + b"(cnumpy\nndarray\n(I0\ntX\x01\0\0\0btR(I1\n(I1000000000\nI1000\nt"
    + DTYPE + b"(X\x02\0\0\0f4I0\nI1\ntRI0\nX\x08\0\0\0AAAAAAAAtb.",
    "a length beyond the memory": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "a dict that contains itself": b"\x80\x02}q\x00X\x01\0\0\0ah\x00s.",
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_a_value_error_and_takes_no_memory(name):
    with pytest.raises(ValueError, match=r"\S"):
        flat_tensors(load_plain_pickle(DAMAGED[name]))


def test_large_memo_index_takes_no_memory():
    assert load_plain_pickle(b"\x80\x02Nr\xff\xff\xff\xff.") is None  # C's pickle takes 64 GiB
