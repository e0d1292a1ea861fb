"""What a killed suite has left at work, and who comes after it."""

import json
import signal
import subprocess
import sys

import psutil
import pytest

from tract_transfer.suite import launchers
from tract_transfer.suite.journal import SuiteLock
from tract_transfer.suite.launchers import this_machine
from tract_transfer.suite.leftovers import end_leftovers

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


def leave(folder, handle):
    """Write down a handle as a suite does that is killed then."""
    owner = {"pid": 1, "host": "h", "since": "s", "jobs": {"a": handle}}
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
        assert told(tmp_path) == {"a": {**handle, "asked": signal.SIGTERM}}
    process.stdin.close()
    assert process.wait(60) == 21


def test_who_is_interrupted_while_they_are_asked_leaves_word_of_those_that_were(tmp_path):
    class Interrupted:
        def ask_leftovers(self, handles):
            handles[0]["asked"] = signal.SIGTERM
            raise KeyboardInterrupt

    leave(tmp_path, {"pid": 7})
    with pytest.raises(KeyboardInterrupt):
        come_after(tmp_path, Interrupted())
    assert told(tmp_path) == {"a": {"pid": 7, "asked": signal.SIGTERM}}
