"""Secrets are not written, and nothing executes, unpacks or serves untrusted input."""

import re
from pathlib import Path

import pytest

from tract_transfer.files import redact, without_secrets

SOURCES = sorted(Path("tract_transfer").rglob("*.py")) + sorted(Path("tools").glob("*.py"))
FORBIDDEN = re.compile(
    r"trust_remote_code|weights_only=False|\bpickle\.loads?\(|yaml\.(?:unsafe|full)_load|"  # code
    r"(?<![.\w])(?:eval|exec)\(|os\.system|shell=True|"  # text
    r"zipfile|tarfile|unpack_archive|extractall|"  # archives
    r"\.listen\(|HTTPServer|socketserver|verify=False"  # networks
)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--api-key", "abc", "solver.lr=1"], "--api-key *** solver.lr=1"),
        (["db_password", "abc"], "db_password ***"),
        (["--credentials", "abc", "apiKey=abc"], "--credentials *** apiKey=***"),
        (["data.label_column=token", "solver.lr=1"], "data.label_column=token solver.lr=1"),
        (["--key", "7", "data.path=/sets/hunter2-hunter2/x"], "--key 7 data.path=/sets/***/x"),
    ],
)  # fmt: skip
def test_secrets_of_a_command_line_are_redacted(words, shown, monkeypatch):
    monkeypatch.setenv("DATABASE_PASSWORD", "hunter2-hunter2")
    assert " ".join(without_secrets(["x.py", *words])) == f"x.py {shown}"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("hub.token=abc --token: abc", "hub.token=*** --token: ***"),
        ("GITHUB_TOKEN=abc, AWS_SECRET_ACCESS_KEY=abc",
         "GITHUB_TOKEN=***, AWS_SECRET_ACCESS_KEY=***"),
        ("{token: abc, d: 2, 'key': \"abc\"}", "{token: ***, d: 2, 'key': \"***\"}"),
        ('{"token": "abc"}', '{"token": "***"}'),
        ("https://host/x?token=abc&size=3", "https://host/x?token=***&size=3"),
        ("https://me:word@host", "https://***@host"),
        (f"The key: see hf_{'a' * 34}.yaml", "The key: *** ***.yaml"),
        ("auth: Bearer abc, auth: Basic YWJj", "auth: ***, auth: ***"),
        ("the password: swordfish", "the password: ***"),
        ("api_key: abc, my.credential=abc", "api_key: ***, my.credential=***"),
    ],
)  # fmt: skip
def test_secrets_in_texts_are_redacted(text, redacted):
    assert redact(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "patch tokens: 196", "Note: something", "auth: null", "monkey: x1", "s3://bucket/a:b",
        "args={class_token: true, num_key: 3} solver.lr=1e-3", "Secrets: which? (all)",
    ],
)  # fmt: skip
def test_other_texts_are_not_redacted(text):
    assert redact(text) == text


def test_nested_values_are_redacted():
    content = {"args": [{"token": "abc", "depth": 2}, "key=abc"], "key": 0.5, "names": ("a", None)}
    assert redact(content) == {
        "args": [{"token": "***", "depth": 2}, "key=***"], "key": 0.5, "names": ["a", None],
    }  # fmt: skip


def test_nothing_runs_untrusted_code_unpacks_archives_or_opens_a_server():
    found = {str(file): FORBIDDEN.findall(file.read_text()) for file in SOURCES}
    assert len(found) > 50
    assert {file: words for file, words in found.items() if words} == {}
