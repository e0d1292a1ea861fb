"""How far runs are: read from their metrics.jsonl, as anybody can."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tract_transfer.suite.journal import Job
from tract_transfer.suite.plan import PlannedRun

_TAIL_BYTES = 8192


def fraction_done(run: PlannedRun) -> float | None:
    """Return how much of a run's training is done, in [0, 1]; None where nothing tells."""
    solver = run.config.get("solver")
    last = _last_line(run.folder / "metrics.jsonl")
    if not isinstance(solver, Mapping) or last is None:
        return None
    for key, length in (("iteration", "max_iters"), ("epoch", "max_epochs")):
        if solver.get(length) and isinstance(last.get(key), int | float):
            return min(1.0, float(last[key]) / float(solver[length]))
    return None


class Clock:
    """Estimates when runs end, from how far they have come since they were started."""

    def __init__(self) -> None:
        self._began: dict[Path, tuple[float, float]] = {}  # when, and how far it was then

    def start(self, run: PlannedRun) -> None:
        """Note that an attempt at a run begins."""
        self._began[run.folder] = (time.monotonic(), fraction_done(run) or 0.0)

    def seconds(self, run: PlannedRun) -> float:
        """Return how long ago the attempt began."""
        began = self._began.get(run.folder)
        return time.monotonic() - began[0] if began else 0.0

    def left(self, run: PlannedRun, fraction: float | None) -> float | None:
        """Return the seconds that a run needs to its end; None while that cannot be told."""
        if fraction is None or run.folder not in self._began:
            return None
        began, at = self._began[run.folder]
        if fraction <= at:
            return None
        return (time.monotonic() - began) / (fraction - at) * (1 - fraction)


def suite_left(jobs: Sequence[Job], left: Mapping[Path, float | None]) -> float | None:
    """Return the seconds until all runs are done: None until a run of each open task has ended.

    Args:
        left: folder of each running job -> its own seconds to go, where they can be told.
    """
    by_task: dict[str, list[float]] = {}
    for job in jobs:
        if job.seconds is not None:
            by_task.setdefault(job.run.task, []).append(job.seconds)
    means = {task: sum(each) / len(each) for task, each in by_task.items()}
    total = 0.0
    for job in jobs:
        if job.state not in ("waiting", "running"):
            continue
        own = left.get(job.run.folder) if job.state == "running" else None
        own = means.get(job.run.task) if own is None else own
        if own is None:
            return None
        total += own
    return total / max(1, sum(job.state == "running" for job in jobs))


def in_words(seconds: float | None) -> str:
    """Return `1:02:03`, `4:05`, or `` for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def result_in_words(results: Mapping[str, Any] | None) -> str:
    """Return `top1 91.25%` of a run's results."""
    if results is None:
        return ""
    metric = results["primary_metric"]
    value = results["metrics"][metric]
    return f"{metric} {value:.2%}" if isinstance(value, int | float) else f"{metric} {value}"


def _last_line(file: Path) -> dict[str, Any] | None:
    """The last whole line of a file of JSON lines; None where there is none."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]
        line = json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):
        return None
    return line if isinstance(line, dict) else None
