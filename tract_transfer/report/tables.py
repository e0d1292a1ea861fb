"""The tables of a report as text, which every format renders in its own way."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tract_transfer.report.content import Report, Row
from tract_transfer.report.statistics import (
    DASH,
    PairedDifference,
    bounds,
    count_missing,
    count_of,
    gap,
    interval,
    metric_name,
    or_dash,
    p_value,
    score,
    spread,
)

_MEANS = "Mean ± standard deviation over all seeds; (1 of 2) marks a mean over fewer."
_CAPTIONS = {
    "means": _MEANS,
    "results": f"{_MEANS} Differences pair runs with the same seed and are in percentage points "
    "(losses: unscaled), with the 95 % t interval and the number of pairs.",
    "statistics": "Each comparison with the baseline. sd: standard deviation of the paired "
    "differences. p: two-sided paired t-test. Holm: p corrected for all comparisons of downstream "
    "tasks. g: effect size, the mean difference over sd, corrected for few pairs. Bootstrap: "
    "studentised 95 % interval, from 5 pairs on. p, signs: sign-flip test, from 6 pairs on.",
    "speed-ups": "Epochs until an evaluation first reaches a value, interpolated between "
    "evaluations; mean over seeds. The value is a share of the baseline's lowest final value. "
    "Before the first: the first evaluation exceeds the value, so the epoch is unknown. The "
    "speed-up is the baseline's epochs over the method's: geometric mean over seeds with its 95 % "
    "t interval. All runs have the same schedule; the speed-up does not predict runs with a "
    "shorter one.",
    "classes": "Change of each class in percentage points; the intervals are not corrected for the "
    "number of classes.",
    "cost": "Mean over all seeds; (1 of 2) marks a mean over fewer. × is relative to the baseline, "
    "over shared seeds. Time, memory and energy are comparable only between runs on the same "
    "machine with nothing else running. Memory excludes data workers; energy includes the whole "
    "machine.",
    "paper": "In percent. The paper's numbers are from arXiv 2410.23970; differences in setup are "
    "listed below, as far as the config and the paper show them.",
    "unfinished": "Runs that are planned or started but enter no number.",
}


@dataclass(frozen=True)
class Table:
    """A table of text, with a cell for each column of `head` in each of `rows`."""

    name: str  # of letters and hyphens; unique, except for tables of a `task`
    caption: str
    head: list[str]
    rows: list[list[str]]
    words: int = 1  # the first columns hold words, the others numbers
    heading: str = ""  # of its section; empty if it belongs to that of the table before
    notes: list[str] = field(default_factory=list)  # sentences below the table
    task: str = ""


def tables_of(report: Report) -> list[Table]:
    """Return the tables that have rows, in the order of the page."""
    more = report.all_metrics if len(report.all_metrics) > len(report.results) else []
    tables = [
        results_table(report, report.results),
        _statistics(report),
        # Its notes are the same as below the results.
        replace(results_table(report, more), name="all-metrics", heading="All metrics", notes=[]),
        _speed_ups(report),
        *(_classes(report, task) for task in report.classes),
        _costs(report),
        _paper(report),
        *(table for task in report.protocol for table in _protocol(report, task)),
        _unfinished(report),
    ]
    return [table for table in tables if table.rows]


def results_table(report: Report, rows: Sequence[Row]) -> Table:
    """Return metrics by task and method; the notes are those of `rows`."""
    methods, treated = report.methods, report.treated
    head = ["task", "metric", *methods]
    head += [f"{method} − {report.baseline} [95 %], pairs" for method in treated]
    cells = []
    for row in rows:
        seeds, metric, summaries = len(row.seeds), row.metric, row.summaries
        counts = {m: count_missing(summary.n, seeds) for m, summary in summaries.items()}
        means = [_noted(spread(summaries.get(m), metric), counts.get(m, "")) for m in methods]
        changes = [_change(row.differences.get(m), metric, seeds) for m in treated]
        cells.append([row.task, metric_name(metric) or DASH, *means, *changes])
    notes = [f"{row.task}: {note}" for row in rows for note in row.notes]
    caption = _CAPTIONS["results" if treated else "means"]
    return Table("results", caption, head, cells, 2, "Results", notes)


def _change(difference: PairedDifference | None, metric: str, seeds: int = 0) -> str:
    """Return a difference, its interval and, of a number of seeds, its pairs; a dash for None."""
    if difference is None:
        return DASH
    pairs = f", {count_of(difference.n, seeds)}" if seeds else ""
    return f"{gap(difference.mean, metric)} {interval(difference, metric)}{pairs}"


def _noted(text: str, *notes: str) -> str:
    """Return a text with the notes that are not empty in parentheses."""
    return f"{text} ({'; '.join(filter(None, notes))})" if any(notes) else text


def _statistics(report: Report) -> Table:
    """Return every number of each comparison; the notes say what few pairs cannot show."""
    head = ["task", "method", "difference", "sd", "95 % t", "p", "Holm", "g", "bootstrap"]
    head += ["p, signs", "pairs"]
    rows: list[list[str]] = []
    remarks: dict[str, list[str]] = {}
    for row in report.results:
        metric = row.metric
        for method, d in row.differences.items():
            if d.remark:
                remarks.setdefault(d.remark, []).append(f"{row.task} ({method})")
            rows.append([
                row.task, method, gap(d.mean, metric),
                DASH if d.std is None else score(d.std, metric), interval(d, metric),
                p_value(d.p_value), p_value(row.corrected.get(method)),
                or_dash(d.effect_size, "{:+.2f}"), bounds(d.bootstrap, metric),
                p_value(d.permutation_p), count_of(d.n, len(row.seeds)),
            ])  # fmt: skip
    notes = [f"{', '.join(comparisons)}: {remark}" for remark, comparisons in remarks.items()]
    return Table("statistics", _CAPTIONS["statistics"], head, rows, words=2, notes=notes)


def _speed_ups(report: Report) -> Table:
    head = ["task", "to reach", "method", f"epochs of {report.baseline}", "epochs"]
    head.append("speed-up, pairs")
    rows = []
    for row in report.speed_ups:
        result, percent = row.result, f"{100 * row.result.target:.2f} %"
        bounds = f"({result.remark})"
        if result.low is not None and result.high is not None:
            bounds = f"[{result.low:.2f}, {result.high:.2f}]"
        rows.append([
            row.task,
            f"{percent} {metric_name(row.metric)} on {row.split} ({row.share:.0%} of the end)",
            row.method, _epochs(result.baseline), _epochs(result.treated),
            f"{or_dash(result.ratio, '× {:.2f}')} {bounds}, {count_of(row.pairs, row.seeds)}",
        ])  # fmt: skip
    return Table("speed-ups", _CAPTIONS["speed-ups"], head, rows, 3, "Speed-ups")


def _epochs(by_seed: dict[int, float | None]) -> str:
    """Return the mean epochs, or how many seeds have none and why."""
    reached = [epoch for epoch in by_seed.values() if epoch is not None and epoch < float("inf")]
    if len(reached) == len(by_seed):
        return f"{sum(reached) / len(reached):.1f}"
    early = list(by_seed.values()).count(None)
    counts = {"never": len(by_seed) - len(reached) - early, "before the first": early}
    return ", ".join(f"{text} in {n} seed{'s' * (n > 1)}" for text, n in counts.items() if n)


def _classes(report: Report, task: str) -> Table:
    """Return the classes of a task; the notes count those that change more than chance explains."""
    classes, notes = report.classes[task], []
    for method in report.treated:
        differences = [row.differences[method] for row in classes if method in row.differences]
        tested = [d for d in differences if d.p_value is not None]
        gains = [d.mean > 0 for d in tested if d.excludes_zero]
        if tested:
            notes.append(
                f"{method}: {len(tested)} classes have an interval. It excludes zero for "
                f"{gains.count(True)} that gain and {gains.count(False)} that lose; chance alone "
                f"would give about {0.05 * len(tested):.1f}."
            )
    rows = []
    for row in classes:
        means = [spread(row.summaries.get(method), "") for method in report.methods]
        gaps = [_change(row.differences.get(method), "") for method in report.treated]
        rows.append([row.name, *means, *gaps])
    head = ["class", *report.methods, *(f"{m} − {report.baseline} [95 %]" for m in report.treated)]
    heading = f"Classes of {task}"
    return Table("classes", _CAPTIONS["classes"], head, rows, 1, heading, notes, task)


def _costs(report: Report) -> Table:
    rows = []
    for row in report.costs:
        cells = []
        for method in report.methods:
            count = count_missing(row["counts"].get(method, 0), report.seeds)
            ratio = f"× {row['ratios'][method]:.2f}" if method in row["ratios"] else ""
            cells.append(_noted(or_dash(row["means"].get(method), "{:,.1f}"), count, ratio))
        rows.append([row["task"], f"{row['quantity']}, {row['unit']}", *cells])
    return Table("cost", _CAPTIONS["cost"], ["task", "cost", *report.methods], rows, 2, "Cost")


def _paper(report: Report) -> Table:
    head = ["task", "row of the paper", "metric", "vanilla, paper", "TrAct, paper"]
    head += [f"{method}, here" for method in report.methods]
    rows, notes = [], []
    for row in report.paper:
        theirs = [
            or_dash(mean, "{:.2f}") + ("" if std is None else f" ± {std:.2f}")
            for mean, std in (row.paper["vanilla"], row.paper["tract"])
        ]
        ours = [spread(row.ours.get(method), row.metric) for method in report.methods]
        rows.append([row.task, row.title, metric_name(row.metric), *theirs, *ours])
        setup = f"differs in {'; '.join(row.differing)}" if row.differing else "shows no difference"
        notes.append(f"{row.task}, {metric_name(row.metric)}: the setup {setup}.")
    return Table("paper", _CAPTIONS["paper"], head, rows, 3, "Comparison with the paper", notes)


def _protocol(report: Report, task: str) -> list[Table]:
    """Return two tables for each part of a protocol: what differs between runs, and the rest."""
    tables: list[Table] = []
    for part in report.protocol[task]:
        differing = [
            [key, *("; ".join(values.get(method, [DASH])) for method in report.methods)]
            for key, values in part["differing"].items()
        ]
        shared = [list(item) for item in part["shared"].items()]
        for state, head, rows in (
            ("where runs differ", ["key", *report.methods], differing),
            ("the same in every run", ["key", "value"], shared),
        ):
            if rows:
                caption = f"{part['heading']}, {state}"
                heading = "" if tables else f"Protocol of {task}"
                tables.append(Table("protocol", caption, head, rows, len(head), heading, task=task))
    return tables


def _unfinished(report: Report) -> Table:
    head = ["task", "method", "seed", "state", "why", "folder"]
    rows = []
    for run in report.unfinished:
        seed = DASH if run.seed is None else str(run.seed)
        labels = [run.task or DASH, run.method or DASH, seed]
        rows.append([*labels, run.state, run.failure, run.folder.as_posix()])
    return Table("unfinished", _CAPTIONS["unfinished"], head, rows, len(head), "Unfinished runs")
