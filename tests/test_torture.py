"""The short form of `make torture`: a few kills of every kind of run."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "support/torture.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal", "tasks"),
    [
        ("KILL", ("classification-2", "probe-0", "detection-0")),
        ("KILL", ("classification-group", "suite")),
        ("TERM", ("classification-group",)),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_killed_runs_resume_to_the_same_bits(signal, tasks):
    command = [sys.executable, SCRIPT, "--kills", "2", "--signal", signal, "--tasks", *tasks]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert {line.split()[0] for line in lines} == set(tasks)
    assert all(f" 2 SIG{signal}s " in line and "equal to the bit" in line for line in lines)
