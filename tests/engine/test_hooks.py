"""Hooks watch a training, and what they write is exact after a resume."""

import errno
import json
import logging
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from run_folders import assert_bits, scalars_of

from tract_transfer.build.data import build_data
from tract_transfer.build.trainer import build_trainer
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.engine.hooks import (
    LogProgress,
    MetricsFile,
    PeriodicEvaluation,
    SaveCheckpoints,
    due,
    format_metrics,
    progress_texts,
)
from tract_transfer.files import DiskFullError


def keys_of(path):
    lines = map(json.loads, path.read_text().splitlines())
    return [(line["iteration"], line["split"]) for line in lines]


@pytest.fixture
def trainer(tmp_path, load_tiny):
    config = load_tiny(tmp_path, "model.head={name: mlp, args: {hidden_dim: 8, dropout: 0.5}}")
    return build_trainer(config, build_data(config), Accelerator(cpu=True))


same_trainer = trainer  # one more of the same config


@pytest.fixture
def metrics(tmp_path):
    return MetricsFile(tmp_path, tensorboard=False)


@pytest.fixture
def use_hooks(tmp_path, trainer, metrics):
    """Give the trainer all hooks; return its checkpointer."""

    def use(evaluate, every_iters=1):
        checkpointer = Checkpointer(tmp_path / "checkpoints", keep=9)
        trainer.hooks = [
            LogProgress(metrics, every_iters=every_iters, iters_per_epoch=4),
            SaveCheckpoints(checkpointer, [every_iters], metrics),
            PeriodicEvaluation(
                evaluate,
                every_iters=every_iters,
                at_end=True,
                split="val",
                metric="top1",
                metrics=metrics,
                iters_per_epoch=4,
                checkpointer=checkpointer,
            ),
        ]
        return checkpointer

    return use


def test_hooks_do_not_change_a_bit_of_the_training(same_trainer, trainer, metrics, use_hooks):
    same_trainer.train()

    def evaluate():
        with torch.no_grad():
            trainer.model.eval()(torch.rand(2, 3, 16, 16))
        trainer.model.train()
        return {"top1": float(torch.rand(()))}

    use_hooks(evaluate)
    trainer.train()
    assert_bits(same_trainer.model.state_dict(), trainer.model.state_dict())
    assert keys_of(metrics.path) == [(i, split) for i in range(1, 7) for split in ("train", "val")]


def test_the_best_is_the_first_of_equals(trainer, use_hooks):
    values = iter([0.2, 0.6, 0.5, 0.6, 0.1, 0.6])
    checkpointer = use_hooks(lambda: {"top1": next(values)})
    trainer.train()
    assert trainer.best == {"iteration": 2, "value": 0.6}
    assert checkpointer.best().name == "iter_0000002"


def test_the_log_marks_the_best_so_far_also_after_a_resume(trainer, metrics, use_hooks, caplog):
    metrics.write(0, 0.0, "val", {"top1": 0.3})  # an earlier session's
    values = iter([0.2, 0.6, 0.5, 0.6, 0.1, 0.7])
    use_hooks(lambda: {"loss": 1.0, "top1": next(values)})
    with caplog.at_level(logging.INFO, "tract_transfer"):
        trainer.train()
    lines = [line for line in caplog.messages if "  val " in line]
    assert [line.split()[1] for line in lines if "(best so far)" in line] == ["2", "6"]
    assert lines[1] == "iter 2  val top1 60.00% (best so far)  loss 1.0000"


def test_the_log_has_the_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    values = {"lr": 0.1, "images_per_second": 1.0, "data_fraction": 0.0}
    on_gpu = progress_texts(values, 0.5, torch.device("cuda"))
    assert on_gpu.pop("memory") == "peak 1.5 GiB"
    assert on_gpu == progress_texts(values, 0.5, torch.device("cpu"))


def test_a_checkpoint_precedes_its_evaluation(trainer, use_hooks):
    checkpointer = use_hooks(Mock(side_effect=ValueError("no object")), every_iters=2)
    with pytest.raises(ValueError, match="no object"):
        trainer.train()
    assert checkpointer.newest().name == "iter_0000002"


def test_a_signal_during_an_evaluation_is_followed_by_a_checkpoint(trainer, use_hooks):
    """The hook that writes it must see the signal, whenever that arrives."""

    def evaluate():
        trainer.stop.number = 15  # as a handler does
        return {"top1": 0.5}

    checkpointer = use_hooks(evaluate, every_iters=2)
    trainer.train()
    assert trainer.iteration == 3
    assert trainer.stop_signal == 15
    assert checkpointer.newest().name == "iter_0000003"


def test_a_checkpoint_has_the_skipped_images_of_all_processes(trainer, use_hooks, monkeypatch):
    monkeypatch.setattr(
        "tract_transfer.engine.trainer.gather_object", lambda items: [*items, "theirs", *items]
    )
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: None)
    checkpointer = use_hooks(None)
    trainer.skipped = ["ours"]
    trainer.iteration = 2
    trainer.hooks[1].after_step(trainer)
    _, state, _ = checkpointer.load(checkpointer.newest())
    assert state["skipped"] == trainer.skipped == ["ours", "theirs"]


def test_a_diverged_run_writes_no_checkpoint(trainer, use_hooks):
    checkpointer = use_hooks(lambda: {"top1": 0.5}, every_iters=2)

    def spoil(*_):
        if trainer.iteration == 2:
            trainer.model.head[0].weight.data.fill_(float("nan"))

    trainer.optimizer.register_step_pre_hook(spoil)
    with pytest.raises(FloatingPointError, match="in iteration 4"):
        trainer.train()
    assert checkpointer.newest().name == "iter_0000002"


def test_hooks_end_after_an_error_too(trainer):
    hook = Mock()
    hook.after_step.side_effect = ValueError("no")
    trainer.hooks = [hook]
    with pytest.raises(ValueError, match="no"):
        trainer.train()
    hook.after_train.assert_called_once()  # otherwise a progress bar would keep the terminal


def test_an_interval_is_due_at_its_multiples_and_metrics_are_shown_in_percent():
    assert [i for i in range(10) if due(i, 3)] == [3, 6, 9]
    assert not any(due(i, None) for i in range(10))
    assert format_metrics({"top1": 0.9125, "loss": 0.34117}) == "top1 91.25%  loss 0.3412"


# ------------------------------------------------------------------------------- metrics.jsonl


def test_lines_that_a_resumed_run_repeats_are_cut(metrics):
    metrics.cut_after(3)
    assert not metrics.path.exists()
    for iteration in (2, 4, 6):
        metrics.write(iteration, iteration / 4, "train", {"loss": 1.0})
        metrics.write(iteration, iteration / 4, "val", {"top1": 0.5})
    with metrics.path.open("a") as file:
        file.write('{"iteration": 8, "spl')  # cut off by a power failure
    metrics.cut_after(4)
    assert keys_of(metrics.path) == [(2, "train"), (2, "val"), (4, "train")]
    metrics.cut_after(0)
    assert metrics.path.read_text() == ""


def test_lines_that_cannot_be_read_are_named_and_copied(metrics, caplog):
    for iteration in (1, 2, 3):
        metrics.write(iteration, 0.5, "train", {"loss": 1.0})
    text = metrics.path.read_text().replace('"iteration": 2', "\0\0")
    metrics.path.write_text(text)
    metrics.cut_after(3)
    assert keys_of(metrics.path) == [(1, "train"), (3, "train")]
    assert "metrics.jsonl: cannot read lines [2]" in caplog.text
    assert metrics.path.with_name("broken-metrics.jsonl").read_text() == text


def test_tensorboard_has_every_line_once_after_a_kill(tmp_path):
    killed = MetricsFile(tmp_path, tensorboard=True)
    for iteration in (2, 4, 6):
        killed.write(iteration, 0.5, "train", {"loss": iteration / 8})
    killed.write(4, 0.5, "val", {"top1": 0.5})
    killed.close()  # its thread would write to the files below
    for file in (tmp_path / "tensorboard").iterdir():
        file.write_bytes(b"")  # nothing had reached the disk
    resumed = MetricsFile(tmp_path, tensorboard=True)
    resumed.cut_after(4)
    resumed.write(4, 0.5, "val", {"top1": 0.5})
    resumed.write(6, 0.5, "train", {"loss": 0.75})
    resumed.close()
    assert scalars_of(tmp_path) == {
        "train/loss": [(2, 0.25), (4, 0.5), (6, 0.75)],
        "val/top1": [(4, 0.5)],
    }


def test_lines_are_synced_before_their_checkpoint(trainer, use_hooks, monkeypatch):
    """No resume writes lines before a checkpoint again."""
    order = []
    monkeypatch.setattr("tract_transfer.engine.hooks.sync", lambda path: order.append(path.name))
    save = Checkpointer.save
    monkeypatch.setattr(Checkpointer, "save", lambda *a: order.append("save") or save(*a))
    use_hooks(lambda: {"top1": 0.5}, every_iters=3)
    trainer.train()
    assert order == ["metrics.jsonl", "save"] * 2


def test_the_error_of_a_full_disk_names_the_file(metrics, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(json, "dumps", Mock(side_effect=full))
    with pytest.raises(DiskFullError, match=r"No space left in .*: metrics\.jsonl"):
        metrics.write(1, 0.5, "train", {"loss": 1.0})


def test_progress_is_logged_line_by_line(trainer, metrics, caplog):
    trainer.hooks = [LogProgress(metrics, every_iters=3, iters_per_epoch=4)]
    with caplog.at_level(logging.INFO, "tract_transfer"):
        trainer.train()
    assert "iter 3/6" in caplog.text
    assert "iter 6/6  epoch 1.50  loss" in caplog.text
    assert "eta 0:00:00" in caplog.text
    line = json.loads(metrics.path.read_text().splitlines()[-1])
    assert " ".join(line) == (
        "iteration epoch split loss loss_cls images_per_second data_fraction lr"
    )
    assert 0 <= line["data_fraction"] <= 1
