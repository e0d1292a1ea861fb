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

import yaml

from tract_transfer.files import RESULTS_FORMAT, SUITE_FORMAT, SUITE_NAME

_RUN_FILES = ("results.json", "config.yaml")  # a folder with either is a run folder
_SUITE_RUN_FIELDS = {"method": str, "task": str, "seed": int, "folder": str, "state": str}
_RESULTS_FIELDS = {
    "method": str, "name": str, "seed": int, "primary_metric": str, "metrics": dict,
}  # fmt: skip
_MAX_YAML_VALUES = 100_000  # a config with more uses aliases that expand without end
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character in JSON
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast


@dataclass
class RunFolders:
    """The run folders of a report; `baseline` and `title` are those of the first suite."""

    folders: dict[Path, dict[str, Any]] = field(default_factory=dict)  # entries of a suite.json
    baseline: str = ""
    title: str = ""
    problems: list[str] = field(default_factory=list)  # what the report excludes, and why


@dataclass(frozen=True)
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
    problems: tuple[str, ...] = ()  # one for each file or value that cannot be read


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
        is_run = not path.is_dir() or _has_any(path, *_RUN_FILES)
        folders = [path] if is_run else list(_outermost(path, SUITE_NAME, *_RUN_FILES))
        if not folders:
            raise ValueError(
                f"No run in {path} or below. A run folder has a config.yaml or results.json, a "
                f"suite folder a {SUITE_NAME}."
            )
        for folder in folders:
            if not is_run and _has_any(folder, SUITE_NAME):
                _add_suite(folder, run_folders)
            else:
                run_folders.folders.setdefault(folder, {})
    return run_folders


def _outermost(folder: Path, *names: str) -> Iterator[Path]:
    """Yield the folders with one of these files in order of names, and none inside another."""
    for path, subfolders, _ in os.walk(folder):
        if _has_any(Path(path), *names):
            subfolders.clear()
            yield Path(path)
        subfolders.sort()


def _has_any(folder: Path, *names: str) -> bool:
    return any((folder / name).is_file() for name in names)


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
        suite = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. {advice}.") from error
    suite_format = as_dict(suite).get("format")
    if suite_format != SUITE_FORMAT:
        raise ValueError(
            f"{path} must have format {SUITE_FORMAT}, got {suite_format!r}. Use the version of "
            f"tract_transfer that wrote it, or run the suite again. {advice}."
        )
    runs = suite.get("runs")
    for number, run in enumerate(runs if isinstance(runs, list) else [None]):
        if fields := _unusable(as_dict(run), _SUITE_RUN_FIELDS):
            raise ValueError(f"{path}: runs[{number}] lacks a usable {fields}. {advice}.")
    return suite  # type: ignore[no-any-return]


def read_runs(run_folders: RunFolders) -> list[Run]:
    """Read run folders, in their order.

    An unfinished run takes method, task and seed from its suite's plan, or else from its config. A
    run that methods share comes once for each of them.

    Raises:
        ValueError: two finished runs share method, task and seed.
    """
    runs = []
    for folder, planned in run_folders.folders.items():
        run = _as_planned(_load_run(folder), planned) if planned else _load_run(folder)
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


def _as_planned(run: Run, planned: Mapping[str, Any]) -> Run:
    """Return a run with the method, task, seed and failure of its entry in a suite.json."""
    method, task, seed = planned["method"], planned["task"], planned["seed"]
    failure, state, role = run.failure, run.state, run.role
    if (failure, run.method, run.task, run.seed) == ("", method, task, seed):
        return run
    if not failure:
        state = "unreadable"
        failure = (
            f"results.json has {run.method}, {run.task}, seed {run.seed}, but the plan has "
            f"{method}, {task}, seed {seed}"
        )
    else:
        role = "pretrain" if task == "pretrain" else "downstream"
        if planned["state"] != "finished" and state != "unreadable":
            state, attempts = planned["state"], int(planned.get("attempts") or 0)
            reason = "not started yet" if state == "waiting" else failure
            failure = str(planned.get("error") or reason)
            failure += f" ({attempts} attempts)" if attempts > 1 else ""
    return replace(
        run, method=method, task=task, seed=seed, failure=failure, state=state, role=role
    )


def _load_run(folder: Path) -> Run:
    if not folder.is_dir():
        return Run(folder, failure="the folder does not exist", state="missing")
    problems: list[str] = []
    history = _read_lines(folder / "metrics.jsonl", problems)
    config = as_dict(_read(folder / "config.yaml", problems))
    results = _read(folder / "results.json", problems)
    seed, weights = config.get("seed"), look_up(config, "model.weights")
    has_tract = look_up(config, "tract.enabled") is True
    method = "tract" if has_tract else "vanilla" if config and not weights else ""
    run = Run(
        folder,
        task=str(config.get("name") or config.get("task") or ""),
        method=str(config.get("method") or method),
        has_tract=has_tract,
        seed=seed if isinstance(seed, int) else None,
        role="downstream" if weights else "pretrain",
        config=config,
        environment=as_dict(_read(folder / "environment.json", problems)),
        history=history,
        problems=tuple(problems),
    )
    if results is not None:
        return _with_results(run, as_dict(results))
    if (folder / "results.json").is_file():
        return replace(run, failure="results.json cannot be read", state="unreadable")
    iterations = [line["iteration"] for line in history if is_finite(line.get("iteration"))]
    last = f"the log ends at iteration {max(iterations)}" if iterations else "nothing was logged"
    return replace(run, failure=f"no results.json; {last}", state="unfinished")


def _with_results(run: Run, results: dict[str, Any]) -> Run:
    """Return the run with its results, or with the reason why they do not count."""
    results_format, failure = results.get("format", RESULTS_FORMAT), ""
    if results_format != RESULTS_FORMAT:
        failure = f"results.json has format {results_format!r}, this version reads {RESULTS_FORMAT}"
    elif fields := _unusable(results, _RESULTS_FIELDS):
        failure = f"results.json lacks a usable {fields}"
    if failure:
        return replace(run, failure=failure, state="unreadable")
    results = {**results, **{k: as_dict(results.get(k)) for k in ("details", "protocol")}}
    metrics = {k: float(v) for k, v in results["metrics"].items() if is_finite(v)}
    problems = [
        f"{run.folder / 'results.json'}: {key} is {value!r}, not a finite number"
        for key, value in results["metrics"].items()
        if key not in metrics
    ]
    detections = _read(run.folder / "detections.json", problems)
    metadata = as_dict(_read(run.folder / "model.json", problems))
    backbone = look_up(run.config, "model.backbone.name") or metadata.get("name")
    primary = results["primary_metric"]
    return replace(
        run,
        failure="" if primary in metrics else f"results.json has no finite {primary}",
        state="finished" if primary in metrics else "unreadable",
        task=results["name"],
        method=results["method"],
        seed=results["seed"],
        role="pretrain" if results.get("role") == "pretrain" else "downstream",
        backbone=str(backbone or ""),
        metrics=metrics,
        primary_metric=primary,
        results=results,
        detections=[as_dict(d) for d in detections] if isinstance(detections, list) else [],
        problems=(*run.problems, *problems),
    )


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
        value = yaml.load(text, _Loader) if path.suffix == ".yaml" else json.loads(text)
        if path.suffix == ".yaml":
            _check_size(value)
        elif _SURROGATE.search(text):  # no file can hold half a character: replace it by `?`
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{path}: {error}")
        return None
    return value


def _check_size(value: Any) -> None:
    """Raise ValueError if nested values are too many for a config."""
    remaining, count = [value], 0
    while remaining:
        value = remaining.pop()
        count += 1
        if count > _MAX_YAML_VALUES:
            raise ValueError(f"more than {_MAX_YAML_VALUES:,} values, produced by aliases")
        if isinstance(value, dict | list):
            remaining += value.values() if isinstance(value, dict) else value


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
