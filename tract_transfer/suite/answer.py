"""What the downstream tasks say of each method, in a sentence, and no more than they say."""

from collections.abc import Sequence

from tract_transfer.suite.compare import Row
from tract_transfer.suite.statistics import PairedDifference, paired_difference
from tract_transfer.suite.wording import interval, is_loss

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
