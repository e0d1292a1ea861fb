"""Files are whole or not there: at every failure, on a full disk, and for every reader."""

import errno
import json
import os

import pytest
import torch
from run_folders import entries
from safetensors.torch import save_file

from tract_transfer.files import (
    DiskFullError,
    atomic_path,
    check_space,
    make_folder,
    remove_temporary_files,
    write_json,
    write_text,
)


def fail_with(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_json_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1.5}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, call, fail_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert entries(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_folder_and_bytes(tmp_path, monkeypatch, number, refused):
    monkeypatch.setattr(os, "fsync", fail_with(number))
    with refused("a full disk", DiskFullError) as caught:
        write_text(tmp_path / "a.txt", "x" * 1234)
    message = str(caught.value)
    assert f"No space left in {tmp_path}: a.txt needs 1,234 bytes" in message
    assert "Make room, and go on with --resume" in message


def test_tensors_on_a_full_disk_are_told_too(small_disk):
    """safetensors has an error of its own for it."""
    tensors = {"a": torch.zeros(1 << 19)}
    with (
        pytest.raises(DiskFullError, match=r"a\.safetensors needs 2,097,152 bytes"),
        atomic_path(small_disk / "a.safetensors", 1 << 21) as aside,
    ):
        save_file(tensors, aside)
    assert entries(small_disk) == []


def test_what_cannot_fit_is_refused_before_the_first_byte(small_disk):
    check_space(small_disk, "a", 1 << 19)
    with pytest.raises(DiskFullError, match="a needs 2,097,152 bytes"):
        check_space(small_disk, "a", 1 << 21)


def test_leftovers_are_removed_and_nothing_else(tmp_path):
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
