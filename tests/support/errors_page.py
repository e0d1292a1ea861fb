"""docs/errors.md: every bad input that a test names, where it is caught, and what is said.

python tests/support/errors_page.py   # runs those tests and writes the page

A test says `with refused("a box outside", ValueError): ...`. While the tests run, each such case is
held to its row of the page; tests/test_errors_page.py holds the rows to the cases.
"""

import ast
import importlib
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PAGE = ROOT / "docs/errors.md"
PACKAGE = ROOT / "tract_transfer"
RECORDER = "errors-page"
LONGEST = 500  # characters of a message
HEAD = """\
# Bad inputs, and what is said of them

Written by `make errors` from the tests: each row is a bad input that a test gives, and the error it
ends in. *Caught in* is the module of tract_transfer that refuses it. Where a message names files,
`…/` stands for their folder; `…` for words of other libraries and for numbers that are the
machine's.

Every tool ends alike, whenever it finds out:

- exit code 0: all was done;
- 2, and `error: ...` on stderr: command line, config, data, weights or folder have to be changed
  first; the same command would end alike;
- 1, and `failed: SomeError: ...`: it began and failed, as for want of memory, disk or network, or
  by numbers that are not finite. Also where a tool did what it was asked and found something wrong:
  `check_data.py` in data, `analyze_model.py` in weights, `predict.py` in one of its files,
  `run_suite.py` in a run;
- 130, 138 or 143, and `SIGINT: ...`: ended by a signal; what trains says how to go on.

There is no traceback, but with `TRACT_TRANSFER_TRACEBACK=1` in the environment. One that comes
unasked is a mistake of ours.

What is told and not refused (data that are skipped or clipped, a broken checkpoint passed over) is
in [reliability.md](reliability.md) and in `results.json`.
"""
# What other libraries word, and what another machine computes: shown as …
FOREIGN = (
    r"Instruction \"[^!]*!",
    r"(?<=Known: )\['alexnet'.*",
    r"(?<=its )\d+(?= bytes)",
    r"(?<=no image of )[A-Z0-9, ]+",
    r"(?<=cannot be read as weights: ).*(?=\. It is cut short)",
    r"(?<=is no whole parquet file: ).*(?= Copy it anew)",
    r"(?<=\()Error\(s\) in loading .*(?=\))",
    r"[0-9a-f]{12}(?= (?:then|now))",
    r"\d+ on \S+ since [^\s.]+",
    r"(?<= from )\S+(?= nobody)",
    r"[\d,]+(?= free)",
    r"(?<=loss_cls )[0-9.]+",
)
# Section -> the parts of the package it is about; the first that fits.
SECTIONS = {
    "Configs": ("config", "check_args"),
    "Data": ("data/", "check_data", "build_data", "build_batches", "check_streams"),
    "Models and weights": ("models/", "build_model", "build_weights", "trained", "export"),
    "TrAct": ("tract/", "joined_optimizer"),
    "Training, checkpoints and run folders": (
        "engine/", "run", "files.py", "build.py", "solver", "replay",
    ),
    "Evaluation": ("evaluation/", "build_probes"),
    "Suites and reports": ("suite/", "inspect_suite", "build_suite"),
    "Everything else": ("",),
}  # fmt: skip


class Row(NamedTuple):
    what: str
    where: str
    message: str

    def __str__(self) -> str:
        message = self.message.replace("|", "\\|")
        ticks = "``" if "`" in message else "`"
        return f"| {self.what} | `{self.where}` | {ticks}{message}{ticks} |"


class Recorder:
    """A plugin of pytest: where it is there, cases are collected and not compared."""

    def __init__(self) -> None:
        self.__name__ = RECORDER
        self.rows: dict[str, Row] = {}

    def add(self, row: Row) -> None:
        assert self.rows.setdefault(row.what, row) == row, f"two messages for {row.what!r}"


def shown(message: str, base: Path) -> str:
    """Return a message as the page has it; `base` is the folder of the tests' own folders."""
    text = " ".join(message.split())
    own = rf"{re.escape(str(base))}/[^/\s'\"]+?(?=[/\s'\",:;.)]|$)"
    text = re.sub(own, "…", text)
    text = text.replace(f"{ROOT}/", "")
    for pattern in FOREIGN:
        text = re.sub(pattern, "…", text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} …"


def caught_in(trace: TracebackType | None) -> str:
    """Return the innermost module of the package in a traceback."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(trace)]
    own = [file for file in files if file.is_relative_to(PACKAGE)]
    assert own, "raised outside of the package"
    return str(own[-1].relative_to(PACKAGE))


# ----------------------------------------------------------------------------- the page


def read_page() -> dict[str, Row]:
    """Return the rows of docs/errors.md by their input."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and line.endswith(" |") and "`" in line:
            what, where, message = re.split(r" (?<!\\)\| ", line[2:-2], maxsplit=2)
            message = message.strip("`").replace("\\|", "|")
            rows[what] = Row(what, where.strip("`"), message)
    return rows


def page_of(rows: dict[str, Row]) -> str:
    """Return the page: a table for each section, in the order of the inputs."""
    left = sorted(rows.values(), key=lambda row: row.what.lower())
    text = HEAD
    for section, parts in SECTIONS.items():
        own = [row for row in left if row.where.startswith(parts)]
        left = [row for row in left if row not in own]
        if own:
            lines = ["| Input | Caught in | Message |", "| --- | --- | --- |", *map(str, own)]
            text += f"\n## {section}\n\n" + "\n".join(lines) + "\n"
    return text


# ----------------------------------------------------------------------------- the cases


class Case(NamedTuple):
    """A call of `refused` in a test: the input's name, or a pattern of names."""

    test: str
    pattern: str


def cases() -> list[Case]:
    """Return every case that the tests have.

    The name is a string, an f-string, or the name of a parameter over the module's TABLE.
    """
    found = []
    for file in sorted(TESTS.glob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tests = [each for each in tree.body if isinstance(each, ast.FunctionDef)]
        for test in tests:
            if "refused" not in [each.arg for each in test.args.args]:
                continue
            for node in ast.walk(test):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "refused":
                    named = _names(node.args[0], file)
                    found += [Case(f"{file}::{test.name}", pattern) for pattern in named]
    return found


def _names(node: ast.expr, file: Path) -> list[str]:
    if isinstance(node, ast.Constant):
        return [re.escape(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = [re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in node.values]
        return ["".join(parts)]
    assert isinstance(node, ast.Name), f"{file} line {node.lineno}: what is refused has no name"
    return [re.escape(name) for name in importlib.import_module(file.stem).TABLE]


def main() -> int:
    sys.path.insert(0, str(TESTS))
    recorder = Recorder()
    tests = sorted({case.test for case in cases()})
    code = pytest.main([*tests, "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    if code == 0:
        PAGE.write_text(page_of(recorder.rows), encoding="utf-8")
        print(f"{len(recorder.rows)} rows in {PAGE}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
