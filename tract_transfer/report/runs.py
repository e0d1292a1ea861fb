"""Finds run folders and reads them as `Run`s: what was trained, how, and what was measured.

Reading never fails because of a run's contents. An unfinished run keeps its place, with the reason
in `failure`, and `problems` names each file that cannot be read: a report shows both.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from tract_transfer.config.file import NOT_YAML, parse_yaml
from tract_transfer.files import (
    CONFIG_NAME,
    ENVIRONMENT_NAME,
    METRICS_NAME,
    RESULTS_FORMAT,
    RESULTS_NAME,
    SUITE_FORMAT,
    SUITE_NAME,
)

_RUN_FILES = (RESULTS_NAME, CONFIG_NAME)  # a folder with either is a run folder
_SUITE_RUN_FIELDS = {"method": str, "task": str, "seed": int, "folder": str, "state": str}
_RESULTS_FIELDS = {
    "method": str, "name": str, "seed": int, "primary_metric": str, "metrics": dict,
}  # fmt: skip
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character in JSON


@dataclass
class RunFolders:
    """The run folders of a report; `baseline` and `title` are those of the first suite."""

    folders: dict[Path, dict[str, Any]] = field(default_factory=dict)  # entries of a suite.json
    baseline: str = ""
    title: str = ""
    problems: list[str] = field(default_factory=list)  # what the report excludes, and why


@dataclass
class Run:
    """One run folder. Texts are empty if unknown."""

    folder: Path
    failure: str = ""  # why the run does not count as finished; empty for a finished run
    # One of finished, failed, blocked (the run it needs failed), running, waiting, missing (no
    # folder), unreadable, unfinished.
    state: str = "finished"
    task: str = ""  # the suite's name of the task ("finetune")
    method: str = ""  # label of the method ("vanilla")
    seed: int | None = None  # a finished run has one
    role: str = "downstream"  # or "pretrain"
    backbone: str = ""  # "cifar/resnet18"
    has_tract: bool = False  # TrAct trains the first layer
    metrics: dict[str, float] = field(default_factory=dict)  # finite; fractions, or losses
    primary_metric: str = ""
    results: dict[str, Any] = field(default_factory=dict)  # `details` and `protocol` are dicts
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl
    detections: list[dict[str, Any]] = field(default_factory=list)  # entries of detections.json
    problems: list[str] = field(default_factory=list)  # what cannot be read: files, values


def find_runs(paths: Sequence[Path]) -> RunFolders:
    """Find the run folders that `paths` are, plan (in a suite.json) or contain.

    A path that does not exist counts as a run folder, so that the report lists it as missing.

    Raises:
        ValueError: no path, no run below one, or an unusable suite.json.
    """
    if not paths:
        raise ValueError("No run folders: give at least one folder with a results.json.")
    run_folders = RunFolders()
    for path in map(Path, paths):
        is_run = not path.is_dir() or any((path / name).is_file() for name in _RUN_FILES)
        folders = [path] if is_run else list(_outermost(path, SUITE_NAME, *_RUN_FILES))
        if not folders:
            raise ValueError(
                f"No run in {path} or below. A run folder has a config.yaml or results.json, a "
                f"suite folder a {SUITE_NAME}."
            )
        for folder in folders:
            if not is_run and (folder / SUITE_NAME).is_file():
                _add_suite(folder, run_folders)
            else:
                run_folders.folders.setdefault(folder, {})
    return run_folders


def _outermost(folder: Path, *names: str) -> Iterator[Path]:
    """Yield the folders with one of these files in order of names, and none inside another."""
    for path, subfolders, files in os.walk(folder):
        subfolders.sort()
        if any(name in files for name in names):
            subfolders.clear()
            yield Path(path)


def _add_suite(folder: Path, run_folders: RunFolders) -> None:
    suite = read_suite(folder / SUITE_NAME)
    planned = {folder / run["folder"]: run for run in suite["runs"]}
    run_folders.folders |= planned
    run_folders.baseline = run_folders.baseline or str(suite.get("baseline") or "")
    run_folders.title = run_folders.title or str(suite.get("title") or "")
    resolved = {path.resolve() for path in planned}
    run_folders.problems += [
        f"{path} is a run that {folder / SUITE_NAME} does not plan: excluded"
        for path in _outermost(folder, *_RUN_FILES)
        if path.resolve() not in resolved
    ]


def read_suite(path: Path) -> dict[str, Any]:
    """Return the contents of a suite.json; ValueError if they are unusable."""
    advice = "To report without the plan, give the run folders themselves"
    try:
        suite = as_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. {advice}.") from error
    if (suite_format := suite.get("format")) != SUITE_FORMAT:
        raise ValueError(
            f"{path} must have format {SUITE_FORMAT}, got {suite_format!r}. Use the version of "
            f"tract_transfer that wrote it, or run the suite again. {advice}."
        )
    runs = suite.get("runs")
    for number, run in enumerate(runs if isinstance(runs, list) else [None]):
        if fields := _unusable(as_dict(run), _SUITE_RUN_FIELDS):
            raise ValueError(f"{path}: runs[{number}] lacks a usable {fields}. {advice}.")
    return suite


def read_runs(run_folders: RunFolders) -> list[Run]:
    """Read run folders, in their order.

    An unfinished run takes method, task and seed from its suite's plan, or else from its config. A
    run that methods share comes once for each of them.

    Raises:
        ValueError: two finished runs share method, task and seed.
    """
    runs = []
    for folder, planned in run_folders.folders.items():
        run = _load_run(folder)
        if planned:
            _apply_plan(run, planned)
        methods = [run.method, *map(str, planned.get("also") or ())]
        runs += [replace(run, method=method) for method in methods]
    seen: dict[tuple[str, str, int | None], Run] = {}
    for run in (run for run in runs if not run.failure):
        first = seen.setdefault((run.task, run.method, run.seed), run)
        if first is not run:
            raise ValueError(
                f"Each task, method and seed must occur once, but {first.folder} and {run.folder} "
                f"both have {run.task}, {run.method}, seed {run.seed}. Exclude one of them."
            )
    return runs


def _apply_plan(run: Run, planned: Mapping[str, Any]) -> None:
    """Give a run the method, task and seed of its entry in a suite.json, and its failure."""
    actual = (run.method, run.task, run.seed)
    run.method, run.task, run.seed = planned["method"], planned["task"], planned["seed"]
    if run.failure:
        run.role = "pretrain" if run.task == "pretrain" else "downstream"
        if planned["state"] != "finished" and run.state != "unreadable":
            run.state, attempts = planned["state"], int(planned.get("attempts") or 0)
            reason = "not started yet" if run.state == "waiting" else run.failure
            run.failure = str(planned.get("error") or reason)
            run.failure += f" ({attempts} attempts)" if attempts > 1 else ""
    elif actual != (run.method, run.task, run.seed):
        run.state = "unreadable"
        run.failure = "{} has {}, {}, seed {}, but the plan has {}, {}, seed {}".format(
            RESULTS_NAME, *actual, run.method, run.task, run.seed
        )


def _load_run(folder: Path) -> Run:
    if not folder.is_dir():
        return Run(folder, failure="the folder does not exist", state="missing")
    run = Run(folder)
    run.config = config = as_dict(_read(folder / CONFIG_NAME, run.problems))
    run.environment = as_dict(_read(folder / ENVIRONMENT_NAME, run.problems))
    run.history = _read_lines(folder / METRICS_NAME, run.problems)
    detections = _read(folder / "detections.json", run.problems)
    run.detections = [as_dict(d) for d in detections] if isinstance(detections, list) else []
    metadata = as_dict(_read(folder / "model.json", run.problems))
    run.backbone = str(look_up(config, "model.backbone.name") or metadata.get("name") or "")
    run.has_tract = look_up(config, "tract.enabled") is True
    weights, seed = look_up(config, "model.weights"), config.get("seed")
    method = "tract" if run.has_tract else "vanilla" if config and not weights else ""
    run.method = str(config.get("method") or method)
    run.task = str(config.get("name") or config.get("task") or "")
    run.seed = seed if isinstance(seed, int) else None
    run.role = "downstream" if weights else "pretrain"
    run.failure = _add_results(run)
    if run.failure:
        run.state = "unreadable" if (folder / RESULTS_NAME).is_file() else "unfinished"
    return run


def _add_results(run: Run) -> str:
    """Enter results.json into a run; return why the run does not count as finished, or ""."""
    path = run.folder / RESULTS_NAME
    if not path.is_file():
        iterations = [n for line in run.history if is_finite(n := line.get("iteration"))]
        last = (
            f"the log ends at iteration {max(iterations)}" if iterations else "nothing was logged"
        )
        return f"no {RESULTS_NAME}; {last}"
    results = _read(path, run.problems)
    if results is None:
        return f"{RESULTS_NAME} cannot be read"
    results_format = as_dict(results).get("format", RESULTS_FORMAT)
    if results_format != RESULTS_FORMAT:
        return f"{RESULTS_NAME} has format {results_format!r}, this version reads {RESULTS_FORMAT}"
    if fields := _unusable(as_dict(results), _RESULTS_FIELDS):
        return f"{RESULTS_NAME} lacks a usable {fields}"
    run.results = results | {k: as_dict(results.get(k)) for k in ("details", "protocol")}
    run.method, run.task, run.seed = results["method"], results["name"], results["seed"]
    run.role = "pretrain" if results.get("role") == "pretrain" else "downstream"
    run.primary_metric = results["primary_metric"]
    for key, value in results["metrics"].items():
        if is_finite(value):
            run.metrics[key] = float(value)
        else:
            run.problems.append(f"{path}: {key} is {value!r}, not a finite number")
    if run.primary_metric not in run.metrics:
        return f"{RESULTS_NAME} has no finite {run.primary_metric}"
    return ""


def _unusable(content: Mapping[str, Any], fields: Mapping[str, type]) -> str:
    """Name the fields that are missing or have another type."""
    return ", ".join(
        key
        for key, kind in fields.items()
        if not isinstance(content.get(key), kind) or isinstance(content.get(key), bool)
    )


def _read(path: Path, problems: list[str]) -> Any:
    """Return a parsed JSON or YAML file; None if it is missing or, with a problem, unreadable."""
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".yaml":
            return parse_yaml(text)[1]
        value = json.loads(text)
        if _SURROGATE.search(text):  # no file can hold half a character: replace it by `?`
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except (OSError, *NOT_YAML) as error:
        problems.append(f"{path}: {error}")
        return None
    return value


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        try:
            lines.append(as_dict(json.loads(text)))
        except (ValueError, RecursionError) as error:  # noqa: PERF203
            problems.append(f"{path}, line {number}: {error}")
    return lines


def look_up(config: Any, key: str) -> Any:
    """Return the value at a dotted key, or None."""
    for part in key.split("."):
        config = as_dict(config).get(part)
    return config


def as_dict(value: Any) -> dict[str, Any]:
    """Return a value read from a file if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a value read from JSON is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # an integer may be larger than any float
