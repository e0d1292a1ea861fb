"""Two runs in one folder: the second is refused; the lock of a dead process is replaced."""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tract_transfer.engine.run_folder import FolderInUseError, lock_folder

HOLD = """
import os, sys, time
from pathlib import Path
from tract_transfer.engine.run_folder import lock_folder
with lock_folder(Path(sys.argv[1])):
    if os.fork() == 0:  # as a data worker
        print("held", flush=True)
        time.sleep(3)
        os._exit(0)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder and has a child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def owner_of(folder):
    return json.loads((folder / ".lock").read_text() or "{}")


def write_owner(folder, **changed):
    with lock_folder(folder):
        owner = owner_of(folder)
    (folder / ".lock").write_text(json.dumps({**owner, **changed}))


def test_second_run_is_refused_and_the_owner_named(tmp_path, holder, refused):
    refusal = refused("a second run in the same folder", FolderInUseError)
    with refusal as caught, lock_folder(tmp_path):
        pass
    message = str(caught.value)
    assert f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}" in message
    assert f"since {time.strftime('%Y-', time.gmtime())}" in message
    assert "Wait for it or end it, or set another output_dir." in message
    assert owner_of(tmp_path)["pid"] == holder.pid


def test_lock_of_a_killed_process_is_free_while_its_workers_live(tmp_path, holder, caplog):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert owner_of(tmp_path)["pid"] == holder.pid
    with caplog.at_level(logging.INFO, "tract_transfer"), lock_folder(tmp_path):
        assert owner_of(tmp_path)["pid"] == os.getpid()
    assert f"was held by process {holder.pid}" in caplog.text
    assert "which has ended" in caplog.text


def test_lock_is_released_after_any_exception(tmp_path):
    for end in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(end), lock_folder(tmp_path):
            raise end
        assert owner_of(tmp_path) == {}
    with lock_folder(tmp_path):
        pass


def test_owner_on_another_host_is_refused(tmp_path, refused):
    write_owner(tmp_path, host="node17", pid=7)
    refusal = refused("a run folder that another host holds", FolderInUseError)
    with refusal as caught, lock_folder(tmp_path):
        pass
    message = str(caught.value)
    assert "is held by process 7 on node17" in message
    assert f"If it does not, remove {tmp_path}/.lock and start again" in message
    (tmp_path / ".lock").unlink()
    with lock_folder(tmp_path):
        pass


def test_a_reused_process_id_is_another_process(tmp_path):
    write_owner(tmp_path, started=12345.0)  # this process id, but of an earlier process
    with lock_folder(tmp_path):
        assert owner_of(tmp_path)["started"] > 12345.0


@pytest.mark.parametrize("text", ["{", "[1]", "", '{"host": 3}'])
def test_a_truncated_lock_file_names_no_owner(tmp_path, text):
    (tmp_path / ".lock").write_text(text.replace("3", json.dumps(socket.gethostname())))
    with lock_folder(tmp_path):
        assert owner_of(tmp_path)["pid"] == os.getpid()


def test_without_kernel_locks_the_lock_file_decides(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    refused = pytest.raises(FolderInUseError, match="in use by process")
    with lock_folder(tmp_path), refused, lock_folder(tmp_path):
        pass
    assert "no file locks" in caplog.text
    with lock_folder(tmp_path):
        pass
