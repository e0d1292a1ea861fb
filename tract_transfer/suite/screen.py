"""What a suite shows while it runs: a line for each change, and progress in a terminal."""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.text import Text

from tract_transfer.files import METRICS_NAME
from tract_transfer.suite.state import Job

_REFRESH_SECONDS = 1.0
_SPEED_SECONDS = 1e6  # the speed is the mean since the start
_STYLES = {"finished": "green", "failed": "red", "blocked": "yellow"}


class Screen:
    """Prints a line for each change, and shows progress bars below in a terminal.

    Args:
        console: where to print; None is standard error.
        total: number of runs.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            console=self._console,
            auto_refresh=False,  # a thread of its own would be in the way of forks
            transient=True,
            speed_estimate_period=_SPEED_SECONDS,
            disable=not self._console.is_terminal,
        )
        self._suite = self._progress.add_task("runs", total=total)
        self._tasks: dict[Path, TaskID] = {}  # by run folder
        self._total, self._done, self._shown_at = total, 0, 0.0

    def __enter__(self) -> "Screen":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, job: Job) -> None:
        """Show that a run has started or resumed."""
        self._tasks[job.run.folder] = self._progress.add_task(job.run.title, total=None)
        self._print(job, f"started{f' ({job.note})' if job.note else ''}")

    def ended(self, job: Job, result: str) -> None:
        """Show that a run finished, failed, is retried or is blocked."""
        self._done += job.state != "waiting"
        if (task := self._tasks.pop(job.run.folder, None)) is not None:
            self._progress.remove_task(task)
        if job.state == "finished" and job.last:
            before = job.attempts - 1
            starts = f"; {before} earlier start{'s' * (before > 1)}" if before > 0 else ""
            result += f"  ({timedelta(seconds=round(job.last))}{starts})"
        self._print(job, result, _STYLES.get(job.state, ""))

    def show(self, jobs: Sequence[Job]) -> None:
        """Update the progress bars, at most once a second."""
        if self._progress.disable or time.monotonic() - self._shown_at < _REFRESH_SECONDS:
            return
        self._shown_at = time.monotonic()
        for job in jobs:
            if job.state == "running" and (fraction := fraction_done(job)) is not None:
                self._progress.update(self._tasks[job.run.folder], completed=fraction, total=1)
        self._progress.update(self._suite, completed=self._done, refresh=True)

    def _print(self, job: Job, text: str, style: str = "") -> None:
        line = f"[{self._done}/{self._total}] {job.run.title}  {text}"
        self._console.print(Text(line, style), soft_wrap=True)


def fraction_done(job: Job) -> float | None:
    """Return how much of its training a run has done, in [0, 1]; None if metrics.jsonl lacks it."""
    try:
        text = (job.run.folder / METRICS_NAME).read_bytes()
        last = json.loads(text.rpartition(b"\n")[0].rpartition(b"\n")[2])  # the last complete line
        solver = job.run.config["solver"]
        key, length = ("epoch", "max_epochs")
        if solver["max_iters"]:
            key, length = ("iteration", "max_iters")
        return min(1.0, float(last[key] / solver[length]))
    except (OSError, ValueError, LookupError, TypeError):  # a probe's, or not written yet
        return None


def result_line(results: Mapping[str, Any] | None) -> str:
    """Return e.g. `top1 91.25%` for a run's results."""
    if results is None:
        return ""
    metric = results["primary_metric"]
    value = results["metrics"][metric]
    return f"{metric} {value:.2%}" if isinstance(value, int | float) else f"{metric} {value}"
