"""A signal stops a run with the right exit code, and nothing written is lost."""

import contextlib
import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
from run_folders import CARVED, assert_same_run, entries

from tract_transfer.engine import group
from tract_transfer.engine.group import Stopped, stop_on_signals
from tract_transfer.engine.run_folder import flatten
from tract_transfer.engine.screen import ProgressLine
from tract_transfer.engine.trainer import Trainer
from tract_transfer.run import evaluate as evaluate_module
from tract_transfer.run import probe as run_probe
from tract_transfer.run import run as run_module
from tract_transfer.run.run import run


def send():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_a_signal_stops_at_once_if_nothing_would_be_lost(name, code):
    with pytest.raises(Stopped) as caught, stop_on_signals(lambda: "resume like this."):
        with contextlib.suppress(Exception):
            signal.raise_signal(signal.Signals[name])
        pytest.fail("`except Exception` caught it")
    assert caught.value.exit_code == code
    assert str(caught.value) == f"{name}: resume like this."


def test_a_signal_is_a_request_while_it_can_wait():
    with pytest.raises(Stopped), stop_on_signals(str) as stop, stop.waits():
        assert list(stop.watched([1, 2])) == [1, 2]
        send()
        assert stop.number == signal.SIGTERM
        assert list(stop.watched([1, 2])) == []


def test_a_later_signal_is_handled_as_before(monkeypatch):
    """But a scheduler signals all processes of a job, and the launcher its own again."""
    handled = []
    before = signal.signal(signal.SIGTERM, lambda *_: handled.append("before"))
    try:
        with pytest.raises(Stopped), stop_on_signals(str) as stop, stop.waits():
            send()
            send()
            assert handled == []
            monkeypatch.setattr(group, "SAME_REQUEST_SECONDS", 0.0)
            send()
            assert handled == ["before"]
        send()
        assert handled == ["before", "before"]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_later_signal_ends_the_process(number, monkeypatch):
    monkeypatch.setattr(group, "SAME_REQUEST_SECONDS", 0.0)
    ready, write_ready = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with stop_on_signals(str) as stop, stop.waits():
                os.write(write_ready, b".")
                time.sleep(60)
        finally:
            os._exit(1)
    os.read(ready, 1)
    os.kill(process, number)
    time.sleep(0.3)
    assert os.waitpid(process, os.WNOHANG) == (0, 0)  # it still runs
    os.kill(process, number)
    # Which a shell calls 128 + number; an exception would end it with 1.
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -number


def test_data_workers_and_other_threads_ignore_signals():
    with stop_on_signals(str) as stop:
        if os.fork() == 0:
            try:
                send()
                os._exit(7)
            except BaseException:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
        assert stop.number is None
    before = signal.getsignal(signal.SIGTERM)

    def handler_inside():
        with stop_on_signals(str):
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor() as pool:
        assert pool.submit(handler_inside).result() is before


def send_after(monkeypatch, module, name, at=1):
    """Make the end of the `at`-th call of a function of a module or class send SIGTERM."""
    original, calls = getattr(module, name), itertools.count(1)

    def sends(*arguments, **named):
        result = original(*arguments, **named)
        if next(calls) == at:
            send()
        return result

    monkeypatch.setattr(module, name, sends)


def test_an_evaluation_stops_after_its_batch_and_is_repeated(tmp_path, load_tiny, monkeypatch):
    words = (*CARVED, "evaluation.every_iters=2", "data.batch_size=16")
    run(load_tiny(tmp_path, *words, f"output_dir={tmp_path / 'whole'}"))
    config, seen, count = load_tiny(tmp_path, *words), [], 0
    second_on_val, final = 2, 5
    track = ProgressLine.track

    def sending(line, batches):
        nonlocal count
        count += 1
        for batch in track(line, batches):
            seen.append(count)
            yield batch
            if count in (second_on_val, final):
                send()

    monkeypatch.setattr(ProgressLine, "track", sending)
    for evaluation, iteration in ((second_on_val, 4), (final, 6)):
        with pytest.raises(Stopped, match=r"checkpoint written\. .*--resume"):
            run(config, resume=True)
        assert seen.count(evaluation) == 2  # the batch it was in, and the one drawn meanwhile
        assert entries(tmp_path / "run/checkpoints")[-1] == f"iter_{iteration:07d}"
    run(config, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("task", ["classification", "probe"])
def test_a_signal_while_data_are_read_leaves_no_folder(tmp_path, load_tiny, monkeypatch, task):
    send_after(monkeypatch, run_module, "build_data")
    with pytest.raises(Stopped, match="Give the same command again"):
        run(load_tiny(tmp_path, task=task))
    assert not (tmp_path / "run").exists()


def test_a_signal_does_not_interrupt_the_final_write(tmp_path, load_tiny, monkeypatch):
    send_after(monkeypatch, run_module, "save_model")
    with pytest.raises(Stopped, match=r"the run is finished") as caught:
        run(load_tiny(tmp_path))
    assert caught.value.exit_code == 143
    assert {"results.json", "model.safetensors", "model.json"} <= set(entries(tmp_path / "run"))


def test_a_stopped_probe_keeps_the_features_of_finished_splits(tmp_path, load_tiny, monkeypatch):
    send_after(monkeypatch, run_probe, "_extract", at=2)
    config = load_tiny(tmp_path, task="probe")
    with pytest.raises(Stopped, match="Give the same command again"):
        run(config)
    assert len(entries(tmp_path / "run/features")) == 1
    run(config)
    assert "Features read from" in (tmp_path / "run/log.txt").read_text()


def test_the_command_says_how_to_resume(tmp_path, write_tiny, call, monkeypatch):
    send_after(monkeypatch, Trainer, "losses", at=4)
    ended = call("train_net.py", "--config-file", write_tiny(tmp_path))
    assert ended.returncode == 143
    assert "SIGTERM: checkpoint written." in ended.stderr
    assert entries(tmp_path / "run/checkpoints") == ["iter_0000004"]  # after the step it was in


@pytest.mark.parametrize("option", ["--dry-run", "--eval-only"])
def test_ctrl_c_prints_no_traceback_if_nothing_trains(
    tmp_path, write_tiny, call, monkeypatch, option
):
    function = {"--dry-run": "preview", "--eval-only": "evaluate_run"}[option]
    monkeypatch.setattr(evaluate_module, function, Mock(side_effect=KeyboardInterrupt))
    ended = call("train_net.py", "--config-file", write_tiny(tmp_path), option)
    assert (ended.returncode, ended.stderr) == (130, "SIGINT: ended.\n")
    assert not (tmp_path / "run").exists()


def test_processes_with_different_configs_are_refused(tmp_path, load_tiny, monkeypatch):
    other = flatten(load_tiny(tmp_path, "solver.lr=0.5").model_dump(mode="json"))
    monkeypatch.setattr(group, "gather_object", lambda own: [*own, other])
    with pytest.raises(ValueError, match=r"process 1 has another solver\.lr"):
        run(load_tiny(tmp_path))
    assert not (tmp_path / "run").exists()
