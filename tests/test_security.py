"""What a run does not give away, load or open."""

import re
import sys
from pathlib import Path

import pytest

from tract_transfer.engine.environment import Inputs, environment

PACKAGE = sorted(Path("tract_transfer").rglob("*.py")) + sorted(Path("tools").glob("*.py"))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["hub.token=abc"], "hub.token=***"),
        (["--api-key", "abc", "solver.lr=1"], "--api-key *** solver.lr=1"),
        (["db_password", "abc"], "db_password ***"),
        (["data.path=https://me:abc@host/x"], "data.path=https://***@host/x"),
        (["data.label_column=token", "solver.lr=1"], "data.label_column=token solver.lr=1"),
    ],
)
def test_no_secret_of_the_command_line_is_stored(words, shown, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    assert environment(Inputs({}))["command"] == f"x.py {shown}"


@pytest.mark.parametrize("file", PACKAGE, ids=str)
def test_nothing_trusts_remote_code_or_listens(file):
    found = re.findall(r"trust_remote_code|\.listen\(|HTTPServer|socketserver", file.read_text())
    assert not found
