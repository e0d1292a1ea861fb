"""What is in the place of weights is named, and nothing in a file is executed."""

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tract_transfer.models.weights_file import flat_tensors, read_content, read_tensors

WEIGHT = torch.arange(6.0).view(2, 3)


class Payload:
    """What a hostile pickle holds: opening it would create a file."""

    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return (os.system, (f"touch {self.touched}",))


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.pkl", "w.ckpt"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_payload_is_refused_and_not_executed(tmp_path, name, how):
    file, touched = tmp_path / name, tmp_path / "touched"
    content = {"conv1.weight": WEIGHT if how == "torch" else 1, "evil": Payload(touched)}
    if how == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=name):
        read_tensors(file)
    assert not touched.exists()


@pytest.mark.parametrize(
    "begins, says",
    [
        (b"", r"is empty\. Copy or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"\n <!DOCTYPE html><html>Sign in</html>", "is a web page, not weights"),
        (b"<html><body>404</body></html>", "Download the file itself"),
        (b"PK\x03\x04 cut short", "cannot be read as weights|was not opened"),
        (b"not weights", "cannot be read as weights|was not opened"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
def test_what_is_no_weights_file_is_named(tmp_path, suffix, begins, says):
    file = tmp_path / f"w{suffix}"
    file.write_bytes(begins)
    with pytest.raises(ValueError, match=says) as caught:
        read_tensors(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_file_cut_short_is_refused(tmp_path, suffix, share):
    file, state = tmp_path / f"w{suffix}", {"a": torch.rand(100, 100)}
    if suffix == ".pkl":
        file.write_bytes(pickle.dumps({"a": state["a"].numpy()}))
    elif suffix == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=rf"w\{suffix} cannot be read as weights"):
        read_tensors(file)


def test_plain_values_beside_weights_are_read(tmp_path):
    content = {
        "model": {"a": WEIGHT},
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "epoch": 3,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save(content, tmp_path / "w.pth")
    assert read_content(tmp_path / "w.pth")["args"].lr == 0.1
    found = read_tensors(tmp_path / "w.pth")
    assert found.keys() == {"model.a", "optimizer.state.0.step"}
    assert torch.equal(found["model.a"], WEIGHT)


def test_arrays_are_read_from_a_pickle(tmp_path):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {"a": WEIGHT.numpy()}, "author": "x"}))
    assert torch.equal(read_tensors(tmp_path / "w.pkl")["model.a"], WEIGHT)


def test_nested_names_are_joined():
    found = flat_tensors({"a": {"b": {"c": WEIGHT}}, "d": [WEIGHT], "e": np.array("x"), 1: WEIGHT})
    assert found.keys() == {"a.b.c", "1"}


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No weights at .*w\.pth\. Set model\.weights"):
        read_tensors(tmp_path / "w.pth")
