"""The short form of `make torture`: a few kills of every kind of run."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "tasks",
    [("classification-2", "probe-0", "detection-0"), ("classification-group", "suite")],
    ids=" ".join,
)
def test_runs_killed_anywhere_go_on_to_the_same_bits(tasks):
    command = [sys.executable, str(HERE / "torture.py"), "--kills", "2", "--tasks", *tasks]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert {line.split()[0] for line in lines} == set(tasks)
    assert all(" 2 kills " in line and "equal to the bit" in line for line in lines)
