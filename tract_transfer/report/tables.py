"""The tables of a report as text, which every format then sets in its own way."""

from collections.abc import Sequence
from dataclasses import dataclass

from tract_transfer.report.compare import Row
from tract_transfer.report.content import Report
from tract_transfer.report.curves import SpeedUp
from tract_transfer.report.statistics import (
    PairedDifference,
    bounds,
    count_pairs,
    count_seeds,
    effect,
    factor,
    gap,
    interval,
    metric_name,
    number,
    p_value,
    spread,
)


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        name: unique in a report, of letters and hyphens.
        caption: what it holds and how to read it.
        rows: as many cells each as `head`; the first `words` columns hold words, the others
            numbers.
    """

    name: str
    caption: str
    head: list[str]
    rows: list[list[str]]
    words: int = 1


MEANS = "Mean ± standard deviation over all seeds of the report; a cell that says 1 of 2 has fewer."
RESULTS = (
    f"{MEANS} Differences pair runs of the same seed and are in percentage points (those of losses "
    "as they are), with their 95 % t interval and the number of pairs."
)
STATISTICS = (
    "Each comparison with the baseline. sd: of the paired differences. p: two-sided paired t-test; "
    "Holm: corrected for all comparisons of downstream tasks. g: effect size, the mean difference "
    "over sd, corrected for few pairs. Bootstrap: studentised, 95 %, from 5 pairs on. p, signs: by "
    "flipping the signs of the differences, from 6 pairs on."
)
SPEED_UPS = (
    "Epochs until a value is first reached, interpolated between evaluations, mean over seeds. "
    "Before the first: the first evaluation was past it, and the epoch is not known. The value is "
    "a share of what the slowest seed of the baseline ends at. The speed-up is the baseline's "
    "epochs over the method's, as a geometric mean over seeds with its 95 % t interval. It is of "
    "runs with one and the same schedule, and says nothing of runs planned to be shorter."
)
COSTS = (
    "Means over all seeds; a cell that says 1 of 2 has fewer. × is relative to the "
    "baseline, over shared seeds. Times, memory and energy compare only between runs on one "
    "machine with nothing beside them; memory is without data workers, and energy is the whole "
    "machine's."
)
PAPER = (
    "In percent. The paper's numbers are those of arXiv 2410.23970; what differs in the setup "
    "stands below, as far as config and paper tell."
)
CLASSES = (
    "Change of each class, percentage points; single intervals, not corrected for their number."
)


def results_table(rows: Sequence[Row], methods: Sequence[str], baseline: str) -> Table:
    """Return the metrics of `rows` by task and method."""
    treated = [method for method in methods if method != baseline]
    head = ["task", "metric", *methods, *(f"{m} − {baseline} [95 %], pairs" for m in treated)]
    lines = []
    for row in rows:
        gaps = []
        for method in treated:
            d = row.differences.get(method)
            gaps.append(
                f"{gap(d.mean, row.metric)} {interval(d, row.metric)}, {_pairs(row, d)}"
                if d
                else "–"
            )
        means = [_mean(row, method) for method in methods]
        lines.append([row.task, metric_name(row.metric) or "–", *means, *gaps])
    return Table("results", RESULTS if treated else MEANS, head, lines, words=2)


def _mean(row: Row, method: str) -> str:
    summary = row.summaries.get(method)
    count = count_seeds(summary, len(row.seeds))
    return spread(summary, row.metric) + (f" ({count})" if count else "")


def _pairs(row: Row, difference: PairedDifference) -> str:
    """Return the number of pairs for a column that is named so."""
    return count_pairs(difference, len(row.seeds)).removesuffix("s").removesuffix(" pair")


def statistics_table(report: Report) -> Table:
    """Return each comparison with all that is known of it."""
    head = ["task", "method", "difference", "sd", "95 % t", "p", "Holm", "g", "bootstrap"]
    head += ["p, signs", "pairs"]
    rows = [
        [
            row.task,
            method,
            gap(d.mean, row.metric),
            "–" if d.std is None else gap(d.std, row.metric).removeprefix("+"),
            interval(d, row.metric),
            p_value(d.p_value),
            p_value(row.corrected.get(method)),
            effect(d.effect_size),
            bounds(d.bootstrap, row.metric),
            p_value(d.permutation_p),
            _pairs(row, d),
        ]
        for row in report.rows
        for method, d in row.differences.items()
    ]
    return Table("statistics", STATISTICS, head, rows, words=2)


def remarks(report: Report) -> list[str]:
    """Return what n is too small to say and what keeps values from being compared, by task."""
    lines: dict[str, list[str]] = {}
    for row in report.rows:
        for method, difference in row.differences.items():
            if difference.remark:
                lines.setdefault(difference.remark, []).append(f"{row.task} ({method})")
    found = [f"{', '.join(where)}: {remark}" for remark, where in lines.items()]
    return found + [f"{row.task}: {note}" for row in report.rows for note in row.notes]


def speed_up_table(report: Report) -> Table:
    """Return the epochs that methods need to reach what the baseline reaches."""
    head = [
        "task",
        "to reach",
        "method",
        f"epochs of {report.baseline}",
        "epochs",
        "speed-up, pairs",
    ]
    rows = []
    for row in report.speed_ups:
        value = f"{100 * row.result.target:.2f} %"
        pairs = f"{row.pairs}" if row.pairs == row.seeds else f"{row.pairs} of {row.seeds}"
        reach = f"{value} {metric_name(row.metric)} on {row.split}, {row.share:.0%} of its end"
        result = row.result
        rows.append(
            [
                row.task,
                reach,
                row.method,
                _epochs(result.baseline),
                _epochs(result.treated),
                f"{speed_up_words(result)}, {pairs}",
            ]
        )
    return Table("speed-ups", SPEED_UPS, head, rows, words=3)


def speed_up_words(result: SpeedUp) -> str:
    """Return a speed-up with its interval, or why there is none."""
    if result.ratio is None:
        return f"– ({result.remark})"
    if result.low is None or result.high is None:
        return f"{factor(result.ratio)} ({result.remark})"
    return f"{factor(result.ratio)} [{result.low:.2f}, {result.high:.2f}]"


def class_table(report: Report, task: str, limit: int | None = None) -> Table:
    """Return the classes of a task, those that changed most first, `limit` of them."""
    head = ["class", *report.methods, *(f"{m} − {report.baseline} [95 %]" for m in report.treated)]
    rows = []
    for row in report.classes[task][:limit]:
        gaps = [
            f"{gap(d.mean, '')} {interval(d, '')}" if d else "–"
            for d in map(row.differences.get, report.treated)
        ]
        rows.append([row.name, *(spread(row.summaries.get(m), "") for m in report.methods), *gaps])
    return Table(f"classes-{task}", CLASSES, head, rows)


def class_sentences(report: Report, task: str) -> list[str]:
    """Return, for each method, how many classes gain and lose by more than chance would let."""
    sentences = []
    for method in report.treated:
        found = [
            row.differences[method] for row in report.classes[task] if method in row.differences
        ]
        tested = [difference for difference in found if difference.p_value is not None]
        clear = [difference for difference in tested if difference.excludes_zero]
        if tested:
            gains = sum(difference.mean > 0 for difference in clear)
            sentences.append(
                f"{method}: {len(tested)} classes have an interval. It excludes zero for {gains} "
                f"that gain and {len(clear) - gains} that lose; by chance alone it would for about "
                f"{0.05 * len(tested):.1f}."
            )
    return sentences


def cost_table(report: Report) -> Table:
    """Return times, speeds, memory and energy by task and method."""
    rows = []
    for row in report.costs:
        cells = []
        for method in report.methods:
            cell = number(row.means.get(method))
            count = row.counts.get(method, 0)
            told = [f"{count} of {report.seeds}"] if 0 < count < report.seeds else []
            told += [factor(row.ratios[method])] if method in row.ratios else []
            cells.append(f"{cell} ({'; '.join(told)})" if told else cell)
        rows.append([row.task, f"{row.quantity}, {row.unit}", *cells])
    return Table("cost", COSTS, ["task", "cost", *report.methods], rows, words=2)


def paper_table(report: Report) -> Table:
    """Return our numbers beside the paper's; a row's differences in setup are not in it."""
    head = ["task", "the paper's", "metric", "vanilla, paper", "TrAct, paper"]
    head += [f"{method}, here" for method in report.methods]
    rows = []
    for row in report.paper:
        theirs = [_percent(*row.paper[side]) for side in ("vanilla", "tract")]
        ours = [spread(row.ours.get(method), row.metric) for method in report.methods]
        rows.append([row.task, row.title, metric_name(row.metric), *theirs, *ours])
    return Table("paper", PAPER, head, rows, words=3)


def unfinished_table(report: Report) -> Table:
    """Return the runs that have no usable results, and why."""
    rows = [
        [
            run.task or "–",
            run.method or "–",
            "–" if run.seed is None else str(run.seed),
            run.state,
            run.failure,
            run.folder.as_posix(),
        ]
        for run in report.unfinished
    ]
    caption = "Runs that are planned or begun and count in no number."
    return Table(
        "unfinished", caption, ["task", "method", "seed", "state", "why", "folder"], rows, words=6
    )


def _percent(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def _epochs(by_seed: dict[int, float | None]) -> str:
    """Return the mean epochs of the seeds, or in how many it is not known, and why."""
    known = [epoch for epoch in by_seed.values() if epoch is not None and epoch < float("inf")]
    if len(known) == len(by_seed):
        return f"{sum(known) / len(known):.1f}"
    never = sum(epoch is not None for epoch in by_seed.values()) - len(known)
    early = len(by_seed) - len(known) - never
    parts = (("never", never), ("before the first", early))
    return ", ".join(f"{when} in {n} seed{'s' * (n > 1)}" for when, n in parts if n)
