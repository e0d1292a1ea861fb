"""Signals: when a run ends, with which code, with what written, and what it says."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from run_folders import CARVED, assert_same_run, entries

from tract_transfer.engine import group as signals
from tract_transfer.engine.group import Stopped, StopRequest, stop_on_signals
from tract_transfer.engine.trainer import Trainer
from tract_transfer.run import probe as run_probe
from tract_transfer.run import run as run_module
from tract_transfer.run import train as run_training
from tract_transfer.run.run import run


def send(number=signal.SIGTERM):
    """Send this process a signal, and let its handler run."""
    signal.raise_signal(number)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_where_nothing_would_be_lost_a_signal_ends_at_once(name, code):
    with pytest.raises(Stopped) as caught, stop_on_signals(lambda: "go on so."):
        try:
            send(signal.Signals[name])
        except Exception:
            pytest.fail("no `except Exception` may keep it")
        pytest.fail("it should have ended")
    assert caught.value.exit_code == code
    assert str(caught.value) == f"{name}: go on so."


def test_while_it_can_wait_a_signal_is_a_request(monkeypatch):
    with pytest.raises(Stopped), stop_on_signals(str) as stop:
        with stop.waits():
            send()
            assert stop.number == signal.SIGTERM
            assert list(stop.watched([1, 2])) == []
        assert StopRequest().number is None
        assert list(StopRequest().watched([1, 2])) == [1, 2]


def test_one_request_may_come_twice_and_another_ends_as_without_us(monkeypatch):
    """A scheduler signals all processes of a job, and the launcher among them its own again."""
    others = []
    before = signal.signal(signal.SIGTERM, lambda *_: others.append("theirs"))
    try:
        with pytest.raises(Stopped), stop_on_signals(str) as stop, stop.waits():
            send()
            send()
            assert others == []
            monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)
            send()
            assert others == ["theirs"]
        send()
        assert others == ["theirs", "theirs"]
    finally:
        signal.signal(signal.SIGTERM, before)


STUBBORN = """
import time
from tract_transfer.engine.group import stop_on_signals
with stop_on_signals(str) as stop, stop.waits():
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_second_signal_ends_the_process(number):
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    time.sleep(signals.SAME_REQUEST_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == -number  # which a shell calls 128 + number
    assert "Traceback" not in said


def test_a_data_worker_leaves_signals_to_its_parent():
    with stop_on_signals(str) as stop:
        if os.fork() == 0:
            try:
                send()
                os._exit(7)
            except BaseException:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
        assert stop.number is None


def test_another_thread_runs_without_signals():
    before = signal.getsignal(signal.SIGTERM)

    def inside():
        with stop_on_signals(str):
            found.append(signal.getsignal(signal.SIGTERM))

    found = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [before]


def sending_from(monkeypatch, module, name, at, *, before=True):
    """Let a function of a module send SIGTERM when it is called for the `at`-th time."""
    original, calls = getattr(module, name), []

    def sends(*arguments, **named):
        calls.append(None)
        if before and len(calls) == at:
            send()
        result = original(*arguments, **named)
        if not before and len(calls) == at:
            send()
        return result

    monkeypatch.setattr(module, name, sends)


@pytest.mark.parametrize("evaluation", [1, 2, 4], ids=["first", "second", "final"])
def test_an_evaluation_ends_with_its_batch_and_is_made_again(
    tmp_path, load_tiny, monkeypatch, evaluation
):
    words = (*CARVED, "evaluation.every_iters=2", "data.batch_size=16")
    run(load_tiny(tmp_path, *words, f"output_dir={tmp_path / 'whole'}"))
    config, seen, count = load_tiny(tmp_path, *words), [], 0
    batches_of = run_training.eval_batches

    def sending(*arguments):
        nonlocal count
        count += 1
        for batch in batches_of(*arguments):
            seen.append(count)
            yield batch
            if count == evaluation:
                send()

    monkeypatch.setattr(run_training, "eval_batches", sending)
    with pytest.raises(Stopped, match=r"checkpoint written\. Go on with --resume"):
        run(config)
    assert seen.count(evaluation) == 2  # the batch it was in, and the one drawn meanwhile
    monkeypatch.undo()
    assert entries(tmp_path / "run/checkpoints")[-1] == f"iter_{min(2 * evaluation, 6):07d}"
    run(config, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("task", ["classification", "probe"])
def test_nothing_is_written_where_a_signal_comes_while_data_are_read(
    tmp_path, load_tiny, monkeypatch, task
):
    sending_from(monkeypatch, run_module, "build_data", 1, before=False)
    with pytest.raises(Stopped, match="Give the same command again"):
        run(load_tiny(tmp_path, task=task))
    assert not (tmp_path / "run").exists()


def test_the_final_write_is_finished(tmp_path, load_tiny, monkeypatch):
    sending_from(monkeypatch, run_training, "write_results", 1)
    with pytest.raises(Stopped, match=r"the run is finished") as caught:
        run(load_tiny(tmp_path))
    assert caught.value.exit_code == 143
    assert {"results.json", "model.safetensors", "model.json"} <= set(entries(tmp_path / "run"))


def test_a_probe_loses_at_most_the_split_it_is_in(tmp_path, load_tiny, monkeypatch, caplog):
    sending_from(monkeypatch, run_probe, "_extract", 2, before=False)
    config = load_tiny(tmp_path, task="probe")
    with pytest.raises(Stopped, match="Give the same command again"):
        run(config)
    monkeypatch.undo()
    assert len(entries(tmp_path / "run/features")) == 1
    found = run(config)
    assert "Features read from" in (tmp_path / "run/log.txt").read_text()
    assert run(load_tiny(tmp_path, f"output_dir={tmp_path / 'whole'}", task="probe"))[
        "metrics"
    ] == pytest.approx(found["metrics"], rel=0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_the_tool_says_how_to_go_on(tmp_path, write_tiny, call, monkeypatch, number, code):
    step = Trainer.step

    def sending(self, batches):
        if self.iteration == 3:
            send(number)
        step(self, batches)

    monkeypatch.setattr(Trainer, "step", sending)
    said = call("train_net.py", "--config-file", write_tiny(tmp_path))
    assert said.returncode == code
    assert f"{number.name}: checkpoint written. Go on with --resume" in said.stderr
    assert entries(tmp_path / "run/checkpoints") == ["iter_0000004"]  # after the step it was in


@pytest.mark.parametrize("option", ["--dry-run", "--eval-only"])
def test_ctrl_c_where_nothing_trains_is_no_traceback(
    tmp_path, write_tiny, call, monkeypatch, option
):
    sending = {"--dry-run": "preview", "--eval-only": "evaluate_run"}[option]

    def interrupted(_config, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, sending, interrupted)
    said = call("train_net.py", "--config-file", write_tiny(tmp_path), option)
    assert (said.returncode, said.stderr) == (130, "SIGINT: ended.\n")
    assert not Path(tmp_path / "run").exists()
