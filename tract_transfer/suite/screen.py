"""What a suite shows while it runs: a line for each change, and progress."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tract_transfer.files import METRICS_NAME
from tract_transfer.suite.state import Job

_TAIL_BYTES = 8192
_REFRESH_SECONDS, _LINE_SECONDS = 1.0, 60.0
_STYLES = {"finished": "green", "failed": "red", "blocked": "yellow"}


class Screen:
    """Prints a line for each change. Shows running runs below it in a terminal, refreshed every
    second; elsewhere prints a line for each of them every minute.

    Args:
        console: where to print; None is standard error.
        total: number of runs.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=True)
            if self._console.is_terminal
            else None
        )
        self._total, self._done = total, 0
        self._starts: dict[Path, tuple[float, float]] = {}  # folder -> time, fraction done then
        self._shown_at = time.monotonic()

    def __enter__(self) -> "Screen":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def skipped(self, job: Job) -> None:
        """Show that a run was finished before."""
        self._done += 1
        self._print(self._line(job, "finished before"))

    def started(self, job: Job) -> None:
        """Show that a run has started or resumed."""
        self._starts[job.run.folder] = (time.monotonic(), fraction_done(job) or 0.0)
        self._print(self._line(job, f"started{f' ({job.note})' if job.note else ''}"))

    def ended(self, job: Job, result: str) -> None:
        """Show that a run finished, failed, is retried or is blocked."""
        self._done += job.state != "waiting"
        if job.state == "finished" and job.last:
            before = job.attempts - 1
            starts = f"; {before} earlier start{'s' * (before > 1)}" if before > 0 else ""
            result += f"  ({duration(job.last)}{starts})"
        self._print(self._line(job, result), _STYLES.get(job.state, ""))

    def show(self, jobs: Sequence[Job]) -> None:
        """Show the running runs and a summary, if it is time to; call it often."""
        if time.monotonic() - self._shown_at < (_REFRESH_SECONDS if self._live else _LINE_SECONDS):
            return
        self._shown_at = time.monotonic()
        lines, left = [], {}
        for job in jobs:
            if job.state == "running":
                fraction = fraction_done(job)
                seconds = left[job.run.folder] = self._left(job, fraction)
                percent = "" if fraction is None else f" {fraction:.0%}"
                eta = "" if seconds is None else f", {duration(seconds)} left"
                lines.append(self._line(job, f"running{percent}{eta}"))
        seconds = suite_left(jobs, left)
        eta = "" if seconds is None else f"; about {duration(seconds)} left"
        text = "\n".join([*lines, count_states([job.state for job in jobs]) + eta])
        if self._live:
            self._live.update(Text(text), refresh=True)
        else:
            self._print(text)

    def _line(self, job: Job, text: str) -> str:
        return f"[{self._done}/{self._total}] {job.run.title}  {text}"

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)

    def _left(self, job: Job, fraction: float | None) -> float | None:
        """Estimate the seconds until a run ends from its progress since it was started."""
        started, before = self._starts.get(job.run.folder, (0.0, 1.0))
        if fraction is None or fraction <= before:
            return None
        return (time.monotonic() - started) / (fraction - before) * (1 - fraction)


def fraction_done(job: Job) -> float | None:
    """Return how much of its training a run has done, in [0, 1]; None if metrics.jsonl lacks it."""
    solver = job.run.config.get("solver")
    last = _last_line(job.run.folder / METRICS_NAME)
    if not isinstance(solver, Mapping) or last is None:
        return None
    for key, length in (("iteration", "max_iters"), ("epoch", "max_epochs")):
        if solver.get(length) and isinstance(last.get(key), int | float):
            return min(1.0, float(last[key]) / float(solver[length]))
    return None


def suite_left(jobs: Sequence[Job], left: Mapping[Path, float | None]) -> float | None:
    """Return the seconds until all runs are done; None until a run of each open task has ended.

    Args:
        left: folder of each running job -> the seconds it needs, if they can be estimated.
    """
    by_task: dict[str, list[float]] = {}
    for job in jobs:
        if job.seconds is not None:
            by_task.setdefault(job.run.task, []).append(job.seconds)
    total = 0.0
    for job in jobs:
        if job.state in ("waiting", "running"):
            seconds = left.get(job.run.folder)
            if seconds is None and (durations := by_task.get(job.run.task)):
                seconds = sum(durations) / len(durations)
            if seconds is None:
                return None
            total += seconds
    return total / max(1, sum(job.state == "running" for job in jobs))


def count_states(states: Sequence[str]) -> str:
    """Return e.g. `3 finished, 1 running`."""
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def duration(seconds: float) -> str:
    """Return `1:02:03` or `4:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def result_line(results: Mapping[str, Any] | None) -> str:
    """Return e.g. `top1 91.25%` for a run's results."""
    if results is None:
        return ""
    metric = results["primary_metric"]
    value = results["metrics"][metric]
    return f"{metric} {value:.2%}" if isinstance(value, int | float) else f"{metric} {value}"


def _last_line(file: Path) -> dict[str, Any] | None:
    """Return the last complete line of a file of JSON lines; None without one."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]
        line = json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):
        return None
    return line if isinstance(line, dict) else None
