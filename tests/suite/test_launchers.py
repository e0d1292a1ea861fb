"""Attempts as processes of this machine: who may start, what each is given, how each ends."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
from attempts import COUNTS, ENDS, run_of, wait, wait_for

from tract_transfer.suite import launchers as attempts
from tract_transfer.suite.launchers import (
    Attempt,
    LocalLauncher,
    find_gpus,
    find_launcher,
    this_machine,
)


def make(workers=1, cores=4, gpus=(), memory_gb=8.0):
    return LocalLauncher(workers, cores=cores, gpus=gpus, memory_gb=memory_gb)


@pytest.fixture
def attempt(tmp_path):
    """Make an attempt that runs some Python; what it prints goes to console.txt."""

    def build(script="pass"):
        command = [sys.executable, "-S", "-c", script]
        return Attempt(command, tmp_path / "console.txt", {}, tmp_path / "stop")

    return build


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"cpus": 5}, r"resources\.cpus: voc asks for 5, and this machine has 4"),
        ({"gpus": 1}, r"resources\.gpus: voc asks for 1, and this machine has 0"),
        ({"memory_gb": 9}, r"resources\.memory_gb: voc asks for 9, and this machine has 8"),
    ],
)
def test_what_the_machine_lacks_is_refused_before_anything_runs(resources, says):
    make().check([run_of(cpus=4, memory_gb=8.0)])
    with pytest.raises(ValueError, match=says):
        make().check([run_of(), run_of(**resources)])


@pytest.mark.parametrize(
    ("launcher", "first", "second", "fits"),
    [
        (make(workers=2), {}, {}, True),
        (make(workers=1), {}, {}, False),
        (make(workers=2), {"cpus": 3}, {"cpus": 1}, True),
        (make(workers=2), {"cpus": 3}, {"cpus": 2}, False),
        (make(workers=2), {"memory_gb": 5}, {"memory_gb": 3}, True),
        (make(workers=2), {"memory_gb": 5}, {"memory_gb": 4}, False),
        (make(workers=2, gpus=("0",)), {"gpus": 0.5}, {"gpus": 0.5}, True),
        (make(workers=2, gpus=("0",)), {"gpus": 0.5}, {"gpus": 0.6}, False),
        (make(workers=2, gpus=("0",)), {}, {}, False),  # one each, where there are any
        (make(workers=2, gpus=("0",)), {}, {"gpus": 0}, True),
    ],
)
def test_a_run_waits_for_what_it_asks_for(launcher, first, second, fits, attempt):
    one, two = run_of("one", **first), run_of("two", **second)
    assert launcher.has_room(one)
    launcher.start(one, attempt())
    assert launcher.has_room(two) is fits
    assert wait(launcher) == [(one, 0)]
    assert launcher.has_room(two)


def test_gpus_are_given_back(attempt):
    launcher = make(workers=2, gpus=("4", "7"))
    script = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    for gpus in (2, 2, 1, 0):
        launcher.start(run_of(gpus=gpus), attempt(script))
        wait(launcher)
    log = attempt().log.read_text()
    assert log.splitlines() == ["4,7", "4,7", "4", ""]


def test_a_worker_has_its_share_of_the_cores(attempt, monkeypatch):
    script = "import os; print(os.environ['OMP_NUM_THREADS'])"
    launcher = make(workers=2)
    for told in (None, "1", "9"):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if told:
            monkeypatch.setenv("OMP_NUM_THREADS", told)
        launcher.start(run_of(), attempt(script))
        wait(launcher)
    launcher.start(run_of(cpus=3), attempt(script))
    wait(launcher)
    assert attempt().log.read_text().split() == ["2", "1", "2", "3"]


@pytest.mark.parametrize(
    ("script", "code"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)]
)
def test_an_end_is_told_once(attempt, script, code):
    launcher, run = make(), run_of()
    launcher.start(run, attempt(script))
    assert wait(launcher) == [(run, code)]
    assert launcher.ended() == []


def test_a_stop_lets_a_run_end_by_itself_and_a_kill_does_not(attempt):
    launcher, run = make(), run_of()
    for number, code in ((signal.SIGTERM, 7), (signal.SIGKILL, -9)):
        attempt().log.unlink(missing_ok=True)
        launcher.start(run, attempt(ENDS))
        wait_for("ready", attempt().log)
        launcher.stop(number)
        assert wait(launcher) == [(run, code)]


def test_what_a_failed_run_has_started_ends_with_it(attempt):
    """A data worker, say, that nobody would end."""
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print(child.pid, flush=True)\n"
        "sys.exit(1)"
    )
    launcher = make()
    launcher.start(run_of(), attempt(script))
    wait(launcher)
    child = int(attempt().log.read_text())
    end = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)


def end_leftovers(handles):
    """As a suite does that comes after a killed one."""
    launcher = make()
    launcher.ask_leftovers(handles)
    launcher.end_leftovers(handles)


def test_leftovers_are_let_end_and_others_are_left_alone(attempt):
    killed = make()
    handle = killed.start(run_of(), attempt(ENDS))
    assert find_launcher(handle) == LocalLauncher.name
    wait_for("ready", attempt().log)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        # The same number, but of a process that began at another time.
        reused = {"pid": bystander.pid, "started": psutil.Process(bystander.pid).create_time() - 9}
        end_leftovers([handle, reused, {"pid": 2**22 + 1, "started": 0.0}, {}])
        assert wait(killed)[0][1] == 7
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("asked", [False, True])
def test_a_leftover_that_ends_already_is_sent_no_second_signal(attempt, asked):
    """Which would end it before its checkpoint is written."""
    killed = make()
    handle = killed.start(run_of(), attempt(COUNTS))
    wait_for("ready", attempt().log)
    if asked:
        killed.stop(signal.SIGTERM)
        wait_for("ending", attempt().log)
        handle["asked"] = int(signal.SIGTERM)
    end_leftovers([handle])
    assert wait(killed)[0][1] == 21


def test_a_leftover_has_its_time_and_is_then_killed(attempt, monkeypatch, caplog):
    assert attempts.ENDING_SECONDS >= 300, "a checkpoint on a slow disk"
    monkeypatch.setattr(attempts, "ENDING_SECONDS", 0.3)
    killed = make()
    handle = killed.start(run_of(), attempt(COUNTS.replace("0.5", "60")))
    wait_for("ready", attempt().log)
    with caplog.at_level("INFO"):
        end_leftovers([handle])
    assert wait(killed)[0][1] == -9
    said = [record.message for record in caplog.records]
    assert said[0].startswith("Still at work for the suite that was here before: 1. Each writes")
    assert said[1].startswith(f"Process {handle['pid']} did not end: it is killed")


def test_gpus_are_those_that_are_visible():
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "0, GPU-5f,"}) == ["0", "GPU-5f"]
    assert (
        find_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == find_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    )


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    launcher = this_machine(5)
    assert launcher.workers == 5
    assert 1 <= launcher.cores <= psutil.cpu_count()
    assert launcher.memory_gb == pytest.approx(psutil.virtual_memory().total / 2**30)
    launcher.check([run_of(gpus=1)])
