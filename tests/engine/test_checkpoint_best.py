"""The best checkpoint of a run: which one it is, that it stays, and what becomes of a lost one."""

import json
import shutil

import pytest
from run_folders import checkpoint_names, truncate, write_checkpoints

from tract_transfer.engine.checkpoint import Checkpointer


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_and_the_best_stay(tmp_path, keep):
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
def test_a_broken_best_is_found_again(checkpointer, caplog, text):
    write_checkpoints(checkpointer, 10, 20, 30)
    checkpointer.mark_best(20, 0.5)
    file = checkpointer.folder / "best.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"best\.json is broken: .* --resume finds"):
        checkpointer.best()
    with pytest.raises(ValueError, match=r"best\.json is broken"):
        write_checkpoints(checkpointer, 40)  # rather than to remove the best
    assert "iter_0000020" in checkpoint_names(checkpointer)
    checkpointer.repair_best({"iteration": 20, "value": 0.5}, 30)
    assert checkpointer.best().name == "iter_0000020"
    assert json.loads(file.read_text()) == {"iteration": 20, "value": 0.5}
    assert (checkpointer.folder / "broken-best.json").read_text() == text
    assert "best.json is broken" in caplog.text
    write_checkpoints(checkpointer, 60)
    assert checkpoint_names(checkpointer) == [f"iter_00000{i}" for i in (20, 30, 40, 60)]


def test_a_best_that_is_gone_is_an_error_now_and_not_at_the_end(checkpointer, refused):
    write_checkpoints(checkpointer, 10, 20)
    checkpointer.mark_best(10, 0.5)
    truncate(checkpointer.folder / "iter_0000010")
    with refused(
        "a damaged best checkpoint",
        ValueError,
        match=r"iter_0000010 is broken.*the best of its run",
    ):
        checkpointer.repair_best({"iteration": 10, "value": 0.5}, 20)


def test_nothing_is_mended_where_nothing_was_marked(checkpointer):
    write_checkpoints(checkpointer, 10)
    checkpointer.repair_best(None, 10)
    assert checkpointer.best() is None


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_best_after_where_a_run_goes_on_is_found_again(checkpointer, is_gone):
    write_checkpoints(checkpointer, 10, 20)
    checkpointer.mark_best(20, 0.5)
    path = checkpointer.folder / "iter_0000020"
    shutil.rmtree(path) if is_gone else truncate(path)
    checkpointer.repair_best({"iteration": 10, "value": 0.4}, 10)
    assert checkpointer.best().name == "iter_0000010"
    checkpointer.mark_best(20, 0.5)
    checkpointer.repair_best({"iteration": 5, "value": 0.4}, 10)  # whose checkpoint was removed
    assert checkpointer.best() is None
