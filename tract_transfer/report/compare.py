"""Methods x tasks x seeds: `compare` sets runs in rows, one a metric of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tract_transfer.report.runs import Run
from tract_transfer.report.statistics import (
    PairedDifference,
    Summary,
    holm,
    paired_difference,
    summarize,
)


@dataclass(frozen=True)
class Row:
    """One metric of one task for every method.

    Attributes:
        metric: empty where no run of the task has finished.
        values: method -> seed -> value; every method has an entry.
        missing: method -> its runs without this metric.
        seeds: all seeds that runs of any task have or should have had.
        differences: method -> its difference to the baseline, over the seeds they share.
        corrected: method -> the p-value of that difference, corrected by Holm for all comparisons
            of downstream tasks; of their primary metrics alone, and where there is a test.
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
    seeds: list[int] = field(default_factory=list)
    corrected: dict[str, float] = field(default_factory=dict)


def methods_of(runs: Sequence[Run], baseline: str) -> list[str]:
    """Return the methods in their order of appearance, the baseline first."""
    known = dict.fromkeys(run.method for run in runs if run.method)
    return sorted(known, key=lambda method: method != baseline)


def by_task(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return task -> its finished runs; downstream tasks first, without those that have none."""
    finished = sorted(
        (run for run in runs if not run.failure), key=lambda run: run.role == "pretrain"
    )
    tasks = dict.fromkeys(run.task for run in finished)
    return {task: [run for run in finished if run.task == task] for task in tasks}


def compare(runs: Sequence[Run], baseline: str, every_metric: bool = False) -> list[Row]:
    """Return one row for each task's primary metric, or for every metric; downstream first.

    Means are over all seeds of a method, differences over the seeds it shares with the baseline.
    """
    methods = methods_of(runs, baseline)
    seeds = sorted({run.seed for run in runs if run.task and run.seed is not None})
    rows = []
    for task in dict.fromkeys(run.task for run in runs if run.task):
        own = [run for run in runs if run.task == task]
        finished = [run for run in own if not run.failure]
        metrics = dict.fromkeys(metric for run in finished for metric in run.metrics)
        first = finished[0].primary_metric if finished else ""
        shown = list(metrics) if every_metric else [first]
        rows += [_row(own, metric, methods, baseline, seeds) for metric in shown]
    rows.sort(key=lambda row: row.role == "pretrain")
    return rows if every_metric else _corrected(rows)


def matched(runs: Sequence[Run]) -> dict[str, Run]:
    """Return method -> run for the first task and seed that the most methods share."""
    groups: dict[tuple[str, int | None], dict[str, Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.seed), {})[run.method] = run
    return max(groups.values(), key=len, default={})


def pairs(
    values: Mapping[str, Mapping[int, float]],
    baseline: str,
    *,
    resample: bool = True,
) -> dict[str, PairedDifference]:
    """Return method -> its difference to the baseline over the seeds that both have."""
    base = values.get(baseline, {})
    differences = {}
    for method, own in values.items():
        shared = sorted(base.keys() & own.keys())
        if method != baseline and shared:
            treated = {seed: own[seed] for seed in shared}
            untreated = {seed: base[seed] for seed in shared}
            differences[method] = paired_difference(treated, untreated, resample=resample)
    return differences


def _row(
    runs: list[Run], metric: str, methods: Sequence[str], baseline: str, seeds: list[int]
) -> Row:
    values: dict[str, dict[int, float]] = {method: {} for method in methods}
    missing: dict[str, list[Run]] = {method: [] for method in methods}
    for run in runs:
        if not run.failure and run.seed is not None and metric in run.metrics:
            values[run.method][run.seed] = run.metrics[metric]
        elif run.method:
            missing[run.method].append(run)
    finished = [run for run in runs if not run.failure]
    notes = [*_lonely(values, baseline), *_absent(values, missing, baseline, seeds)]
    notes += _shared(runs)
    if differing := _differing(finished):
        notes.append(f"The runs differ in {', '.join(differing)}: compare with care.")
    first = next(iter(finished), runs[0])
    return Row(
        task=first.task,
        role=first.role,
        metric=metric,
        values=values,
        missing=missing,
        summaries={m: summarize(list(own.values())) for m, own in values.items() if own},
        differences=pairs(values, baseline),
        notes=notes,
        seeds=seeds,
    )


def _lonely(values: Mapping[str, Mapping[int, float]], baseline: str) -> list[str]:
    """Name the seeds that one method has and the other lacks."""
    notes = []
    for method in (method for method in values if method != baseline):
        for one, other in ((method, baseline), (baseline, method)):
            theirs = values.get(other, {})
            alone = sorted(values.get(one, {}).keys() - theirs.keys())
            if alone and theirs:
                counts = "they count" if len(alone) > 1 else "it counts"
                notes.append(
                    f"{one} has {_named(alone)} and {other} has not: {counts} in the mean of "
                    f"{one}, not in the difference."
                )
    return notes


def _absent(
    values: Mapping[str, Mapping[int, float]],
    missing: Mapping[str, Sequence[Run]],
    baseline: str,
    seeds: Sequence[int],
) -> list[str]:
    """Name the seeds that a method has no run of, and `_lonely` does not name."""
    methods: dict[tuple[int, ...], list[str]] = {}
    for method, own in values.items():
        others = [theirs for name, theirs in values.items() if name != method]
        told = others if method == baseline else [values.get(baseline, {})]
        begun = {run.seed for run in missing[method]}
        absent = sorted(set(seeds).difference(own, begun, *told))
        if own and absent:
            methods.setdefault(tuple(absent), []).append(method)
    return [
        f"{' and '.join(names)} {'have' if len(names) > 1 else 'has'} no run of {_named(absent)}, "
        "which other runs of this report have."
        for absent, names in methods.items()
    ]


def _named(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _shared(runs: Sequence[Run]) -> list[str]:
    """Name the methods that have one and the same run."""
    methods: dict[Path, list[str]] = {}
    for run in runs:
        methods.setdefault(run.folder, []).append(run.method)
    groups = dict.fromkeys(tuple(group) for group in methods.values() if len(group) > 1)
    return [
        f"{' and '.join(group)} share one run a seed: what they change does not reach it."
        for group in groups
    ]


def _corrected(rows: list[Row]) -> list[Row]:
    """Add to every downstream row the p-values corrected for all of them together."""
    tests = {
        (i, method): difference.p_value
        for i, row in enumerate(rows)
        if row.role == "downstream"
        for method, difference in row.differences.items()
        if difference.p_value is not None
    }
    corrected = dict(zip(tests, holm(list(tests.values())), strict=True))
    return [
        replace(row, corrected={m: corrected[i, m] for m in row.differences if (i, m) in corrected})
        for i, row in enumerate(rows)
    ]


def _differing(runs: list[Run]) -> list[str]:
    """Name what all runs of a task must share, and do not."""
    records: list[dict[str, Any]] = []
    for run in runs:
        shared = {key: run.results.get(key) for key in ("primary_metric", "iterations")}
        data = run.environment.get("data")
        prints = data.items() if isinstance(data, dict) else ()
        record = {**run.results["protocol"], **shared}
        record |= {f"the images of {split}": text for split, text in prints}
        versions = run.environment.get("versions")
        for package in ("tract_transfer", "torch"):
            record[f"{package}'s version"] = (
                versions.get(package) if isinstance(versions, dict) else None
            )
        git = run.environment.get("git")
        record["the code's commit"] = git.get("commit") if isinstance(git, dict) else None
        records.append(record)
    keys = dict.fromkeys(key for record in records for key in record)
    return [key for key in keys if len({repr(record.get(key)) for record in records}) > 1]
