"""Run folders as `Run`s: what was trained, how, and what was measured.

Reading never fails on a run's contents. A run that has not finished keeps its place with the
reason in `failure`, and a file that cannot be read is named in `problems`: a report shows both.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import yaml

# --- Which run folders a report is about: those given, those below a folder, those of a plan.

SUITE_NAME, SUITE_FORMAT = "suite.json", 1
_MARKS = ("results.json", "config.yaml")  # a folder with either is a run's
_NEEDED_OF_PLAN = {"method": str, "task": str, "seed": int, "folder": str, "state": str}


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
        wrong = [
            key for key, kind in _NEEDED_OF_PLAN.items() if not isinstance(fields.get(key), kind)
        ]
        if wrong:
            raise ValueError(f"{path}: runs[{number}] lacks a usable {', '.join(wrong)}. {advice}.")
    return suite


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MARKS)


RESULTS_FORMAT = 1
_NEEDED = {"method": str, "name": str, "seed": int, "primary_metric": str, "metrics": dict}
_MAX_VALUES = 100_000  # of a config: one that has more grows by aliases, or holds itself
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # a surrogate in JSON, alone or one of two
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast


@dataclass(frozen=True)
class Run:
    """One run folder: what was trained, how, and what was measured.

    Attributes:
        folder: as it was given.
        failure: why the run counts as not finished; empty for a finished run.
        state: "finished", "failed", "blocked" (what it needs failed), "running", "waiting",
            "missing" (no folder), "unreadable" or "unfinished".
        task: the suite's name of the task ("finetune"); like `method`, empty where unknown.
        method: label of the method ("vanilla").
        seed: None where unknown.
        role: "pretrain" or "downstream".
        backbone: its name ("cifar/resnet18"), empty where unknown.
        metrics: name -> finite value; fractions in [0, 1], or losses.
        primary_metric: the key of `metrics` the task is judged by.
        results: all of results.json.
        history: the lines of metrics.jsonl, in their order.
        detections: the entries of detections.json, empty without one.
        problems: one sentence for each file or value that could not be read.
    """

    folder: Path
    failure: str = ""
    state: str = "finished"
    task: str = ""
    method: str = ""
    seed: int | None = None
    role: str = "downstream"
    backbone: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    primary_metric: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)
    problems: tuple[str, ...] = ()


def read_runs(found: Found) -> list[Run]:
    """Read the run folders found, in their order.

    A run without results is placed by its suite's plan, or else by the names of its path:
    `vanilla/finetune/seed-2` belongs to the method and the task of these names, if another run has
    finished under them. A run that methods share, by their plan, comes once for each.

    Raises:
        ValueError: two finished runs share method, task and seed.
    """
    runs = []
    for folder in found.folders:
        planned = found.planned.get(folder)
        run = _as_planned(_load_run(folder), planned)
        runs += [
            run,
            *(replace(run, method=method) for method in (planned.also if planned else ())),
        ]
    finished = [run for run in runs if not run.failure]
    seen: dict[tuple[str, str, int | None], Run] = {}
    for run in finished:
        first = seen.setdefault((run.task, run.method, run.seed), run)
        if first is not run:
            raise ValueError(
                f"Each task, method and seed must come once, but {first.folder} and {run.folder} "
                f"both hold {run.task}, {run.method}, seed {run.seed}. Leave one of them out."
            )
    roles = {run.task: run.role for run in finished}
    methods = {run.method for run in finished}
    return [_placed(run, roles, methods) if run.failure else run for run in runs]


def _as_planned(run: Run, planned: Planned | None) -> Run:
    """Return a run with the place and the failure that its suite's plan knows of."""
    if planned is None:
        return run
    place = {"method": planned.method, "task": planned.task, "seed": planned.seed}
    own = {"method": run.method, "task": run.task, "seed": run.seed}
    if not run.failure:
        if own == place:
            return run
        text = f"its results.json is of {_words(own)}, and the plan says {_words(place)}"
        return replace(run, failure=text, state="unreadable", **place)  # type: ignore[arg-type]
    failure, state = run.failure, run.state
    if planned.state != "finished" and state != "unreadable":
        state = planned.state
        failure = planned.error or {"waiting": "not started yet"}.get(state, run.failure)
        if planned.attempts > 1:
            failure += f" ({planned.attempts} attempts)"
    role = "pretrain" if planned.task == "pretrain" else "downstream"
    return replace(run, failure=failure, state=state, role=role, **place)  # type: ignore[arg-type]


def _words(place: dict[str, Any]) -> str:
    return f"{place['method']}, {place['task']}, seed {place['seed']}"


def _load_run(folder: Path) -> Run:
    problems: list[str] = []
    if not folder.is_dir():
        return Run(folder, failure="the folder does not exist", state="missing")
    history = _read_lines(folder / "metrics.jsonl", problems)
    config = _mapping(_read(folder / "config.yaml", problems))
    results = _read(folder / "results.json", problems)
    seed = config.get("seed")
    run = Run(
        folder=folder,
        seed=seed if isinstance(seed, int) else None,
        config=config,
        environment=_mapping(_read(folder / "environment.json", problems)),
        history=history,
        problems=tuple(problems),
    )
    if results is None:
        if any("results.json" in problem for problem in problems):
            return replace(run, failure="results.json cannot be read", state="unreadable")
        return replace(
            run, failure=f"no results.json; {_last_iteration(history)}", state="unfinished"
        )
    return _with_results(run, _mapping(results))


def _with_results(run: Run, results: dict[str, Any]) -> Run:
    """Return the run with its results, or with the reason why they do not count."""
    if why := _why_unusable(results):
        return replace(run, failure=why, state="unreadable")
    results = {**results, **{k: _mapping(results.get(k)) for k in ("details", "protocol")}}
    metrics = {k: float(v) for k, v in results["metrics"].items() if is_finite(v)}
    problems = [
        f"{run.folder / 'results.json'}: {key} is {value!r}, not a finite number"
        for key, value in results["metrics"].items()
        if key not in metrics
    ]
    detections = _read(run.folder / "detections.json", problems)
    card = _mapping(_read(run.folder / "model.json", problems))
    model = _mapping(run.config.get("model"))
    named = _mapping(model.get("backbone")).get("name") or card.get("name")
    run = replace(
        run,
        task=results["name"],
        method=results["method"],
        seed=results["seed"],
        role="pretrain" if results.get("role") == "pretrain" else "downstream",
        backbone=str(named or ""),
        metrics=metrics,
        primary_metric=results["primary_metric"],
        results=results,
        detections=[_mapping(d) for d in detections] if isinstance(detections, list) else [],
        problems=(*run.problems, *problems),
    )
    if run.primary_metric in metrics:
        return run
    return replace(
        run, failure=f"results.json has no finite {run.primary_metric}", state="unreadable"
    )


def _why_unusable(results: dict[str, Any]) -> str:
    """Return why no number is taken from results of this form; empty where they are usable."""
    form = results.get("format", RESULTS_FORMAT)
    if form != RESULTS_FORMAT:
        return f"results.json has format {form!r}, and this version reads {RESULTS_FORMAT}"
    wrong = [
        key
        for key, kind in _NEEDED.items()
        if not isinstance(results.get(key), kind) or isinstance(results.get(key), bool)
    ]
    return f"results.json lacks a usable {', '.join(wrong)}" if wrong else ""


def _placed(run: Run, roles: dict[str, str], methods: set[str]) -> Run:
    """Return an unfinished run with the task and method its path names."""
    path = "/".join(run.folder.parts[-3:])
    task = run.task or _named_in(path, list(roles))
    seeds = re.findall(r"seed[-_=]?(\d+)", path)
    return replace(
        run,
        task=task,
        method=run.method or _named_in(path, list(methods)),
        seed=int(seeds[-1]) if run.seed is None and seeds else run.seed,
        role=roles.get(task, run.role),
    )


def _named_in(path: str, names: list[str]) -> str:
    for name in sorted(names, key=lambda name: (-len(name), name)):
        if re.search(rf"(?:^|[/_.-]){re.escape(name)}(?:$|[/_.-])", path):
            return name
    return ""


def _read(path: Path, problems: list[str]) -> Any:
    """Return the parsed JSON or YAML file, or None where it is absent or, named, unreadable."""
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".yaml":
            return _whole_characters(json.loads(text), text)
        value = yaml.load(text, _Loader)
        _check_size(value)
        return value
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{path}: {error}")
        return None


def _whole_characters(value: Any, text: str) -> Any:
    """Return what was read of `text` with `?` for halves of characters, which no file can hold."""
    if not _HALF.search(text):
        return value
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def _check_size(value: Any) -> None:
    """Raise ValueError where nested values are too many to be a config's."""
    left, count = [value], 0
    while left:
        own = left.pop()
        count += 1
        if count > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES:,} values, as aliases make them")
        if isinstance(own, dict | list):
            left += own.values() if isinstance(own, dict) else own


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}, line {number}: {error}")
            continue
        lines.append(_mapping(line))
    return lines


def _last_iteration(history: list[dict[str, Any]]) -> str:
    last = max(
        (line["iteration"] for line in history if is_finite(line.get("iteration"))), default=0
    )
    return f"the log ends at iteration {last}" if last else "nothing was logged"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def is_finite(value: Any) -> TypeGuard[float]:
    """Tell whether a value read from JSON is a number, neither NaN nor infinite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return is_number and math.isfinite(value)
    except OverflowError:  # an integer of more digits than any float has
        return False
