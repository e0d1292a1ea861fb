"""What a suite shows while it runs: a live table, or plain lines where there is no terminal."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from tract_transfer.suite.journal import Job
from tract_transfer.suite.plan import count_states
from tract_transfer.suite.progress import Clock, fraction_done, in_words, suite_left

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
