"""What a killed suite has left at work, and who comes after it."""

import json
import signal
import subprocess
import sys

import psutil
import pytest

from tract_transfer.suite import launchers
from tract_transfer.suite.cluster import RayLauncher, SlurmLauncher
from tract_transfer.suite.execute import end_leftovers
from tract_transfer.suite.journal import SuiteLock
from tract_transfer.suite.launchers import LocalLauncher, find_launcher, this_machine

RUNS = ("output/suite/vanilla/voc/seed0", "output/suite/tract/voc/seed0")
JOB = {"job": "7", "stop_file": "plan/a.stop"}
COUNTS = """
import signal, sys
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
print("ready", flush=True)
sys.stdin.read()
sys.exit(20 + len(signals))
"""


@pytest.fixture
def leftover():
    """A process that counts its SIGTERMs and ends with its stdin, and the handle of it."""
    command = [sys.executable, "-S", "-c", COUNTS]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
    assert process.stdout.readline() == b"ready\n"
    yield process, {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def leave(folder, *handles):
    """Write down handles as a suite does that is killed then."""
    jobs = dict(zip(RUNS, handles, strict=False))
    owner = {"pid": 1, "host": "h", "since": "s", "jobs": jobs}
    (folder / ".owner.json").write_text(json.dumps(owner))


def told(folder):
    return json.loads((folder / ".owner.json").read_text())["jobs"]


def come_after(folder, launcher):
    lock = SuiteLock(folder)
    left = lock.acquire()
    try:
        end_leftovers(launcher, lock, left)
    finally:
        lock.release()


def test_who_is_interrupted_while_they_end_has_them_sent_no_second_signal(
    tmp_path, leftover, monkeypatch
):
    """Which would end them before their checkpoints are written."""
    process, handle = leftover
    leave(tmp_path, handle)

    def interrupted(left, *_):
        assert [each["pid"] for each in left] == [process.pid]
        raise KeyboardInterrupt

    monkeypatch.setattr(launchers, "wait_for_leftovers", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            come_after(tmp_path, this_machine(1))
        assert told(tmp_path) == {RUNS[0]: {**handle, "asked": signal.SIGTERM}}
    process.stdin.close()
    assert process.wait(60) == 21


def test_who_is_interrupted_while_they_are_asked_leaves_word_of_those_that_were(tmp_path):
    class Interrupted:
        name = "local"

        def ask_leftovers(self, handles):
            handles[0]["asked"] = signal.SIGTERM
            raise KeyboardInterrupt

    leave(tmp_path, {"pid": 7})
    with pytest.raises(KeyboardInterrupt):
        come_after(tmp_path, Interrupted())
    assert told(tmp_path) == {RUNS[0]: {"pid": 7, "asked": signal.SIGTERM}}


class Noted:
    """Notes what it is to end."""

    def __init__(self, name):
        self.name, self.asked, self.ended = name, None, None

    def ask_leftovers(self, handles):
        self.asked = handles

    def end_leftovers(self, handles):
        self.ended = handles


def test_jobs_of_slurm_are_not_forgotten_by_another_launcher(tmp_path, refused):
    """They would go on beside the same runs, started again."""
    leave(tmp_path, JOB, JOB)
    for name in (RayLauncher.name, LocalLauncher.name):
        launcher = Noted(name)
        told_how = r"seed0 and 1 more: .* Use --launcher slurm: "
        with refused("leftovers of another launcher", FileExistsError, match=told_how):
            come_after(tmp_path, launcher)
        assert launcher.asked is None
        assert told(tmp_path) == dict.fromkeys(RUNS, JOB)
    launcher = Noted(SlurmLauncher.name)
    come_after(tmp_path, launcher)
    assert launcher.asked == launcher.ended == [JOB, JOB]
    assert not (tmp_path / ".owner.json").exists()


def test_processes_are_not_forgotten_by_another_launcher_while_they_live(tmp_path, leftover):
    process, handle = leftover
    leave(tmp_path, handle)
    with pytest.raises(FileExistsError, match=r"seed0: started by --launcher local, "):
        come_after(tmp_path, Noted("slurm"))
    assert told(tmp_path) == {RUNS[0]: handle}
    process.kill()
    process.wait()
    come_after(tmp_path, Noted("slurm"))
    assert not (tmp_path / ".owner.json").exists()


def test_what_ray_or_a_broken_note_leaves_is_of_nobody():
    assert find_launcher({}) is find_launcher({"pid": "x", "started": None}) is None
