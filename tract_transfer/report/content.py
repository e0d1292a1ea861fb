"""The content of a report as plain values: every format writes the same content."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from tract_transfer.report.curves import Evaluations, SpeedUpRow, evaluations_of, speed_ups
from tract_transfer.report.paper import PaperRow, compare_with_paper
from tract_transfer.report.runs import Run, as_dict, find_runs, is_finite, look_up, read_runs
from tract_transfer.report.statistics import (
    PairedDifference,
    Summary,
    count_of,
    holm,
    interval,
    is_loss,
    paired_difference,
    pairs,
    seed_list,
    summarize,
)

TITLE, BASELINE = "Does the backbone transfer?", "vanilla"
_COSTS = {  # name, in the order of the report -> key in results.json, and its unit: size and name
    "training": ("train_seconds", 1, "s"),
    "speed": ("images_per_second", 1, "images/s"),
    "peak memory of the process": ("cost.peak_memory_bytes.process", 2**20, "MiB"),
    "peak memory of the GPU": ("cost.peak_memory_bytes.gpu", 2**20, "MiB"),
    "energy of the machine": ("cost.energy_joules", 1e3, "kJ"),  # the sum over its packages
}
_LABELS = ("seed", "output_dir", "name", "method")  # config keys that identify a run
_FEW_PAIRS = 5
Values = dict[str, dict[int, float]]  # method -> seed -> value


@dataclass(frozen=True)
class Row:
    """One metric of one task, for every method."""

    task: str
    role: str
    metric: str  # empty if no run of the task has finished
    values: Values  # every method has an entry
    missing: dict[str, list[Run]]  # method -> its runs without this metric
    summaries: dict[str, Summary]
    differences: dict[str, PairedDifference]  # to the baseline, over the seeds that both have
    notes: list[str]  # reasons for care when comparing the values
    seeds: list[int]  # all seeds that runs of any task have or were planned with
    # Method -> p-value of its difference, Holm-corrected for all comparisons of downstream tasks;
    # for primary metrics only.
    corrected: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassRow:
    """A class's accuracy, or average precision at IoU 0.5."""

    name: str
    summaries: dict[str, Summary]
    differences: dict[str, PairedDifference]


@dataclass(frozen=True)
class Report:
    """The content of a report. All fields but `tasks` are also those of the JSON."""

    title: str
    baseline: str
    methods: list[str]  # the baseline first
    answer: list[str]  # one sentence for each method except the baseline
    results: list[Row]  # of the primary metrics
    all_metrics: list[Row]
    curves: list[Evaluations]
    speed_ups: list[SpeedUpRow]
    classes: dict[str, list[ClassRow]]  # by task, largest change first
    # `task`, `quantity`, `unit`; method -> `means` and `counts` of seeds, `ratios` to the baseline
    costs: list[dict[str, Any]]
    paper: list[PaperRow]
    # Task -> parts: `heading`, `differing` (key -> method -> values), `shared` (key -> value)
    protocol: dict[str, list[dict[str, Any]]]
    runs: list[Run]
    problems: list[str]  # what could not be read, and what is excluded
    tasks: dict[str, list[Run]]  # finished runs, downstream tasks first

    @property
    def treated(self) -> list[str]:
        """The methods that are compared with the baseline."""
        return self.methods[1:]

    @property
    def seeds(self) -> int:
        """How many seeds the runs have or were planned with."""
        return len(self.results[0].seeds) if self.results else 0

    @property
    def unfinished(self) -> list[Run]:
        """The runs without usable results."""
        return [run for run in self.runs if run.failure]


def read_report(
    paths: Sequence[Path], baseline: str | None = None, title: str | None = None
) -> Report:
    """Read run folders, suite folders, and folders that contain either, into one report.

    Without `baseline`, the suite's is compared with, or "vanilla", or the only method.

    Raises:
        ValueError: no run, an unusable suite.json, two runs with the same task, method and seed, no
            run of the baseline, or no method to take as the baseline.
    """
    run_folders = find_runs(paths)
    runs = read_runs(run_folders)
    baseline = _baseline(runs, baseline or run_folders.baseline)
    named = dict.fromkeys(run.method for run in runs if run.method)  # in order of appearance
    methods = sorted(named, key=lambda method: method != baseline)
    tasks: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.role == "pretrain"):
        if not run.failure:
            tasks.setdefault(run.task, []).append(run)
    results, all_metrics = _compare(runs, methods)
    downstream = [row for row in results if row.role == "downstream"]
    curves = [evaluations_of(of_task) for of_task in tasks.values()]
    paper, unmatched = compare_with_paper(tasks)
    unreadable = [problem for run in runs for problem in run.problems]
    return Report(
        title=title or run_folders.title or TITLE,
        baseline=baseline,
        methods=methods,
        answer=[_sentence(method, downstream, baseline) for method in methods[1:]],
        results=results,
        all_metrics=all_metrics,
        curves=curves,
        speed_ups=speed_ups(curves, baseline, len(results[0].seeds) if results else 0),
        classes={task: _classes(of_task, methods) for task, of_task in tasks.items()},
        costs=[row for of_task in tasks.values() for row in _costs(of_task, methods)],
        paper=paper,
        protocol={task: _protocol(of_task) for task, of_task in tasks.items()},
        runs=runs,
        problems=[*run_folders.problems, *unmatched, *unreadable],
        tasks=tasks,
    )


def _baseline(runs: Sequence[Run], name: str) -> str:
    """Return the method to compare with: `name`, or one chosen if it is empty."""
    methods, baseline = sorted({run.method for run in runs if run.method}), name or BASELINE
    if not methods or baseline in methods:
        return baseline
    if name or len(methods) > 1:
        raise ValueError(
            f"The runs' methods are {', '.join(methods)}, and none is the baseline {baseline}. "
            f"Choose one of them, as in --baseline {methods[0]}, or add runs of {baseline}."
        )
    return methods[0]


def _measured(
    runs: Sequence[Run], methods: Sequence[str], values_of: Callable[[Run], Mapping[str, Any]]
) -> dict[str, Values]:
    """Return name -> method -> seed -> finite value; every method has an entry."""
    measured: dict[str, Values] = {}
    for run in runs:
        for name, value in values_of(run).items():
            if is_finite(value) and run.seed is not None:
                by_method = measured.setdefault(str(name), {method: {} for method in methods})
                by_method[run.method][run.seed] = float(value)
    return measured


def _statistics(
    values: Values, baseline: str, *, resample: bool = True
) -> tuple[dict[str, Summary], dict[str, PairedDifference]]:
    """Return method -> summary, and method -> difference to the baseline."""
    summaries = {m: summarize(list(by_seed.values())) for m, by_seed in values.items() if by_seed}
    differences = {
        method: paired_difference(*both, resample=resample)
        for method, both in pairs(values, baseline).items()
    }
    return summaries, differences


def _compare(runs: Sequence[Run], methods: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """Return the rows of the tasks' primary metrics, and of every metric; downstream tasks first.

    Means are over all seeds of a method, differences over the seeds it shares with the baseline.
    """
    seeds = sorted({run.seed for run in runs if run.task and run.seed is not None})
    primary, every = [], []
    for task in dict.fromkeys(run.task for run in runs if run.task):
        of_task = [run for run in runs if run.task == task]
        finished = [run for run in of_task if not run.failure]
        first = (finished or of_task)[0]
        notes = [*_shared(of_task), *_inconsistent(finished)]
        measured = _measured(finished, methods, lambda run: run.metrics)
        for metric, values in (measured or {"": {method: {} for method in methods}}).items():
            absent = [run for run in of_task if run.failure or metric not in run.metrics]
            missing = {m: [run for run in absent if run.method == m] for m in methods}
            statistics = _statistics(values, methods[0])
            remarks = [*_absent(values, seeds), *notes]
            row = Row(task, first.role, metric, values, missing, *statistics, remarks, seeds)
            every += [row] if metric else []
            primary += [replace(row, corrected={})] if metric in ("", first.primary_metric) else []
    for rows in (primary, every):
        rows.sort(key=lambda row: row.role == "pretrain")
    _correct(primary)
    return primary, every


def _correct(rows: Sequence[Row]) -> None:
    """Add the p-values corrected for all comparisons of downstream tasks together."""
    tests = [
        (row, method, difference.p_value)
        for row in rows
        if row.role == "downstream"
        for method, difference in row.differences.items()
        if difference.p_value is not None
    ]
    p_values = holm([p_value for _, _, p_value in tests])
    for (row, method, _), p_value in zip(tests, p_values, strict=True):
        row.corrected[method] = p_value


# Notes on a row: reasons for care when comparing its values.


def _absent(values: Values, seeds: Sequence[int]) -> list[str]:
    """Name the seeds that some methods have no result for."""
    methods: dict[tuple[int, ...], list[str]] = {}
    for method, of_method in values.items():
        absent = tuple(seed for seed in seeds if seed not in of_method)
        if of_method and absent:
            methods.setdefault(absent, []).append(method)
    return [
        f"{' and '.join(names)} {'have' if len(names) > 1 else 'has'} no result for "
        f"{seed_list(absent)}."
        for absent, names in methods.items()
    ]


def _shared(runs: Sequence[Run]) -> list[str]:
    """Name the methods that share their runs."""
    methods: dict[Path, list[str]] = {}
    for run in runs:
        methods.setdefault(run.folder, []).append(run.method)
    return [
        f"{' and '.join(group)} share one run per seed: their settings do not affect this task."
        for group in dict.fromkeys(map(tuple, methods.values()))
        if len(group) > 1
    ]


def _inconsistent(runs: Sequence[Run]) -> list[str]:
    """Name what all runs of a task should have in common but do not."""
    records: list[dict[str, Any]] = []
    for run in runs:
        versions, git, data = (as_dict(run.environment.get(k)) for k in ("versions", "git", "data"))
        records.append({
            **run.results["protocol"],
            **{key: run.results.get(key) for key in ("primary_metric", "iterations")},
            **{f"the images of {split}": fingerprint for split, fingerprint in data.items()},
            **{f"the version of {p}": versions.get(p) for p in ("tract_transfer", "torch")},
            "the code's commit": git.get("commit"),
        })  # fmt: skip
    keys = dict.fromkeys(key for record in records for key in record)
    differing = [key for key in keys if len({repr(record.get(key)) for record in records}) > 1]
    return [f"The runs differ in {', '.join(differing)}: compare with care."] if differing else []


# Classes, costs and protocol of a task's finished runs.


def _classes(runs: Sequence[Run], methods: Sequence[str]) -> list[ClassRow]:
    rows = [
        ClassRow(name, *_statistics(values, methods[0], resample=False))
        for name, values in _measured(runs, methods, _per_class).items()
    ]
    return sorted(
        rows, key=lambda row: -max((abs(d.mean) for d in row.differences.values()), default=0.0)
    )


def _per_class(run: Run) -> dict[str, Any]:
    """Return class -> value; a probe has them in the details under its own name."""
    details = run.results["details"]
    probes = [part for name, part in details.items() if run.primary_metric.startswith(f"{name}_")]
    parts = [part for part in (details, *probes) if isinstance(part, dict) and "per_class" in part]
    return as_dict(parts[0]["per_class"]) if parts else {}


def _costs(runs: Sequence[Run], methods: Sequence[str]) -> list[dict[str, Any]]:
    measured, rows = _measured(runs, methods, _costs_of), []
    for quantity, (_, _, unit) in _COSTS.items():
        if values := measured.get(quantity):
            counts = {method: len(by_seed) for method, by_seed in values.items() if by_seed}
            means = {method: sum(values[method].values()) / n for method, n in counts.items()}
            ratios = {
                method: sum(ours.values()) / total
                for method, (ours, theirs) in pairs(values, methods[0]).items()
                if (total := sum(theirs.values()))
            }
            row = {"task": runs[0].task, "quantity": quantity, "unit": unit}
            rows.append({**row, "means": means, "counts": counts, "ratios": ratios})
    return rows


def _costs_of(run: Run) -> dict[str, float]:
    """Return the costs of a run in the units of `_COSTS`, without those that are unknown."""
    costs = {}
    for quantity, (key, unit_size, _) in _COSTS.items():
        value = look_up(run.results, key)
        parts = list(value.values()) if isinstance(value, dict) else [value]
        if parts and all(map(is_finite, parts)):
            costs[quantity] = sum(parts) / unit_size
    return costs


def _protocol(runs: Sequence[Run]) -> list[dict[str, Any]]:
    methods, protocol = {run.method for run in runs}, []
    for heading, parts, excluded in (
        ("Protocol", [run.results["protocol"] for run in runs], ()),
        ("Configuration", [run.config for run in runs], _LABELS),
        ("Environment and data", [run.environment for run in runs], ("command",)),
    ):
        values: dict[str, dict[str, list[str]]] = {}  # key -> method -> distinct values
        for run, part in zip(runs, parts, strict=True):
            for key, text in _flatten({k: v for k, v in part.items() if k not in excluded}).items():
                texts = values.setdefault(key, {}).setdefault(run.method, [])
                texts += [text] if text not in texts else []
        shared = {
            key: distinct.pop()
            for key, by_method in values.items()
            if by_method.keys() == methods
            and len(distinct := set().union(*by_method.values())) == 1
        }
        differing = {key: by_method for key, by_method in values.items() if key not in shared}
        part = {"heading": heading, "differing": differing, "shared": shared}
        protocol += [part] if values else []
    return protocol


def _flatten(value: Any, key: str = "") -> dict[str, str]:
    """Return nested mappings as dotted key -> text."""
    if isinstance(value, Mapping) and value:
        parts = [_flatten(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()]
        return {k: v for part in parts for k, v in part.items()}
    if not key or isinstance(value, str):
        return {key: value} if key else {}
    return {key: json.dumps(value, default=str, skipkeys=True)}


# The answer: what the downstream tasks show for a method, and no more than that.


def _sentence(method: str, rows: Sequence[Row], baseline: str) -> str:
    """Return the gain of a method over downstream tasks, and how certain it is."""
    measured = [row for row in rows if method in row.differences]
    if not measured:
        return f"{method} and {baseline} do not share a finished seed of a downstream task yet."
    average = _averaged(method, measured, baseline)
    parts = [average] if average else []
    if not average or len(measured) > 1:
        parts.append(f"{'it' if average else method} {_counted(method, measured)}")
    if unmeasured := len(rows) - len(measured):
        parts.append(f"{unmeasured} task{'s have' if unmeasured > 1 else ' has'} no pair yet")
    return f"{'; '.join(parts)}."


def _averaged(method: str, rows: Sequence[Row], baseline: str) -> str:
    """Describe the difference of the means over tasks, paired by the seeds that all tasks have.

    The interval is for new seeds on these tasks, not for other tasks. Empty if there is no such
    seed, or if a task is judged by a loss.
    """
    both = (method, baseline)
    paired = sorted(set.intersection(*(set(row.values[m]) for row in rows for m in both)))
    if not paired or any(is_loss(row.metric) for row in rows):
        return ""
    means = ({seed: fmean(row.values[m][seed] for row in rows) for seed in paired} for m in both)
    difference = paired_difference(*means)
    mean, n, seeds = difference.mean, difference.n, len(rows[0].seeds)
    tasks = rows[0].task if len(rows) == 1 else f"average over {len(rows)} downstream tasks"
    points = "less than 0.01" if abs(mean) < 5e-5 else f"{abs(100 * mean):.2f}"
    gain = f"{points} points {'ahead of' if mean > 0 else 'behind'}" if mean else "level with"
    text = f"On {tasks}, {method} is {gain} {baseline}"
    over = f"{count_of(n, seeds)} paired seed{'s' * (max(n, seeds) > 1)}"
    if len(rows) > 1 and n < seeds:
        over += ", those that all tasks have"
    if n == 1:
        return f"{text} ({over}); this may be chance: one pair has no interval"
    if difference.p_value is None:
        return f"{text} with each of {over}: without spread there is no test"
    text += f", 95 % interval {interval(difference, '')} over {over}"
    if difference.excludes_zero:
        return f"{text}: significant"
    few = "; so few seeds can hardly show a difference" if n < _FEW_PAIRS else ""
    return f"{text}: not significant{few}"


def _counted(method: str, rows: Sequence[Row]) -> str:
    """Count the tasks on which a method is ahead and behind, and where that is significant."""
    signs = {row.task: -1 if is_loss(row.metric) else 1 for row in rows}
    gains = {row.task: signs[row.task] * row.differences[method].mean for row in rows}
    ahead, behind = [t for t, gain in gains.items() if gain > 0], [t for t in gains if gains[t] < 0]
    text = f"is ahead on {len(ahead)} of {len(rows)} task{'s' * (len(rows) > 1)}"
    text += f" and behind on {len(behind)}" if behind else ""
    if not any(method in row.corrected for row in rows):
        return f"{text}; no task has enough pairs, or spread, for a test"
    significant = {row.task for row in rows if row.corrected.get(method, 1) < 0.05}
    counts = [
        f"{side} on {len(clear)} ({', '.join(clear)})"
        for side, tasks in (("ahead", ahead), ("behind", behind))
        if (clear := [task for task in tasks if task in significant])
    ]
    if not counts:
        return f"{text}, on none significantly (Holm)"
    return f"{text}, significantly (Holm) {' and '.join(counts)}"
