"""Attempts as jobs of submitit, on this machine in place of Slurm."""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tract_transfer.suite import cluster as launch_slurm
from tract_transfer.suite import launchers as attempt_module
from tract_transfer.suite.cluster import SlurmLauncher
from tract_transfer.suite.launchers import Attempt, find_launcher
from tract_transfer.suite.plan import PlannedRun, Resources

pytest.importorskip("submitit")

# Ends by SIGTERM as a run does, and goes on from what it left then.
RUN = """
import os, signal, sys, time
if os.path.exists("checkpoint"):
    print("went on", flush=True)
    sys.exit(0)
def end(*_):
    open("checkpoint", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


def run_of(**resources):
    return PlannedRun("a", "vanilla", "voc", 0, {}, Path("a"), resources=Resources(**resources))


def wait(launcher, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done := launcher.ended():
            return done
        time.sleep(0.1)
    raise AssertionError("the job did not end")


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_says_how_it_ended_and_leaves_its_log(tmp_path, code):
    launcher = SlurmLauncher(tmp_path / "slurm", 1, cluster="local")
    run = run_of(hours=0.1)
    script = f"import os; print('threads', os.environ['OMP_NUM_THREADS']); raise SystemExit({code})"
    log = tmp_path / "console.txt"
    attempt = Attempt([sys.executable, "-c", script], log, {}, tmp_path / "stop")
    launcher.start(run, attempt)
    assert not launcher.has_room(run)
    assert wait(launcher) == [(run, code)]
    assert launcher.has_room(run)
    assert log.read_text().strip() == "threads 1"


def test_what_slurm_cannot_give_is_refused_first(tmp_path, refused):
    launcher = SlurmLauncher(tmp_path, 1, cluster="local")
    launcher.check([run_of(hours=1)])
    with refused("a Slurm run without hours", ValueError, match=r"resources\.hours: voc has none"):
        launcher.check([run_of()])
    with refused("half a GPU on Slurm", ValueError, match=r"resources\.gpus: voc asks for 0\.5"):
        launcher.check([run_of(hours=1, gpus=0.5)])


def test_a_machine_without_slurm_is_told(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with refused("--launcher slurm without Slurm", ValueError, match="no sbatch"):
        SlurmLauncher(tmp_path, 1)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A launcher with a run under way, the run, its handle and its log."""
    launcher = SlurmLauncher(tmp_path / "slurm", 1, cluster="local")
    log, run = tmp_path / "console.txt", run_of(hours=0.1)
    monkeypatch.chdir(tmp_path)
    attempt = Attempt([sys.executable, "-S", "-c", RUN], log, {}, tmp_path / "stop")
    handle = launcher.start(run, attempt)
    end = time.monotonic() + 60
    while not log.exists() or "ready" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    yield launcher, run, handle, log
    for process in processes_in(tmp_path):
        process.kill()


def processes_in(folder):
    """The runs that are at work in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if RUN in process.cmdline() and process.cwd() == str(folder):
                found.append(process)
    return found


def test_a_stop_lets_a_job_write_its_checkpoint(begun, tmp_path):
    launcher, run, _, _ = begun
    launcher.stop(signal.SIGTERM)
    assert wait(launcher) == [(run, 143)]
    assert (tmp_path / "checkpoint").exists()


@pytest.mark.slow  # submitit gives a lost result 15 seconds to show
def test_a_kill_takes_the_job_and_its_run(begun, tmp_path):
    launcher, run, _, _ = begun
    launcher.stop(signal.SIGKILL)
    assert wait(launcher) == [(run, -9)]
    end = time.monotonic() + 60
    while processes_in(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_job_that_is_preempted_queues_again_and_goes_on(begun, tmp_path):
    launcher, run, handle, log = begun
    for task in psutil.Process(int(handle["job"])).children():
        task.send_signal(signal.SIGUSR2)  # as Slurm does
    assert wait(launcher) == [(run, 0)]
    assert log.read_text().split("\n") == ["ready", "went on", ""]


def test_the_job_of_a_suite_that_was_killed_ends_before_the_next_begins(begun, tmp_path):
    _, _, handle, _ = begun
    assert find_launcher(handle) == SlurmLauncher.name
    later = SlurmLauncher(tmp_path / "slurm", 1, cluster="local")
    later.ask_leftovers([handle, {}])
    later.end_leftovers([handle, {}])
    assert handle["asked"] == signal.SIGTERM
    assert (tmp_path / "checkpoint").exists()
    assert not processes_in(tmp_path)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands in Slurm's place, which write down how they are called."""
    (tmp_path / "bin").mkdir()

    def command(name, script):
        file = tmp_path / "bin" / name
        file.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n{script}\n')
        file.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    command("sbatch", "echo 'error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1")
    command("srun", "")
    command("scancel", "")
    command("sacct", "exit 1")  # nobody knows anything
    return SlurmLauncher(tmp_path / "slurm", None)


def test_what_slurm_does_not_take_is_that_run_s_failure(slurm, tmp_path):
    attempt = Attempt(["true"], tmp_path / "log", {}, tmp_path / "stop")
    with pytest.raises(OSError, match=r"voc.*QOSMaxSubmitJobPerUserLimit.* workers") as caught:
        slurm.start(run_of(hours=1), attempt)
    assert "seed 0" in str(caught.value)


def test_a_job_of_which_nothing_is_known_is_not_cancelled_while_it_may_run(
    slurm, tmp_path, monkeypatch
):
    """It may be writing its checkpoint; Slurm itself knows whether it still queues."""
    called = tmp_path / "called"
    result = tmp_path / "slurm/7_0_result.pkl"
    (tmp_path / "slurm").mkdir()

    def later(seconds):
        assert "scancel" in called.read_text()
        result.touch()

    monkeypatch.setattr(attempt_module.time, "sleep", later)
    handles = [{"job": "7", "stop_file": str(tmp_path / "plan/a.stop")}]
    slurm.ask_leftovers(handles)
    slurm.end_leftovers(handles)
    assert (tmp_path / "plan/a.stop").read_text() == "15"
    cancelled = [line for line in called.read_text().splitlines() if line.startswith("scancel")]
    assert cancelled == ["scancel --state=PENDING 7"]


def test_a_job_that_does_not_end_is_cancelled_in_the_end(slurm, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(attempt_module, "ENDING_SECONDS", 0.2)
    monkeypatch.setattr(launch_slurm, "_CANCEL_SECONDS", 0.2)
    handles = [{"job": "7", "stop_file": str(tmp_path / "plan/a.stop")}]
    slurm.ask_leftovers(handles)
    slurm.end_leftovers(handles)
    lines = (tmp_path / "called").read_text().splitlines()
    cancelled = [line for line in lines if line.startswith("scancel")]
    assert cancelled == ["scancel --state=PENDING 7", "scancel 7"]
    assert "Job 7 did not end: it is cancelled" in caplog.text
