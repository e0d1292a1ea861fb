"""Attempts as jobs of submitit, on this machine instead of Slurm."""

import contextlib
import os
import shutil
import signal
import time

import psutil
import pytest
from suites import attempt_in, run_of, wait, wait_for

from tract_transfer.suite import launchers
from tract_transfer.suite.launchers import SlurmLauncher

pytest.importorskip("submitit")

# Ends by SIGTERM as a run does, and resumes from what it left then.
RUN = """
import os, signal, sys, time
if os.path.exists("checkpoint"):
    print("resumed", flush=True)
    sys.exit(0)
def end(*_):
    open("checkpoint", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return SlurmLauncher(tmp_path / "slurm", 1, cluster="local")


@pytest.mark.parametrize("code", [0, 3])
def test_job_returns_its_exit_code_and_writes_its_log(launcher, tmp_path, code):
    run = run_of(hours=0.1)
    script = f"import os; print('threads', os.environ['OMP_NUM_THREADS']); raise SystemExit({code})"
    launcher.start(run, attempt_in(tmp_path, script))
    assert not launcher.has_room(run)
    assert wait(launcher) == [(run, code)]
    assert launcher.has_room(run)
    assert (tmp_path / "console.txt").read_text().strip() == "threads 1"


def test_runs_that_slurm_cannot_take_are_refused(launcher, refused):
    launcher.check([run_of(hours=1)])
    with refused("a Slurm run without hours", ValueError, match=r"resources\.hours: voc has none"):
        launcher.check([run_of()])
    with refused("half a GPU on Slurm", ValueError, match=r"resources\.gpus: voc needs 0\.5"):
        launcher.check([run_of(hours=1, gpus=0.5)])


def test_machine_without_slurm_is_refused(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with refused("--launcher slurm without Slurm", ValueError, match="no sbatch"):
        SlurmLauncher(tmp_path, 1)


@pytest.fixture
def begun(launcher, tmp_path):
    """A run that is running, and its handle."""
    run, attempt = run_of(hours=0.1), attempt_in(tmp_path, RUN)
    handle = launcher.start(run, attempt)
    wait_for("ready", attempt.log)
    yield run, handle
    for process in processes_in(tmp_path):
        process.kill()


def processes_in(folder):
    """Return the runs that are running in a folder."""
    running = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if RUN in process.cmdline() and process.cwd() == str(folder):
                running.append(process)
    return running


def test_stop_lets_a_job_write_its_checkpoint(launcher, begun, tmp_path):
    launcher.stop(signal.SIGTERM)
    assert wait(launcher) == [(begun[0], 143)]
    assert (tmp_path / "checkpoint").exists()


def test_kill_ends_a_job_and_its_run(launcher, begun, tmp_path, monkeypatch):
    """submitit gives a lost result 15 seconds to appear."""
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0.1)
    launcher.stop(signal.SIGKILL)
    assert wait(launcher) == [(begun[0], -9)]
    end = time.monotonic() + 60
    while processes_in(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_preempted_job_is_queued_again_and_resumes(launcher, begun, tmp_path):
    run, handle = begun
    for task in psutil.Process(int(handle["job"])).children():
        task.send_signal(signal.SIGUSR2)  # as Slurm does
    assert wait(launcher) == [(run, 0)]
    assert (tmp_path / "console.txt").read_text().split() == ["ready", "resumed"]


def test_job_of_a_killed_suite_ends_before_the_next_suite_starts(begun, tmp_path):
    later = SlurmLauncher(tmp_path / "slurm", 1, cluster="local")
    later.end_jobs({"run": begun[1]})
    assert (tmp_path / "checkpoint").exists()
    assert not processes_in(tmp_path)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands in place of Slurm's, which write down their arguments."""
    (tmp_path / "bin").mkdir()

    def command(name, script):
        file = tmp_path / "bin" / name
        file.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n{script}\n')
        file.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    command("sbatch", "echo 'error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1")
    command("srun", "")
    command("scancel", "")
    command("sacct", "exit 1")  # reports no job
    return SlurmLauncher(tmp_path / "slurm", None)


def cancelled(folder):
    lines = (folder / "called").read_text().splitlines()
    return [line for line in lines if line.startswith("scancel")]


def test_job_that_slurm_refuses_is_a_failure_of_its_run(slurm, tmp_path):
    with pytest.raises(OSError, match=r"seed 0  voc.*QOSMaxSubmitJobPerUserLimit.* workers"):
        slurm.start(run_of(hours=1), attempt_in(tmp_path))


def test_leftover_job_is_cancelled_only_while_it_is_queued(slurm, tmp_path, monkeypatch):
    """It may be writing its checkpoint; Slurm knows whether it is still queued."""
    result = tmp_path / "slurm/7_0_result.pkl"
    (tmp_path / "slurm").mkdir()
    monkeypatch.setattr(launchers.time, "sleep", lambda seconds: result.touch())
    slurm.end_jobs({"run": {"job": "7", "stop_file": str(tmp_path / "plan/a.stop")}})
    assert (tmp_path / "plan/a.stop").read_text() == "15"
    assert cancelled(tmp_path) == ["scancel --state=PENDING 7"]


def test_leftover_job_that_does_not_end_is_cancelled(slurm, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(launchers, "ENDING_SECONDS", 0.1)
    monkeypatch.setattr(launchers, "_CANCEL_SECONDS", 0.1)
    slurm.end_jobs({"run": {"job": "7", "stop_file": str(tmp_path / "plan/a.stop")}})
    assert cancelled(tmp_path) == ["scancel --state=PENDING 7", "scancel 7"]
    assert "Job 7 did not end and is cancelled" in caplog.text
