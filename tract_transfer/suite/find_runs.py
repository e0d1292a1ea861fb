"""Which run folders a report is about: those given, those below a folder, those of a plan."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUITE_NAME, SUITE_FORMAT = "suite.json", 1
_MARKS = ("results.json", "config.yaml")  # a folder with either is a run's
_NEEDED = {"method": str, "task": str, "seed": int, "folder": str, "state": str}


@dataclass(frozen=True)
class Planned:
    """What a suite's plan says of one of its runs; `error` and `attempts` are of its execution.

    Attributes:
        also: further methods whose run this is: what they change does not reach it.
    """

    method: str
    task: str
    seed: int
    state: str
    error: str = ""
    attempts: int = 0
    also: tuple[str, ...] = ()


@dataclass
class Found:
    """Folders in the order found, and what plans say of them.

    Attributes:
        planned: folder -> what its suite's plan says.
        baseline, title: of the first suite, empty without one.
        methods: of the suites, in their order.
        problems: what was left out of the report, and why.
    """

    folders: list[Path] = field(default_factory=list)
    planned: dict[Path, Planned] = field(default_factory=dict)
    baseline: str = ""
    title: str = ""
    methods: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find_runs(paths: Sequence[Path]) -> Found:
    """Return the run folders that `paths` are, plan (by their suite.json) or hold below them.

    A path that does not exist counts as a run folder: its absence is reported.

    Raises:
        ValueError: no path, nothing to be found below one, or a suite.json that cannot be used.
    """
    if not paths:
        raise ValueError("No run folders: give at least one folder that holds a results.json.")
    found = Found()
    for path in map(Path, paths):
        before = len(found.folders)
        if path.is_dir() and not _is_run(path):
            _look_into(path, found)
            if len(found.folders) == before:
                raise ValueError(
                    f"No run in {path} or below: a run's folder holds a config.yaml or a "
                    "results.json, a suite's a suite.json."
                )
        else:
            found.folders.append(path)
    found.folders = list(dict.fromkeys(found.folders))
    return found


def _look_into(folder: Path, found: Found) -> None:
    """Add what a folder that is no run's plans or holds."""
    for below in _walk(folder):
        if (below / SUITE_NAME).is_file():
            _add_suite(below, found)
        else:
            found.folders.append(below)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the suites' and runs' folders, the outermost alone, in the order of their names."""
    for path, names, _ in os.walk(folder):
        here = Path(path)
        if (here / SUITE_NAME).is_file() or _is_run(here):
            names.clear()
            yield here
        names.sort()


def _add_suite(folder: Path, found: Found) -> None:
    suite = read_suite(folder / SUITE_NAME)
    planned = {}
    for run in suite["runs"]:
        planned[folder / run["folder"]] = Planned(
            **{key: run[key] for key in ("method", "task", "seed", "state")},
            error=str(run.get("error") or ""),
            attempts=int(run.get("attempts") or 0),
            also=tuple(map(str, run.get("also") or ())),
        )
    found.folders += planned
    found.planned |= planned
    found.baseline = found.baseline or str(suite.get("baseline") or "")
    found.title = found.title or str(suite.get("title") or "")
    found.methods += [m for m in suite.get("methods") or [] if m not in found.methods]
    known = {path.resolve() for path in planned}
    for path, names, _ in os.walk(folder):
        here = Path(path)
        if _is_run(here):
            names.clear()
            if here.resolve() not in known:
                found.problems.append(
                    f"{here} is a run that {folder / SUITE_NAME} does not plan: left out"
                )
        names.sort()


def read_suite(path: Path) -> dict[str, Any]:
    """Return a suite's plan and the state of its runs.

    Raises:
        ValueError: the file is no such plan, or one of another version.
    """
    advice = "Give the run folders themselves to report without the plan"
    try:
        suite = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. {advice}.") from error
    if not isinstance(suite, dict) or suite.get("format") != SUITE_FORMAT:
        form = suite.get("format") if isinstance(suite, dict) else None
        raise ValueError(
            f"{path} must be a plan of format {SUITE_FORMAT}, and its format is {form!r}. Report "
            f"with the version of tract_transfer that wrote it, or run the suite again. {advice}."
        )
    runs = suite.get("runs")
    for number, run in enumerate(runs if isinstance(runs, list) else [None]):
        fields = run if isinstance(run, dict) else {}
        wrong = [key for key, kind in _NEEDED.items() if not isinstance(fields.get(key), kind)]
        if wrong:
            raise ValueError(f"{path}: runs[{number}] lacks a usable {', '.join(wrong)}. {advice}.")
    return suite


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MARKS)
