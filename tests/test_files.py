"""Files are atomic: after every failure, on a full disk, and for every reader."""

import errno
import json
import os
from unittest.mock import Mock

import pytest
import torch
from run_folders import entries
from safetensors.torch import save_file

from tract_transfer.files import (
    DiskFullError,
    atomic_path,
    make_folder,
    remove_temporary_files,
    write_json,
    write_text,
)


def fail_with(number):
    return Mock(side_effect=OSError(number, os.strerror(number)))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_only_the_old_file(tmp_path, monkeypatch, call):
    write_json(tmp_path / "a.json", {"x": 1.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    monkeypatch.setattr(os, call, fail_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1.5}
    assert entries(tmp_path) == ["a.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_the_error_of_a_full_disk_names_folder_and_bytes(tmp_path, monkeypatch, number, refused):
    monkeypatch.setattr(os, "fsync", fail_with(number))
    match = f"No space left in {tmp_path}: a.txt needs 1,234 bytes.* then resume with --resume"
    with refused("a full disk", DiskFullError, match=match):
        write_text(tmp_path / "a.txt", "x" * 1234)


def test_a_full_disk_is_recognized_in_the_error_of_safetensors(small_disk):
    tensors = {"a": torch.zeros(1 << 19)}
    with (
        pytest.raises(DiskFullError, match=r"a\.safetensors needs 2,097,152 bytes"),
        atomic_path(small_disk / "a.safetensors", 1 << 21) as temporary,
    ):
        save_file(tensors, temporary)
    assert entries(small_disk) == []


def test_only_temporary_files_are_removed(tmp_path):
    for name in (".a.json.0123abcd.part", ".hidden", "b.part"):
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert entries(tmp_path) == [".hidden", "b.part"]


def test_every_new_folder_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("tract_transfer.files.sync", synced.append)
    make_folder(tmp_path / "a/b/c")
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a/b"}
    make_folder(tmp_path / "a/b/c")
    assert len(synced) == 3
