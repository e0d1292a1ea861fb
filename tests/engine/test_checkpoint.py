import hashlib
import json
import logging
import shutil

import pytest
import torch
from run_folders import assert_bits, checkpoint_names, entries, truncate, write_checkpoints

from tract_transfer.engine.checkpoint import Checkpointer, take_tensors
from tract_transfer.files import DiskFullError

TREE = {
    "weight": torch.randn(3, 4),
    "half": torch.randn(5).bfloat16(),
    "step": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 2),
    "strided": torch.randn(4, 6)[:, ::2],
    "state": {0: {"exp_avg": torch.randn(2, dtype=torch.float64), "amsgrad": None}, 1: {}},
    "groups": [{"lr": 0.1 + 0.2, "nesterov": False, "betas": [0.9, 0.999], "params": [0, 1]}],
    "name": "größe",
    "count": 2**60,
    "nothing": {},
}


def test_what_is_saved_is_what_is_loaded(checkpointer):
    path = checkpointer.save(12, {"model": TREE, "none": {}}, {"best": None, "skipped": ["a b"]})
    parts, state, iteration = checkpointer.load(path)
    assert_bits(parts, {"model": TREE, "none": {}})
    assert state == {"best": None, "skipped": ["a b"]}
    assert iteration == 12
    assert checkpointer.newest() == path


def test_names_with_dots_do_not_collide(checkpointer):
    tree = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), 1: torch.ones(2), "1": torch.ones(3)}
    parts, _, _ = checkpointer.load(checkpointer.save(1, {"x": tree}, {}))
    assert_bits(parts["x"], tree)


def test_tensors_that_share_memory_are_saved(checkpointer):
    weight = torch.randn(4, 4)
    tree = {"tied": weight, "again": weight, "view": weight[:2]}
    parts, _, _ = checkpointer.load(checkpointer.save(1, {"model": tree}, {}))
    assert_bits(parts["model"], tree)


def test_only_tensors_and_plain_values_are_taken(checkpointer, refused):
    with refused(
        "a checkpoint of other than tensors and plain values",
        TypeError,
        match=r"model\.odd: .* not <class 'object'>",
    ):
        checkpointer.save(1, {"model": {"odd": object()}}, {})
    assert checkpointer.newest() is None


def flip(name):
    def damage(path):
        content = bytearray((path / name).read_bytes())
        content[-5] ^= 1
        (path / name).write_bytes(content)

    return damage


def change_a_number(path):
    file = path / "state.json"
    file.write_text(file.read_text().replace('"at": 20', '"at": 21'))


def replace_by_a_list(path):
    (path / "state.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip("model.safetensors"),
        flip("state.json"),
        change_a_number,
        replace_by_a_list,
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "model.safetensors").unlink(),
    ],
    ids=["cut", "byte", "state byte", "state number", "list", "no state", "no tensors"],
)
def test_a_broken_one_is_named_and_passed_over(checkpointer, caplog, damage):
    write_checkpoints(checkpointer, 10, 20)
    damage(checkpointer.folder / "iter_0000020")
    with caplog.at_level(logging.WARNING):
        newest = checkpointer.newest()
    assert newest.name == "iter_0000010"
    (record,) = caplog.records
    assert "iter_0000020 is broken" in record.message
    assert "Passed over." in record.message
    with pytest.raises(ValueError, match="iter_0000020 is broken"):
        checkpointer.load(checkpointer.folder / "iter_0000020")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"iteration": float("inf")}, "infinity"),
        ({"parts": {"../iter_0000010/model": {"layout": {}, "sha256": ""}}}, "is no file name"),
    ],
)
def test_a_state_made_to_mislead_is_broken(checkpointer, changes, says, refused):
    write_checkpoints(checkpointer, 10, 20)
    file = checkpointer.folder / "iter_0000020/state.json"
    content = {**json.loads(file.read_text()), **changes}
    del content["sha256"]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    file.write_text(json.dumps({"sha256": digest, **content}))
    with refused(
        f"a checkpoint whose state has {list(changes)} made to mislead",
        ValueError,
        match=f"iter_0000020 is broken: .*{says}",
    ):
        checkpointer.load(file.parent)


def test_a_state_of_great_depth_is_broken(checkpointer):
    write_checkpoints(checkpointer, 10)
    (checkpointer.folder / "iter_0000010/state.json").write_text("[" * 100_000)
    assert checkpointer.newest() is None


def test_folders_of_others_are_passed_over(checkpointer, caplog):
    write_checkpoints(checkpointer, 3)
    (checkpointer.folder / "iter_old").mkdir()
    (checkpointer.folder / "iter_0000009").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpointer.newest().name == "iter_0000003"
    assert "iter_0000009" in caplog.text
    write_checkpoints(checkpointer, 4, 5, 6)
    assert "iter_old" in checkpoint_names(checkpointer)


def test_an_interrupted_write_is_never_taken(checkpointer):
    write_checkpoints(checkpointer, 1)
    whole = checkpointer.folder / "iter_0000001"
    whole.rename(checkpointer.folder / ".iter_0000002")
    assert checkpointer.newest() is None
    write_checkpoints(checkpointer, 2)
    assert checkpointer.newest().name == "iter_0000002"
    assert not (checkpointer.folder / ".iter_0000002").exists()


def test_a_run_that_came_back_keeps_what_it_writes(tmp_path):
    """Broken checkpoints ahead of it do not take the place of new ones."""
    checkpointer = Checkpointer(tmp_path, keep=2)
    write_checkpoints(checkpointer, 10, 20)
    truncate(tmp_path / "iter_0000020")
    write_checkpoints(checkpointer, 12)
    assert checkpointer.newest().name == "iter_0000012"
    write_checkpoints(checkpointer, 20)
    assert checkpointer.newest().name == "iter_0000020"
    assert checkpoint_names(checkpointer) == ["iter_0000012", "iter_0000020"]


def test_order_is_by_number(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    write_checkpoints(checkpointer, 9_999_999, 10_000_000)
    assert checkpointer.newest().name == "iter_10000000"


def test_no_folder_no_checkpoint(checkpointer):
    assert checkpointer.newest() is None
    assert checkpointer.best() is None


def test_broken_ones_are_kept_aside_and_leftovers_cleared(checkpointer, caplog):
    write_checkpoints(checkpointer, 10, 20, 30)
    for iteration in (20, 30):
        truncate(checkpointer.folder / f"iter_00000{iteration}")
    (checkpointer.folder / ".iter_0000040").mkdir()
    (checkpointer.folder / ".best.json.0a1b2c3d.part").touch()
    checkpointer.tidy()
    assert entries(checkpointer.folder) == [
        "broken-iter_0000020", "broken-iter_0000030", "iter_0000010",
    ]  # fmt: skip
    assert f"Kept as {checkpointer.folder}/broken-iter_0000030" in caplog.text
    write_checkpoints(checkpointer, 20)
    truncate(checkpointer.folder / "iter_0000020")
    checkpointer.tidy()
    assert (checkpointer.folder / "broken-iter_0000020-2").is_dir()
    write_checkpoints(checkpointer, 20)
    assert checkpointer.newest().name == "iter_0000020"


def test_writing_over_a_whole_one_never_leaves_none(checkpointer, monkeypatch):
    write_checkpoints(checkpointer, 10)
    monkeypatch.setattr(shutil, "rmtree", None)  # nothing is removed
    checkpointer.save(10, {"model": {"w": torch.tensor(11)}}, {})
    assert checkpointer.load(checkpointer.newest())[0]["model"]["w"] == 10


def test_a_full_disk_leaves_the_last_good_one(small_disk):
    checkpointer = Checkpointer(small_disk / "checkpoints")
    checkpointer.save(1, {"model": {"w": torch.zeros(100_000)}}, {})
    with pytest.raises(DiskFullError, match=r"iter_0000002 needs 800,000 bytes"):
        checkpointer.save(2, {"model": {"w": torch.zeros(200_000)}}, {})
    (small_disk / "other").write_bytes(b"x" * 300_000)
    with pytest.raises(DiskFullError, match=f"No space left in {small_disk}/checkpoints"):
        checkpointer.save(2, {"model": {"w": torch.zeros(80_000)}}, {"x": "y" * 400_000})
    assert entries(checkpointer.folder) == ["iter_0000001"]
    assert checkpointer.newest().name == "iter_0000001"


def test_a_removal_cut_short_leaves_no_broken_one(checkpointer, monkeypatch):
    write_checkpoints(checkpointer, 1, 2, 3)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it removes
    write_checkpoints(checkpointer, 4)
    assert checkpoint_names(checkpointer) == [f"iter_000000{i}" for i in (2, 3, 4)]
    monkeypatch.undo()
    checkpointer.tidy()
    assert entries(checkpointer.folder) == checkpoint_names(checkpointer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it is of a GPU's memory")
def test_a_checkpoint_takes_no_memory_of_the_gpu():
    tensor = torch.ones(1 << 20, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    taken = {}
    take_tensors({"a": tensor}, "x", taken)
    assert torch.cuda.max_memory_allocated() == before
    assert taken["x.a"].device.type == "cpu"


def test_what_is_taken_is_a_copy_in_its_own_order():
    """Later steps must not change it, and other orders of memory are not kept."""
    tensor, taken = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last), {}
    take_tensors({"a": tensor, "b": tensor[0, 0].T}, "x", taken)
    before = {name: each.clone() for name, each in taken.items()}
    tensor.zero_()
    assert all(torch.equal(taken[name], before[name]) for name in taken)
    assert all(each.is_contiguous() for each in taken.values())
