"""Attempts as jobs of submitit, on this machine in place of Slurm."""

import shutil
import sys
import time
from pathlib import Path

import pytest

from tract_transfer.suite.attempt import Attempt
from tract_transfer.suite.launch_slurm import SlurmLauncher
from tract_transfer.suite.plan import PlannedRun, Resources

pytest.importorskip("submitit")


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


def test_what_slurm_cannot_give_is_refused_first(tmp_path):
    launcher = SlurmLauncher(tmp_path, 1, cluster="local")
    launcher.check([run_of(hours=1)])
    with pytest.raises(ValueError, match=r"resources\.hours: voc has none"):
        launcher.check([run_of()])
    with pytest.raises(ValueError, match=r"resources\.gpus: voc asks for 0\.5"):
        launcher.check([run_of(hours=1, gpus=0.5)])


def test_a_machine_without_slurm_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no sbatch"):
        SlurmLauncher(tmp_path, 1)
