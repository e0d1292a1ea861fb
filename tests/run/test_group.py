"""A group that loses a process ends with the reason and resumes from its checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from run_folders import assert_same_run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    # Otherwise a restarted group may read the rendezvous of the group before it.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
WORDS = ("solver.max_iters=24", "engine.checkpoint.every_iters=2", "engine.log.every_iters=1")


def start(config, folder, *options):
    """Start two processes by torchrun, resuming; return the launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    tool = [str(ROOT / "tools/train_net.py"), "--config-file", str(config), "--resume"]
    return subprocess.Popen(
        [*launcher, *options, *tool, f"output_dir={folder}", *WORDS],
        env={**os.environ, **ENVIRONMENT},
        stderr=subprocess.PIPE,
        text=True,
    )


def process_of(launcher, rank):
    """Return the launcher's process of a rank."""
    for child in psutil.Process(launcher.pid).children():
        if child.environ().get("RANK") == str(rank):
            return child
    raise LookupError(f"no process of rank {rank}")


def wait_for_checkpoint(folder, launcher):
    while not any(folder.glob("checkpoints/iter_*")):
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.01)


@pytest.mark.slow
def test_a_group_that_loses_a_process_ends_and_resumes(tmp_path, write_tiny):
    config, folder = write_tiny(tmp_path), tmp_path / "killed"
    launcher = start(config, folder, "--max-restarts=1")
    wait_for_checkpoint(folder, launcher)
    owner = json.loads((folder / ".lock").read_text())
    assert owner["pid"] == process_of(launcher, 0).pid
    process_of(launcher, 1).send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    log = folder / "log.txt"
    while "Resumed from" not in log.read_text() and launcher.poll() is None:
        time.sleep(0.01)
    assert time.monotonic() - killed_at < 60  # ended and restarted
    _, errors = launcher.communicate()
    assert launcher.returncode == 0, errors
    # The other process sees either the lost connection or the launcher's signal first.
    reasons = (
        "Process 0 ends because another of the 2 processes of the group has ended",
        "SIGTERM: ",
    )
    assert any(reason in errors for reason in reasons), errors
    assert "--resume" in errors
    assert f"was held by process {owner['pid']}" not in log.read_text()  # it released the folder
    whole = start(config, tmp_path / "whole")
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    assert_same_run(tmp_path / "whole", folder)
