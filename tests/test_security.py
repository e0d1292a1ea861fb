"""What a run does not give away, load or open."""

import re
import sys
from pathlib import Path

import pytest

from tract_transfer.engine.run_folder import environment
from tract_transfer.files import has_secret

PACKAGE = sorted(Path("tract_transfer").rglob("*.py")) + sorted(Path("tools").glob("*.py"))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["hub.token=abc"], "hub.token=***"),
        (["--api-key", "abc", "solver.lr=1"], "--api-key *** solver.lr=1"),
        (["db_password", "abc"], "db_password ***"),
        (["data.path=https://me:abc@host/x"], "data.path=https://***@host/x"),
        (["data.label_column=token", "solver.lr=1"], "data.label_column=token solver.lr=1"),
        (["GITHUB_TOKEN=abc", "AWS_SECRET_ACCESS_KEY=abc"],
         "GITHUB_TOKEN=*** AWS_SECRET_ACCESS_KEY=***"),
        (["my.credential=abc", "--credentials", "abc", "apiKey=abc"],
         "my.credential=*** --credentials *** apiKey=***"),
        (["model.backbone.args={token: abc, depth: 2, 'key': \"abc\"}"],
         "model.backbone.args={token: ***, depth: 2, 'key': \"***\"}"),
        (["data.path=https://host/x?token=abc&size=3"],
         "data.path=https://host/x?token=***&size=3"),
        (["--config-file", f"hf_{'a' * 34}.yaml"], "--config-file ***.yaml"),
        (["data.path=/sets/hunter2-hunter2/x"], "data.path=/sets/***/x"),
        (["model.backbone.args={class_token: true, num_key: 3}", "monkey=x", "solver.lr=1e-3"],
         "model.backbone.args={class_token: true, num_key: 3} monkey=x solver.lr=1e-3"),
    ],
)  # fmt: skip
def test_no_secret_of_the_command_line_is_stored(words, shown, monkeypatch):
    monkeypatch.setenv("DATABASE_PASSWORD", "hunter2-hunter2")
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    assert environment({})["command"] == f"x.py {shown}"


@pytest.mark.parametrize(
    "text",
    [
        "The key: more data", "Token: a class token, or none", "Secrets: which? (all)",
        "patch tokens: 196", "Note: something", "auth: null", "class_token: true",
        "credentials: naïve", "monkey: x1", "s3://bucket/a:b",
    ],
)  # fmt: skip
def test_a_sentence_is_no_secret(text):
    assert not has_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "key: s3cr3t", "token: abcdefghijklmnopqrst", "token=abcdef", "key:abcdef",
        "the password: swordfish", "passphrase: correct horse", "api_key: abc", "api-key: abc",
        "hub.token: abc", "--token: abc", "auth: Bearer abc", "auth: Basic YWJj", "token: a-b-c1",
        "https://me:word@host", "https://host/x?key=abc", f"The key: see hf_{'a' * 34}",
        "The key: more data, token: a1b2c3", '{"token": "abc"}',
    ],
)  # fmt: skip
def test_a_secret_in_a_text_is_found(text):
    assert has_secret(text)


FORBIDDEN = re.compile(
    r"trust_remote_code|weights_only=False|\bpickle\.loads?\(|yaml\.(?:unsafe|full)_load|"  # code
    r"(?<![.\w])(?:eval|exec)\(|os\.system|shell=True|"  # of text
    r"zipfile|tarfile|unpack_archive|extractall|"  # archives
    r"\.listen\(|HTTPServer|socketserver|verify=False"  # networks
)


@pytest.mark.parametrize("file", PACKAGE, ids=str)
def test_nothing_runs_code_of_others_unpacks_archives_or_listens(file):
    assert not FORBIDDEN.findall(file.read_text())
