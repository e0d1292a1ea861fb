"""Methods x tasks x seeds: `load_runs` reads a suite's run folders, `compare` sets them in rows.

Reading never fails on a run's contents. A run that has not finished keeps its place with the
reason in `failure`, and a file that cannot be read is named in `problems`: a report shows both.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from tract_transfer.suite.statistics import PairedDifference, Summary, paired_difference, summarize

_NEEDED = {"method": str, "name": str, "seed": int, "primary_metric": str, "metrics": dict}


@dataclass(frozen=True)
class Run:
    """One run folder: what was trained, how, and what was measured.

    Attributes:
        folder: as it was given.
        failure: why the run counts as not finished; empty for a finished run.
        task: the suite's name of the task ("finetune"); like `method`, empty where unknown.
        method: label of the method ("vanilla").
        seed: None where unknown.
        role: "pretrain" or "downstream".
        metrics: name -> finite value; fractions in [0, 1], or losses.
        primary_metric: the key of `metrics` the task is judged by.
        results: all of results.json.
        history: the lines of metrics.jsonl, in their order.
        detections: the entries of detections.json, empty without one.
        problems: one sentence for each file or value that could not be read.
    """

    folder: Path
    failure: str = ""
    task: str = ""
    method: str = ""
    seed: int | None = None
    role: str = "downstream"
    metrics: dict[str, float] = field(default_factory=dict)
    primary_metric: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One metric of one task for every method.

    Attributes:
        values: method -> seed -> value; every method has an entry.
        missing: method -> its runs without this metric.
        notes: what keeps the values from being compared as they stand.
    """

    task: str
    role: str
    metric: str
    values: dict[str, dict[int, float]]
    missing: dict[str, list[Run]]
    summaries: dict[str, Summary]
    differences: dict[str, PairedDifference]
    notes: list[str]


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, in the order given.

    A run without results is placed by the names of its path: `vanilla/finetune/seed-2` belongs to
    the method and the task of these names, if another run has finished under them.

    Raises:
        ValueError: no folder was given, or two finished runs share method, task and seed.
    """
    if not folders:
        raise ValueError("No run folders: give at least one folder that holds a results.json.")
    runs = [_load_run(Path(folder)) for folder in folders]
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


def methods_of(runs: Sequence[Run], baseline: str) -> list[str]:
    """Return the methods in their order of appearance, the baseline first."""
    known = dict.fromkeys(run.method for run in runs if run.method)
    return sorted(known, key=lambda method: method != baseline)


def compare(runs: Sequence[Run], baseline: str, every_metric: bool = False) -> list[Row]:
    """Return one row for each task's primary metric, or for every metric; downstream first.

    Means are over all seeds of a method, differences over the seeds it shares with the baseline.
    """
    methods = methods_of(runs, baseline)
    rows = []
    for task in dict.fromkeys(run.task for run in runs if not run.failure):
        own = [run for run in runs if run.task == task]
        finished = [run for run in own if not run.failure]
        metrics = dict.fromkeys(metric for run in finished for metric in run.metrics)
        shown = list(metrics) if every_metric else [finished[0].primary_metric]
        rows += [_row(own, metric, methods, baseline) for metric in shown]
    return sorted(rows, key=lambda row: row.role == "pretrain")


def matched(runs: Sequence[Run]) -> dict[str, Run]:
    """Return method -> run for the first task and seed that the most methods share."""
    groups: dict[tuple[str, int | None], dict[str, Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.seed), {})[run.method] = run
    return max(groups.values(), key=len, default={})


def _row(runs: list[Run], metric: str, methods: Sequence[str], baseline: str) -> Row:
    values: dict[str, dict[int, float]] = {method: {} for method in methods}
    missing: dict[str, list[Run]] = {method: [] for method in methods}
    for run in runs:
        if not run.failure and run.seed is not None and metric in run.metrics:
            values[run.method][run.seed] = run.metrics[metric]
        elif run.method:
            missing[run.method].append(run)
    differences, notes = {}, []
    base = values.get(baseline, {})
    for method in (method for method in methods if method != baseline):
        shared = sorted(base.keys() & values[method].keys())
        if shared:
            treated = {seed: values[method][seed] for seed in shared}
            differences[method] = paired_difference(treated, {seed: base[seed] for seed in shared})
        for one, other in ((method, baseline), (baseline, method)):
            alone = sorted(values.get(one, {}).keys() - set(shared))
            if alone and values.get(other):
                seeds = f"seed{'s' * (len(alone) > 1)} {', '.join(map(str, alone))}"
                notes.append(
                    f"{one} {seeds} without a {other} run: in the mean, not in the difference."
                )
    differing = _differing([run for run in runs if not run.failure])
    if differing:
        notes.append(f"The runs differ in {', '.join(differing)}: compare with care.")
    summaries = {method: summarize(list(v.values())) for method, v in values.items() if v}
    first = next(run for run in runs if not run.failure)
    return Row(first.task, first.role, metric, values, missing, summaries, differences, notes)


def _differing(runs: list[Run]) -> list[str]:
    """Name what all runs of a task must share, and do not."""
    shared = ("primary_metric", "iterations")
    records = [
        {**run.results["protocol"], **{key: run.results.get(key) for key in shared}} for run in runs
    ]
    keys = dict.fromkeys(key for record in records for key in record)
    return [key for key in keys if len({repr(record.get(key)) for record in records}) > 1]


def _load_run(folder: Path) -> Run:
    problems: list[str] = []
    if not folder.is_dir():
        return Run(folder, failure="the folder does not exist")
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
        read = "results.json cannot be read" if any("results.json" in p for p in problems) else ""
        ends = _last_iteration(history)
        return replace(run, failure=read or f"no results.json; {ends}")
    return _with_results(run, _mapping(results))


def _with_results(run: Run, results: dict[str, Any]) -> Run:
    """Return the run with its results, or with the reason why they do not count."""
    wrong = [key for key, kind in _NEEDED.items() if not isinstance(results.get(key), kind)]
    if wrong:
        return replace(run, failure=f"results.json lacks a usable {', '.join(wrong)}")
    results = {**results, **{k: _mapping(results.get(k)) for k in ("details", "protocol")}}
    metrics = {k: float(v) for k, v in results["metrics"].items() if is_finite(v)}
    problems = [
        f"{run.folder / 'results.json'}: {key} is {value!r}, not a finite number"
        for key, value in results["metrics"].items()
        if key not in metrics
    ]
    detections = _read(run.folder / "detections.json", problems)
    run = replace(
        run,
        task=results["name"],
        method=results["method"],
        seed=results["seed"],
        role="pretrain" if results.get("role") == "pretrain" else "downstream",
        metrics=metrics,
        primary_metric=results["primary_metric"],
        results=results,
        detections=[_mapping(d) for d in detections] if isinstance(detections, list) else [],
        problems=(*run.problems, *problems),
    )
    if run.primary_metric in metrics:
        return run
    return replace(run, failure=f"results.json has no finite {run.primary_metric}")


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
        return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path}: {error}")
        return None


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError as error:
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
    return is_number and math.isfinite(value)
