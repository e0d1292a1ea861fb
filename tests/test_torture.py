"""The short form of `make torture`: a few kills of every kind of run."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "support/torture.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "tasks"),
    [
        (2, ["classification-2", "probe-0", "detection-0"]),
        (1, ["classification-group", "suite"]),
    ],
    ids=["one process", "several"],
)
def test_killed_runs_resume_to_the_same_bits(kills, tasks):
    command = [sys.executable, SCRIPT, "--kills", str(kills), "--tasks", *tasks]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert {line.split()[0] for line in lines} == set(tasks)
    assert all(f" {kills} SIGKILLs " in line and "equal to the bit" in line for line in lines)
