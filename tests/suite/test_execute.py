"""Executing a suite with a launcher that decides how its attempts end."""

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from run_folders import held
from suites import cut_off, finish, make_suite

from tract_transfer.config.file import ConfigError
from tract_transfer.engine.run_folder import FolderInUseError
from tract_transfer.suite.execute import execute
from tract_transfer.suite.launchers import Launcher
from tract_transfer.suite.screen import Screen
from tract_transfer.suite.state import Suite


def name_of(run):
    return f"{run.method}/{run.task}"


class Fake(Launcher):
    """Ends attempts at the next poll with the codes of their runs, and leaves results for 0.

    Args:
        stop: signal that this process gets with every start; attempts end when they are stopped.
    """

    def __init__(self, codes=None, workers=1, stop=None):
        super().__init__(workers)
        self.codes, self.signal = codes or {}, stop
        self.attempts, self.stops, self.most = {}, [], 0

    def start(self, run, attempt):
        self._running[run] = attempt
        self.attempts.setdefault(name_of(run), []).append(attempt)
        self.most = max(self.most, len(self._running))
        if self.signal is not None:
            os.kill(os.getpid(), self.signal)

    def _exit_code(self, run):
        if self.signal is not None:
            return 143 if self.stops else None
        codes = self.codes.get(name_of(run), [])
        code = codes.pop(0) if codes else 0
        if code == 0:
            finish(run)
        return 0 if code == "no results" else code

    def stop(self, number):
        self.stops.append(number)

    @property
    def started(self):
        return list(self.attempts)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("tract_transfer.suite.execute.time.sleep", lambda seconds: None)


@pytest.fixture
def suite(tmp_path):
    return make_suite(tmp_path)


@pytest.fixture
def run(suite):
    """Execute a suite; return its launcher."""

    def run(codes=None, *, suite=suite, set_aside=False, **options):
        launcher = codes if isinstance(codes, Launcher) else Fake(codes, **options)
        screen = Screen(6, Console(file=(out := io.StringIO())))
        launcher.result = execute(suite, launcher, screen, set_aside=set_aside)
        launcher.output = out.getvalue()
        return launcher

    return run


def again(suite, retries=0):
    """The suite as the next process plans it."""
    config = suite.config.model_copy(update={"retries": retries})
    return Suite(config, suite.runs)


def states(suite):
    """The state of each job, which suite.json has too."""
    written = json.loads((suite.folder / "suite.json").read_text())["runs"]
    assert [run["state"] for run in written] == [job.state for job in suite.jobs]
    return {name_of(job.run): job.state for job in suite.jobs}


def test_suite_is_executed_in_order_and_then_skipped(suite, run):
    (suite.folder / ".suite.json.0123abcd.part").write_text("half")  # left by a kill
    launcher = run()
    assert launcher.result is None
    assert launcher.started == [name_of(job.run) for job in suite.jobs]
    assert set(states(suite).values()) == {"finished"}
    assert [job.attempts for job in suite.jobs] == [1] * 6
    assert all(job.config_sha256 for job in suite.jobs)
    files = {path.name for path in suite.folder.iterdir() if path.is_file()}
    assert files == {".lock", "suite.json"}
    launcher = run(suite=again(suite))
    assert launcher.started == []
    assert launcher.output.count("finished before") == 6


def test_attempt_gets_the_complete_config_in_a_file(suite, run):
    (attempt,) = run().attempts["vanilla/probe"]
    planned = suite.runs[2]
    file = suite.folder / "plan/vanilla-probe.yaml"
    command = ["-m", "tract_transfer.cli.train", "--config-file", str(file), "--resume"]
    assert attempt.command == [sys.executable, *command]
    assert yaml.safe_load(file.read_text()) == planned.config
    assert attempt.log == planned.folder / "console.txt"
    assert attempt.stop_file.read_text() == f"{attempt.session} 0"
    assert suite.jobs[2].begun_with == "w1"


def test_runs_start_when_there_is_room_and_their_backbone_is_finished(run):
    launcher = run(workers=9)
    assert launcher.started[:2] == ["vanilla/pretrain", "tract/pretrain"]
    assert launcher.most == 4


def test_failure_stops_only_the_runs_that_need_it(suite, run):
    launcher = run({"tract/pretrain": [1]})
    assert states(suite) == {
        "vanilla/pretrain": "finished", "tract/pretrain": "failed",
        "vanilla/probe": "finished", "vanilla/voc": "finished",
        "tract/probe": "blocked", "tract/voc": "blocked",
    }  # fmt: skip
    assert suite.jobs[-1].error == f"it needs {suite.runs[1].folder}, which failed"
    assert f"voc  tract  blocked: {suite.jobs[-1].error}" in launcher.output


@pytest.mark.parametrize(
    ("codes", "retries", "attempts", "error"),
    [
        ([1], 1, 2, None),
        ([1, 1], 1, 2, "exit code 1"),
        ([-9, -9], 1, 2, "(Killed), as when memory"),
        ([2], 3, 1, "exit code 2"),  # config or data must be changed first
        (["no results"], 0, 1, "exit code 0, but no results (new)"),
    ],
)
def test_failure_is_retried_unless_it_is_a_refusal(tmp_path, run, codes, retries, attempts, error):
    suite = make_suite(tmp_path, retries)
    launcher = run({"vanilla/pretrain": codes}, suite=suite)
    job = suite.jobs[0]
    assert len(launcher.attempts["vanilla/pretrain"]) == job.attempts == attempts
    assert job.state == ("failed" if error else "finished")
    assert (error or "") in str(job.error)
    assert ("failed, and is retried" in launcher.output) == (retries == 1)


def test_attempts_are_counted_since_the_folder_was_new(suite, run):
    for job in suite.jobs[:2]:
        job.attempts, job.spent = 3, 900.0
    cut_off(suite.runs[1])
    (suite.runs[1].folder / "results.json").write_text("{")
    run()
    assert [job.attempts for job in suite.jobs[:2]] == [1, 4]
    assert suite.jobs[0].seconds < 900 <= suite.jobs[1].seconds
    assert suite.jobs[1].last < 900
    assert suite.jobs[1].note.startswith("resumes from iter_0000005: results.json cannot be read")


def test_folders_of_other_runs_are_refused_or_set_aside(suite, run):
    finish(suite.runs[0])
    (suite.runs[0].folder / "config.yaml").write_text("seed: 5\n")
    launcher = Fake()
    with pytest.raises(ConfigError, match="contains another run: seed: 5 then, 0 now"):
        run(launcher)
    assert launcher.started == []
    assert run(set_aside=True).started[0] == "vanilla/pretrain"
    assert set(states(suite).values()) == {"finished"}
    moved = suite.folder / "set_aside/vanilla/pretrain/seed0_1"
    assert (moved / "config.yaml").read_text() == "seed: 5\n"


def test_finished_task_is_another_run_if_its_backbone_turns_out_different(suite, run):
    finish(suite.runs[2], sha256="w9")
    finish(suite.runs[3], sha256="w1")
    assert run().started == ["vanilla/pretrain", "tract/pretrain", "vanilla/voc", "tract/voc"]
    assert states(suite)["vanilla/probe"] == "failed"
    assert "its backbone has been retrained since. Use --set-aside" in suite.jobs[2].error
    assert run(suite=again(suite), set_aside=True).started == ["vanilla/probe"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_the_runs_and_leaves_the_rest_waiting(suite, run, number):
    before = signal.getsignal(number)
    launcher = run(stop=number)
    assert (launcher.result, launcher.stops) == (number, [number])
    assert signal.getsignal(number) is before
    assert set(states(suite).values()) == {"waiting"}
    assert suite.jobs[0].error is None
    assert run(suite=again(suite)).result is None


def test_second_signal_kills_the_runs(run):
    class Stubborn(Fake):
        def stop(self, number):
            if number == signal.SIGKILL:
                super().stop(number)
            else:
                os.kill(os.getpid(), signal.SIGINT)

    launcher = run(Stubborn(stop=signal.SIGTERM))
    assert launcher.result == signal.SIGTERM
    assert launcher.stops == [signal.SIGKILL]


def test_second_suite_learns_who_holds_the_folder(suite, run):
    with held(suite.folder) as pid, pytest.raises(FolderInUseError, match=f"process {pid} on"):
        run()


def test_run_of_a_killed_suite_is_awaited(suite, run, monkeypatch, caplog):
    """It holds the lock of its folder, and is not started beside itself."""
    suite.jobs[0].state = suite.jobs[1].state = "running"
    suite.write()
    suite.runs[0].folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack, caplog.at_level("INFO"):
        pid = stack.enter_context(held(suite.runs[0].folder))
        close = {0.2: stack.close}  # not before the other session has been noticed
        name = "tract_transfer.suite.execute.time.sleep"
        monkeypatch.setattr(name, lambda seconds: close.get(seconds, int)())
        launcher = run(suite=again(suite))
    assert len(launcher.started) == 6
    assert f"is in use by process {pid} " in caplog.text
    assert "waiting for it to end" in caplog.text


@pytest.mark.parametrize("cannot_be_written", ["suite.json", ".yaml"])
def test_full_disk_fails_only_runs_that_cannot_start(
    suite, run, monkeypatch, caplog, cannot_be_written
):
    replace = Path.replace

    def full(self, target):
        if str(target).endswith(cannot_be_written):
            raise OSError(28, "No space left on device", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    assert run().result is None
    states = [job.state for job in suite.jobs]
    if cannot_be_written == "suite.json":
        assert states == ["finished"] * 6
        assert "The suite's state cannot be written" in caplog.text
    else:
        assert states == ["failed"] * 2 + ["blocked"] * 4
        assert f"DiskFullError: No space left in {suite.folder}/plan: " in suite.jobs[0].error
