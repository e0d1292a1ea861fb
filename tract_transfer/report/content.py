"""Everything a report says, as plain values: each format writes the same content."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tract_transfer.report.compare import Row, by_task, compare, methods_of, pairs
from tract_transfer.report.curves import Evaluations, SpeedUpRow, evaluations_of, speed_ups
from tract_transfer.report.paper import PaperRow, beside_the_paper
from tract_transfer.report.runs import Run, find_runs, is_finite, read_runs
from tract_transfer.report.statistics import (
    PairedDifference,
    Summary,
    interval,
    is_loss,
    paired_difference,
    summarize,
)

# --- What the downstream tasks say of each method, in a sentence, and no more than they say.

_FEW_PAIRS = 5


def answer(rows: Sequence[Row], baseline: str) -> list[str]:
    """Return one sentence for each treated method: what it gains over tasks, and how sure that is.

    Args:
        rows: of the primary metrics, as `compare` returns them.
    """
    methods = dict.fromkeys(m for row in rows for m in row.values if m != baseline)
    downstream = [row for row in rows if row.role == "downstream"]
    return [_sentence(method, downstream, baseline) for method in methods]


def mean_over_tasks(rows: Sequence[Row], method: str, baseline: str) -> PairedDifference | None:
    """Return the difference of the means over downstream tasks, paired by seed.

    Only seeds that both methods have on every task count: a mean over other tasks is another
    number. The interval is for new seeds on these tasks, and says nothing of other tasks.

    Returns:
        None where there is no such seed, or a task is judged by a loss.
    """
    own = [row for row in rows if row.role == "downstream"]
    if not own or any(is_loss(row.metric) for row in own):
        return None
    both = [row.values.get(m, {}).keys() for row in own for m in (method, baseline)]
    shared = set.intersection(*map(set, both))
    if not shared:
        return None

    def means(of: str) -> dict[int, float]:
        return {seed: sum(row.values[of][seed] for row in own) / len(own) for seed in shared}

    return paired_difference(means(method), means(baseline))


def _sentence(method: str, rows: Sequence[Row], baseline: str) -> str:
    measured = [row for row in rows if method in row.differences]
    if not measured:
        return f"{method} and {baseline} share no finished seed of a downstream task yet."
    overall = mean_over_tasks(measured, method, baseline)
    parts = [] if overall is None else [_averaged(method, measured, baseline, overall)]
    if overall is None or len(measured) > 1:
        parts.append(f"{'it' if parts else method} {_counted(method, measured)}")
    if unmeasured := len(rows) - len(measured):
        parts.append(f"{unmeasured} task{'s have' if unmeasured > 1 else ' has'} no pair yet")
    return f"{'; '.join(parts)}."


def _averaged(method: str, rows: Sequence[Row], baseline: str, overall: PairedDifference) -> str:
    """Say the mean over tasks with its interval, and what that interval allows to say."""
    tasks = rows[0].task if len(rows) == 1 else f"the mean of {len(rows)} downstream tasks"
    where = f"On {tasks}, {method} is"
    shown = f"{abs(100 * overall.mean):.2f}"
    points = "less than 0.01 points" if shown == "0.00" else f"{shown} points"
    side = "ahead of" if overall.mean > 0 else "behind"
    text = (
        f"{where} {points} {side} {baseline}" if overall.mean else f"{where} level with {baseline}"
    )
    seeds = max(len(row.seeds) for row in rows)
    count = f"{overall.n} of {seeds}" if overall.n < seeds else f"{overall.n}"
    over = f"{count} paired seed{'s' * (max(overall.n, seeds) > 1)}"
    if len(rows) > 1 and overall.n < seeds:
        over += " (those that all tasks have)"
    if overall.n == 1:
        return f"{text} ({over}), which may be chance: one pair has no interval"
    if overall.p_value is None:
        return f"{text} with each of {over}, so that there is no spread to judge it by"
    text += f", 95 % interval {interval(overall, '')} over {over}"
    if overall.excludes_zero:
        return f"{text}: more than the spread of seeds"
    few = ", and so few seeds could hardly show one" if overall.n < _FEW_PAIRS else ""
    return f"{text}: no difference is shown{few}"


def _counted(method: str, rows: Sequence[Row]) -> str:
    """Say on how many tasks a method is ahead and behind, and where that is significant."""
    gains = {
        row.task: row.differences[method].mean * (-1 if is_loss(row.metric) else 1) for row in rows
    }
    ahead = [task for task, gain in gains.items() if gain > 0]
    behind = [task for task, gain in gains.items() if gain < 0]
    text = f"is ahead on {len(ahead)} of {len(rows)} task{'s' * (len(rows) > 1)}"
    text += f" and behind on {len(behind)}" if behind else ""
    clear = {row.task for row in rows if row.corrected.get(method, 1) < 0.05}
    if not any(method in row.corrected for row in rows):
        return f"{text}; no task has the pairs, or the spread, for a test"
    if not clear:
        return f"{text}, on none significantly (Holm)"
    sides = [
        f"{len(names)} {side} ({', '.join(names)})"
        for side, names in (
            ("ahead", [task for task in ahead if task in clear]),
            ("behind", [task for task in behind if task in clear]),
        )
        if names
    ]
    return f"{text}, significantly (Holm) {' and '.join(sides)}"


TITLE, BASELINE = "Does the backbone transfer?", "vanilla"
_LABELS = ("seed", "output_dir", "name", "method")  # of a run, not of its protocol


@dataclass(frozen=True)
class ClassRow:
    """A class's own number: accuracy, or average precision at IoU 0.5."""

    name: str
    summaries: dict[str, Summary]
    differences: dict[str, PairedDifference]


@dataclass(frozen=True)
class CostRow:
    """What something cost on a task: means over seeds, and as a multiple of the baseline's.

    Attributes:
        counts: method -> the number of seeds behind its mean.
    """

    task: str
    quantity: str
    unit: str
    means: dict[str, float]
    counts: dict[str, int]
    ratios: dict[str, float]


@dataclass(frozen=True)
class Card:
    """A part of a task's protocol: key -> method -> values where runs differ, else key -> value."""

    heading: str
    differing: dict[str, dict[str, list[str]]]
    shared: dict[str, str]


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Attributes:
        methods: the baseline first.
        tasks: task -> its finished runs, downstream tasks first.
        rows, every_row: of the primary metrics, and of all.
        classes: task -> its classes, those that changed most first.
        problems: what could not be read, and what was left out.
    """

    title: str
    baseline: str
    methods: list[str]
    answer: list[str]
    runs: list[Run]
    tasks: dict[str, list[Run]]
    rows: list[Row]
    every_row: list[Row]
    evaluations: list[Evaluations]
    speed_ups: list[SpeedUpRow]
    classes: dict[str, list[ClassRow]]
    costs: list[CostRow]
    paper: list[PaperRow]
    cards: dict[str, list[Card]]
    problems: list[str]

    @property
    def treated(self) -> list[str]:
        """The methods that are compared with the baseline."""
        return [method for method in self.methods if method != self.baseline]

    @property
    def seeds(self) -> int:
        """How many seeds runs of any task have or should have had."""
        return max((len(row.seeds) for row in self.rows), default=0)

    @property
    def unfinished(self) -> list[Run]:
        """The runs without usable results."""
        return [run for run in self.runs if run.failure]


def read_report(
    paths: Sequence[Path], baseline: str | None = None, title: str | None = None
) -> Report:
    """Read run folders, suites' folders, and folders that hold either, into one report.

    Args:
        baseline: the method that others are compared with; None takes the suite's, or "vanilla", or
            the only one that there is.
        title: None takes the suite's.

    Raises:
        ValueError: no run is found, a suite's plan cannot be used, two runs are the same task,
            method and seed, no run is of the baseline, or there is none to take.
    """
    found = find_runs(paths)
    runs = read_runs(found)
    baseline = _baseline(runs, baseline, found.baseline)
    methods = methods_of(runs, baseline)
    rows, tasks = compare(runs, baseline), by_task(runs)
    evaluations = [evaluations_of(own) for own in tasks.values()]
    paper, unmatched = beside_the_paper(tasks)
    return Report(
        title=title or found.title or TITLE,
        baseline=baseline,
        methods=methods,
        answer=answer(rows, baseline),
        runs=runs,
        tasks=tasks,
        rows=rows,
        every_row=compare(runs, baseline, every_metric=True),
        evaluations=evaluations,
        speed_ups=speed_ups(evaluations, rows, baseline),
        classes={task: _classes(own, methods, baseline) for task, own in tasks.items()},
        costs=[row for task, own in tasks.items() for row in _costs(task, own, baseline)],
        paper=paper,
        cards={task: _cards(own) for task, own in tasks.items()},
        problems=[
            *found.problems,
            *unmatched,
            *(problem for run in runs for problem in run.problems),
        ],
    )


def _baseline(runs: Sequence[Run], named: str | None, planned: str) -> str:
    """Return the method that others are compared with."""
    methods = sorted({run.method for run in runs if run.method})
    baseline = named or planned or BASELINE
    if not methods or baseline in methods:
        return baseline
    if named or planned:
        raise ValueError(
            f"The baseline must be a method of the runs, and {baseline!r} is none of {methods}. "
            "Name one of them (--baseline), or add its runs."
        )
    if len(methods) > 1:
        raise ValueError(
            f"The runs are of {', '.join(methods)}, and none of {BASELINE}, with which the others "
            f"would be compared. Name another for that, as in --baseline {methods[0]}, or add runs "
            f"of {BASELINE}."
        )
    return methods[0]


def _classes(runs: Sequence[Run], methods: Sequence[str], baseline: str) -> list[ClassRow]:
    values: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs:
        for name, value in _per_class(run).items():
            if is_finite(value) and run.seed is not None:
                by_method = values.setdefault(str(name), {method: {} for method in methods})
                by_method[run.method][run.seed] = float(value)
    rows = [
        ClassRow(
            name,
            {method: summarize(list(seeds.values())) for method, seeds in own.items() if seeds},
            pairs(own, baseline, resample=False),
        )
        for name, own in values.items()
    ]
    return sorted(rows, key=_largest_change, reverse=True)


def _largest_change(row: ClassRow) -> float:
    return max((abs(difference.mean) for difference in row.differences.values()), default=0.0)


def _per_class(run: Run) -> dict[str, Any]:
    """Return class -> value: a probe has them among the details of its own name."""
    details = run.results["details"]
    parts = [details, *(part for name, part in details.items() if _is_of(name, run))]
    found = [part["per_class"] for part in parts if isinstance(part, dict) and "per_class" in part]
    return found[0] if found and isinstance(found[0], dict) else {}


def _is_of(name: str, run: Run) -> bool:
    return run.primary_metric.startswith(f"{name}_")


def _costs(task: str, runs: Sequence[Run], baseline: str) -> list[CostRow]:
    rows = []
    for quantity, unit, of in (
        ("training", "s", lambda run: run.results.get("train_seconds")),
        ("speed", "images/s", lambda run: run.results.get("images_per_second")),
        ("peak memory of the process", "MiB", lambda run: _memory(run, "process")),
        ("peak memory of the GPU", "MiB", lambda run: _memory(run, "gpu")),
        ("energy of the machine", "kJ", _kilojoules),
    ):
        values: dict[str, dict[int, float]] = {}
        for run in runs:
            value = of(run)
            if is_finite(value) and run.seed is not None:
                values.setdefault(run.method, {})[run.seed] = float(value)
        means = {method: summarize(list(own.values())).mean for method, own in values.items()}
        counts = {method: len(own) for method, own in values.items()}
        base, ratios = values.get(baseline, {}), {}
        for method, own in values.items():
            shared = base.keys() & own.keys()
            below = sum(base[seed] for seed in shared)
            if method != baseline and below:
                ratios[method] = sum(own[seed] for seed in shared) / below
        if means:
            rows.append(CostRow(task, quantity, unit, means, counts, ratios))
    return rows


def _memory(run: Run, of: str) -> float | None:
    cost = run.results.get("cost")
    memory = cost.get("peak_memory_bytes") if isinstance(cost, dict) else None
    peak = memory.get(of) if isinstance(memory, dict) else None
    return peak / 2**20 if is_finite(peak) else None


def _kilojoules(run: Run) -> float | None:
    cost = run.results.get("cost")
    joules = cost.get("energy_joules") if isinstance(cost, dict) else None
    if not isinstance(joules, dict) or not all(map(is_finite, joules.values())):
        return None
    return sum(joules.values()) / 1e3


def _cards(runs: Sequence[Run]) -> list[Card]:
    methods = {run.method for run in runs}
    parts: dict[str, dict[str, dict[str, list[str]]]] = {}
    for run in runs:
        config = {key: value for key, value in run.config.items() if key not in _LABELS}
        own = {"Protocol": run.results["protocol"], "Configuration": config}
        environment = {key: value for key, value in run.environment.items() if key != "command"}
        for heading, part in {**own, "Environment and data": environment}.items():
            for key, text in _flatten(part).items():
                texts = parts.setdefault(heading, {}).setdefault(key, {})
                values = texts.setdefault(run.method, [])
                values += [text] if text not in values else []
    cards = []
    for heading, keys in parts.items():
        shared = {
            key: next(iter(by.values()))[0]
            for key, by in keys.items()
            if by.keys() == methods and len({text for own in by.values() for text in own}) == 1
        }
        cards.append(Card(heading, {k: by for k, by in keys.items() if k not in shared}, shared))
    return cards


def _flatten(value: Any, key: str = "") -> dict[str, str]:
    """Return nested mappings as dotted key -> text."""
    if isinstance(value, Mapping) and value:
        items = [_flatten(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()]
        return {k: v for item in items for k, v in item.items()}
    return {key: value if isinstance(value, str) else _text(value)} if key else {}


def _text(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except TypeError:  # keys that JSON does not know, such as YAML's dates
        return str(value)
