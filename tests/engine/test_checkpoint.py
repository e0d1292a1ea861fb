"""Checkpoints load to the same bits, and damage never goes unnoticed or costs an intact one."""

import hashlib
import json
import logging
import shutil

import pytest
import torch
from run_folders import assert_bits, checkpoint_names, entries, truncate, write_checkpoints

from tract_transfer.engine.checkpoint import Checkpointer, take_tensors
from tract_transfer.files import DiskFullError, sha256_of

WEIGHT = torch.randn(4, 4)
TREE = {
    "weight": torch.randn(3, 4),
    "half": torch.randn(5).bfloat16(),
    "step": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 2),
    "strided": torch.randn(4, 6)[:, ::2],
    "shared": [WEIGHT, WEIGHT, WEIGHT[:2]],
    "state": {0: {"exp_avg": torch.randn(2, dtype=torch.float64), "amsgrad": None}, 1: {}},
    "groups": [{"lr": 0.1 + 0.2, "nesterov": False, "betas": [0.9, 0.999], "params": [0, 1]}],
    "name": "größe",
    "count": 2**60,
    "nothing": {},
    # Names that collide when joined with dots.
    "a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), 1: torch.ones(2), "1": torch.ones(3),
}  # fmt: skip


def test_loading_returns_what_was_saved(checkpointer):
    assert checkpointer.newest() is None
    assert checkpointer.best() is None
    path = checkpointer.save(12, {"model": TREE, "none": {}}, {"best": None, "skipped": ["a b"]})
    parts, state, iteration = checkpointer.load(path)
    assert_bits(parts, {"model": TREE, "none": {}})
    assert state == {"best": None, "skipped": ["a b"]}
    assert iteration == 12
    assert checkpointer.newest() == path


def test_taken_tensors_are_contiguous_copies():
    tensor, taken = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), {}
    take_tensors({"a": tensor, "b": tensor[0, 0].T}, "x", taken)
    tensor.zero_()
    assert all(value.all() and value.is_contiguous() for value in taken.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures the memory of a GPU")
def test_a_checkpoint_takes_no_memory_of_the_gpu():
    tensor, taken = torch.ones(1 << 20, device="cuda"), {}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    take_tensors({"a": tensor}, "x", taken)
    assert torch.cuda.max_memory_allocated() == before
    assert taken["x.a"].device.type == "cpu"


# ------------------------------------------------------------------------------------- damage


def rewrite(name, change):
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def flip(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def lead_outside(path):
    """Name a file of another checkpoint, with the right hashes."""
    name = "../iter_0000010/model"
    part = {"layout": {"dict": []}, "sha256": sha256_of(path / f"{name}.safetensors")}
    content = {"iteration": 20, "state": {}, "parts": {name: part}}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps({"sha256": digest, **content}))


DAMAGES = {
    "truncated": truncate,
    "byte of a tensor": rewrite("model.safetensors", flip),
    "byte of the state": rewrite("state.json", flip),
    "number of the state": rewrite("state.json", lambda b: b.replace(b'"at": 20', b'"at": 21')),
    "list as state": rewrite("state.json", lambda _: b"[1, 2]"),
    "deep state": rewrite("state.json", lambda _: b"[" * 100_000),
    "path outside": lead_outside,
    "no state": lambda path: (path / "state.json").unlink(),
    "no tensors": lambda path: (path / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped(checkpointer, caplog, damage):
    write_checkpoints(checkpointer, 10, 20)
    damage(checkpointer.folder / "iter_0000020")
    with caplog.at_level(logging.WARNING):
        newest = checkpointer.newest()
    assert newest.name == "iter_0000010"
    (record,) = caplog.records
    assert "iter_0000020 is broken" in record.message
    assert record.message.endswith("Skipped.")
    with pytest.raises(ValueError, match="iter_0000020 is broken"):
        checkpointer.load(checkpointer.folder / "iter_0000020")


def test_other_folders_are_ignored(checkpointer, caplog):
    write_checkpoints(checkpointer, 3)
    (checkpointer.folder / "iter_old").mkdir()
    (checkpointer.folder / "iter_0000009").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpointer.newest().name == "iter_0000003"
    assert "iter_0000009" in caplog.text
    write_checkpoints(checkpointer, 4, 5, 6)
    assert "iter_old" in checkpoint_names(checkpointer)


def test_tidy_archives_damaged_checkpoints_and_removes_incomplete_ones(checkpointer, caplog):
    write_checkpoints(checkpointer, 10, 20, 30)
    for iteration in (20, 30):
        truncate(checkpointer.folder / f"iter_00000{iteration}")
    (checkpointer.folder / ".iter_0000040").mkdir()
    (checkpointer.folder / ".best.json.0a1b2c3d.part").touch()
    checkpointer.tidy()
    assert entries(checkpointer.folder) == [
        "broken-iter_0000020", "broken-iter_0000030", "iter_0000010",
    ]  # fmt: skip
    assert f"Moved to {checkpointer.folder}/broken-iter_0000030" in caplog.text
    (checkpointer.folder / ".iter_0000020").mkdir()  # does not hinder the next one
    write_checkpoints(checkpointer, 20)
    truncate(checkpointer.folder / "iter_0000020")
    checkpointer.tidy()
    assert (checkpointer.folder / "broken-iter_0000020-2").is_dir()
    write_checkpoints(checkpointer, 9_999_999, 10_000_000)
    assert checkpointer.newest().name == "iter_10000000"  # by number, not by name


def test_a_full_disk_leaves_the_earlier_checkpoint(small_disk):
    checkpointer = Checkpointer(small_disk / "checkpoints")
    checkpointer.save(1, {"model": {"w": torch.zeros(100_000)}}, {})
    with pytest.raises(DiskFullError, match=r"iter_0000002 needs 800,000 bytes"):
        checkpointer.save(2, {"model": {"w": torch.zeros(200_000)}}, {})
    (small_disk / "other").write_bytes(b"x" * 300_000)
    with pytest.raises(DiskFullError, match=f"No space left in {small_disk}/checkpoints"):
        checkpointer.save(2, {"model": {"w": torch.zeros(80_000)}}, {"x": "y" * 400_000})
    assert entries(checkpointer.folder) == ["iter_0000001"]
    assert checkpointer.newest().name == "iter_0000001"


def test_a_kill_during_a_removal_leaves_no_damaged_checkpoint(checkpointer, monkeypatch):
    write_checkpoints(checkpointer, 1, 2, 3)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    write_checkpoints(checkpointer, 4)
    assert checkpoint_names(checkpointer) == [f"iter_000000{i}" for i in (2, 3, 4)]
    monkeypatch.undo()
    checkpointer.tidy()
    assert entries(checkpointer.folder) == checkpoint_names(checkpointer)


# ---------------------------------------------------------------------------- the best checkpoint


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_checkpoints_and_the_best_are_kept(tmp_path, keep):
    checkpointer = Checkpointer(tmp_path, keep)
    write_checkpoints(checkpointer, 1, 2)
    checkpointer.mark_best(2, 0.5)
    write_checkpoints(checkpointer, 3, 4, 5)
    last = [f"iter_{iteration:07d}" for iteration in range(6 - keep, 6)]
    assert checkpoint_names(checkpointer) == sorted({"iter_0000002", *last})
    assert checkpointer.best().name == "iter_0000002"
    checkpointer.mark_best(5, 0.7)
    assert checkpoint_names(checkpointer) == last
    assert checkpointer.best().name == "iter_0000005"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"value": 1}', '{"iteration": "x"}'])
def test_a_damaged_best_json_is_restored(checkpointer, caplog, text):
    write_checkpoints(checkpointer, 10, 20, 30)
    checkpointer.mark_best(20, 0.5)
    file = checkpointer.folder / "best.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"best\.json is broken: .* --resume restores"):
        checkpointer.best()
    with pytest.raises(ValueError, match=r"best\.json is broken"):
        write_checkpoints(checkpointer, 40)  # rather than remove the best
    assert "iter_0000020" in checkpoint_names(checkpointer)
    checkpointer.repair_best({"iteration": 20, "value": 0.5}, 30)
    assert checkpointer.best().name == "iter_0000020"
    assert json.loads(file.read_text()) == {"iteration": 20, "value": 0.5}
    assert (checkpointer.folder / "broken-best.json").read_text() == text
    assert "best.json is broken" in caplog.text
    write_checkpoints(checkpointer, 60)
    assert checkpoint_names(checkpointer) == [f"iter_00000{i}" for i in (20, 30, 40, 60)]


def test_a_damaged_best_checkpoint_is_an_error_on_resume(checkpointer, refused):
    write_checkpoints(checkpointer, 10, 20)
    checkpointer.repair_best(None, 10)
    assert checkpointer.best() is None  # none is marked
    checkpointer.mark_best(10, 0.5)
    truncate(checkpointer.folder / "iter_0000010")
    match = r"iter_0000010 is broken.*the best of its run"
    with refused("a damaged best checkpoint", ValueError, match=match):
        checkpointer.repair_best({"iteration": 10, "value": 0.5}, 20)


@pytest.mark.parametrize("damage", [shutil.rmtree, truncate])
def test_a_best_after_the_resumed_iteration_is_replaced(checkpointer, damage):
    write_checkpoints(checkpointer, 10, 20)
    checkpointer.mark_best(20, 0.5)
    damage(checkpointer.folder / "iter_0000020")
    checkpointer.repair_best({"iteration": 10, "value": 0.4}, 10)
    assert checkpointer.best().name == "iter_0000010"
    checkpointer.mark_best(20, 0.5)
    checkpointer.repair_best({"iteration": 5, "value": 0.4}, 10)  # this checkpoint was removed
    assert checkpointer.best() is None
