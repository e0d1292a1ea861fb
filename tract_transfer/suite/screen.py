"""What a suite shows while it runs: a live table, or plain lines where there is no terminal."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from tract_transfer.suite.journal import Job
from tract_transfer.suite.plan import PlannedRun, count_states

# --- How far runs are: read from their metrics.jsonl, as anybody can.

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


_LINE_SECONDS = 60.0
_REFRESH_SECONDS = 1.0
_ENDED_ROWS, _WAITING_ROWS = 8, 4
_COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "blocked": "yellow"}


class Lines:
    """A line for every change, and one a minute for each run under way."""

    def __init__(self, out: TextIO, total: int) -> None:
        self._out, self._total, self._clock = out, total, Clock()
        self._said_at = time.monotonic()
        self._done = 0

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()

    def skipped(self, job: Job) -> None:
        """A run was finished before."""
        self._done += 1
        self._say(job, "finished before")

    def started(self, job: Job) -> None:
        """A run has begun, or goes on."""
        self._clock.start(job.run)
        self._say(job, f"started{f' ({job.note})' if job.note else ''}")

    def ended(self, job: Job, result: str) -> None:
        """A run is finished, failed, is tried again or blocked."""
        self._done += job.state != "waiting"
        took = f"  ({_took(job)})" if job.state == "finished" and job.last else ""
        self._say(job, f"{result}{took}")

    def show(self, jobs: Sequence[Job]) -> None:
        """Say how far runs are, once a minute."""
        if time.monotonic() - self._said_at < _LINE_SECONDS:
            return
        self._said_at = time.monotonic()
        left = {}
        for job in jobs:
            if job.state == "running":
                fraction = fraction_done(job.run)
                left[job.run.folder] = self._clock.left(job.run, fraction)
                eta = in_words(left[job.run.folder])
                known = "" if fraction is None else f" {fraction:.0%}"
                self._say(job, f"running{known}{f', {eta} left' if eta else ''}")
        print(_sum_up(jobs, suite_left(jobs, left)), file=self._out, flush=True)

    def _say(self, job: Job, what: str) -> None:
        text = f"[{self._done}/{self._total}] {job.run.title}  {what}"
        print(text, file=self._out, flush=True)


class LiveTable:
    """The runs under way, those that ended last, and those that come next."""

    def __init__(self, console: Console, total: int) -> None:
        self._total, self._clock = total, Clock()
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._results: dict[str, str] = {}
        self._shown_at = 0.0

    def __enter__(self) -> "LiveTable":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def skipped(self, job: Job) -> None:
        """A run was finished before; the last line counts them."""

    def started(self, job: Job) -> None:
        """A run has begun, or goes on."""
        self._clock.start(job.run)
        self._shown_at = 0.0

    def ended(self, job: Job, result: str) -> None:
        """A run is finished, failed, is tried again or blocked."""
        self._results.pop(str(job.run.folder), None)
        self._results[str(job.run.folder)] = result
        self._shown_at = 0.0

    def show(self, jobs: Sequence[Job]) -> None:
        """Draw the table anew, once a second."""
        if time.monotonic() - self._shown_at < _REFRESH_SECONDS:
            return
        self._shown_at = time.monotonic()
        self._live.update(self.table(jobs), refresh=True)

    def table(self, jobs: Sequence[Job]) -> Table:
        """Return the table."""
        table = Table(box=None, pad_edge=False)
        for name in ("state", "seed", "task", "method", "done", "time", "left", "result"):
            right = name in ("done", "time", "left", "seed")
            table.add_column(
                name, justify="right" if right else "left", no_wrap=name != "result",
                overflow="fold",
            )  # fmt: skip
        by_folder = {str(job.run.folder): job for job in jobs}
        ended = [by_folder[folder] for folder in self._results]
        ended = [job for job in ended if job.state not in ("waiting", "running")][-_ENDED_ROWS:]
        waiting = [job for job in jobs if job.state == "waiting"]
        left = {}
        for job in [*ended, *(job for job in jobs if job.state == "running")]:
            is_running = job.state == "running"
            fraction = fraction_done(job.run) if is_running else None
            if is_running:
                left[job.run.folder] = self._clock.left(job.run, fraction)
            took = self._clock.seconds(job.run) if is_running else job.last
            self._row(
                table, job, "" if fraction is None else f"{fraction:.0%}", in_words(took or None),
                in_words(left.get(job.run.folder)),
            )  # fmt: skip
        for job in waiting[:_WAITING_ROWS]:
            self._row(table, job, "", "", "")
        table.caption = _sum_up(jobs, suite_left(jobs, left))
        table.caption_justify = "left"
        return table

    def _row(self, table: Table, job: Job, done: str, took: str, left: str) -> None:
        colour = _COLOURS.get(job.state, "dim")
        result = self._results.get(str(job.run.folder), job.note)
        cells = (str(job.run.seed), job.run.task, job.run.method, done, took, left, escape(result))
        table.add_row(f"[{colour}]{job.state}[/]", *cells)


def make_screen(total: int) -> Lines | LiveTable:
    """Return the screen for where standard error goes."""
    if sys.stderr.isatty():
        return LiveTable(Console(stderr=True), total)
    return Lines(sys.stderr, total)


def _took(job: Job) -> str:
    """Return the time of a run's last start, and that there were others before it."""
    before = job.attempts - 1
    starts = f"; {before} start{'s' * (before > 1)} before it" if before > 0 else ""
    return f"{in_words(job.last)}{starts}"


def _sum_up(jobs: Sequence[Job], left: float | None) -> str:
    text = count_states([job.state for job in jobs])
    return f"{text}; about {in_words(left)} left" if left else text
