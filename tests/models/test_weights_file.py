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

from tract_transfer.models.weights_file import read_content, read_tensors

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


UNREADABLE = "cannot be read as weights"
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
    tensors, content = read_content(tmp_path / "w.pth")
    assert content["args"].lr == 0.1
    assert tensors.keys() == {"model.a", "optimizer.state.0.step"}
    assert torch.equal(tensors["model.a"], WEIGHT)


# Plain pickles

ARRAYS = {
    "floats": np.arange(6.0, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(4, dtype=">i4"),
    "halves": np.arange(3, dtype=np.float16),
    "empty": np.zeros((0, 3), dtype=np.int64),
    "scalar array": np.array(3.5),
    "part": np.arange(10)[::2],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_in_a_pickle_are_read_exactly_and_other_values_skipped(tmp_path, protocol):
    text, number = np.array(["ab"]), np.float32(0.1)
    skipped = {"lr": [1, 2.5, None, True, number], "names": ("ü", b"\x00\xff"), "text": text}
    content = {"model": OrderedDict(ARRAYS), "bools": np.array([True]), **skipped}
    file = tmp_path / "w.pkl"
    file.write_bytes(pickle.dumps(content, protocol))
    tensors = read_tensors(file)
    assert tensors.keys() == {f"model.{name}" for name in ARRAYS}
    for name, array in ARRAYS.items():
        expected = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        assert tensors[f"model.{name}"].dtype == expected.dtype
        assert torch.equal(tensors[f"model.{name}"], expected)


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
    refuses(content, tmp_path)
    assert not (tmp_path / "touched").exists()


def refuses(content, folder):
    """No tensor is read from the content, and the next file is read as ever."""
    (folder / "w.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pkl (holds no state dict|holds more|cannot be read)"):
        read_tensors(folder / "w.pkl")
    (folder / "w.pkl").write_bytes(pickle.dumps({"a": ARRAYS["floats"]}))
    assert read_tensors(folder / "w.pkl")["a"].sum() == 15


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
DTYPE = b"cnumpy\ndtype\n"
# Values of a dict in protocol 2.
HOSTILE = {
    # A type that claims to be numbers, and whose state turns its bytes into addresses of objects.
    "a type turned into objects": DTYPE + b"(X\x02\0\0\0O8I0\nI1\ntR",
    "objects by the flags of a type": RECONSTRUCT + b"(cnumpy\nndarray\n(I0\ntX\x01\0\0\0btR(I1\n"
    + b"(I1\nt" + DTYPE + b"(X\x02\0\0\0V8I0\nI1\ntRI0\nX\x08\0\0\0AAAAAAAAtb",
    "a class given another method": b"cnumpy\ndtype\n(N}X\x0c\0\0\0__setstate__cnumpy\ndtype\nstb",
    "a function given other code": b"c_codecs\nencode\n(N}X\x08\0\0\0__code__I1\nstb",
    "a dict given attributes": b"ccollections\nOrderedDict\n(tR(N}X\x05\0\0\0itemsI1\nstb",
    "dict given attributes": b"ccollections\nOrderedDict\n(N}X\x05\0\0\0itemsI1\nstb",
    "a persistent reference": b"X\x01\0\0\0aQ",
    "an instance by name": b"(X\x02\0\0\0idios\nsystem\n",
    "another encoding": b"c_codecs\nencode\n(X\x01\0\0\0aX\x05\0\0\0rot13tR",
    "a shape larger than its bytes": RECONSTRUCT
    + b"(cnumpy\nndarray\n(I0\ntX\x01\0\0\0btR(I1\n(I1000000000\nI1000\nt"
    + DTYPE + b"(X\x02\0\0\0f4I0\nI1\ntR(I3\nX\x01\0\0\0<tbI0\nX\x08\0\0\0AAAAAAAAtb",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_opcodes_are_refused(tmp_path, name):
    content = b"\x80\x02}X\x01\0\0\0w" + HOSTILE[name] + b"s."
    pickletools.dis(content, io.StringIO())  # well-formed
    refuses(content, tmp_path)


DAMAGED = {
    "text": b"not a pickle",
    "a length beyond the memory": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "a large memo index": b"\x80\x02Nr\xff\xff\xff\xff.",  # C's pickle takes 64 GiB
    "a dict that contains itself": b"\x80\x02}q\x00X\x01\0\0\0ah\x00s.",
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_a_value_error_and_takes_no_memory(tmp_path, name):
    refuses(DAMAGED[name], tmp_path)
