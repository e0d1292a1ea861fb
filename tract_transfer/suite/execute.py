"""Carry out a plan: skip what is finished, go on with what was cut off, let a failure end itself.

Whatever is known of a run is in its folder; this process can be killed at any moment, and another
one goes on.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tract_transfer.files import REFUSED
from tract_transfer.suite.journal import Found, Job, SuiteLock, goes_on
from tract_transfer.suite.launchers import Attempt, Handle, Launcher, find_launcher, why_it_ended
from tract_transfer.suite.plan import PlannedRun

logger = logging.getLogger(__name__)


class Screen(Protocol):
    """Shows what happens."""

    def started(self, job: Job) -> None:
        """A run has begun, or goes on."""

    def ended(self, job: Job, result: str) -> None:
        """A run is finished, failed, is tried again or blocked; `result` says it in words."""

    def show(self, jobs: Sequence[Job]) -> None:
        """Some time has gone by."""


class Execution:
    """One session's work on the jobs of a suite.

    Args:
        jobs: each after the one it needs; those that are finished are not touched.
        look: what a run's folder holds; called again before a run and after it.
        prepare: makes its folder ready, and returns the attempt.
        set_aside: makes room where another run's folder is in the way; None makes it a failure.
        changed: told all jobs, and the handles of those running, after each change of a state.
        retries: how often a failed run is tried again.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        launcher: Launcher,
        screen: Screen,
        *,
        look: Callable[[PlannedRun], Found],
        prepare: Callable[[PlannedRun], Attempt],
        set_aside: Callable[[Path], Path] | None,
        in_words: Callable[[Found], str],
        changed: Callable[[Sequence[Job], dict[str, Handle]], None],
        retries: int,
    ) -> None:
        self.jobs, self.launcher, self.screen = jobs, launcher, screen
        self.look, self.prepare, self.set_aside = look, prepare, set_aside
        self.in_words, self.changed, self.retries = in_words, changed, retries
        # Set by a signal's handler, at any moment; the first one is what ends the session.
        self.stop_requested: int | None = None
        self.first_stop: int | None = None
        self._stopping: int | None = None
        self._by_folder = {job.run.folder: job for job in jobs}
        self._failures: dict[Path, int] = {}
        self._begun: dict[Path, float] = {}
        self._logs: dict[Path, Path] = {}
        self._handles: dict[str, Handle] = {}

    def run(self, poll_seconds: float = 0.2) -> None:
        """Carry out all that can be; return when nothing is left, or all has stopped."""
        self._block_all()
        self._tell()
        while self._go_on():
            self.screen.show(self.jobs)
            time.sleep(poll_seconds)
        self.screen.show(self.jobs)

    def _go_on(self) -> bool:
        """Take in what has ended, start what can be; whether there is more to wait for."""
        for run, code in self.launcher.ended():
            self._take_in(self._by_folder[run.folder], code)
        if self.stop_requested not in (None, self._stopping):
            self._stopping = self.stop_requested
            self.launcher.stop(int(self._stopping or 0))
            for handle in self._handles.values():  # a second signal would end them at once
                handle["asked"] = int(self._stopping or 0)
            self._tell()
        if self._stopping is None:
            for job in self.jobs:
                if job.state == "waiting" and self._is_ready(job):
                    self._start(job)
        states = {job.state for job in self.jobs}
        return "running" in states or ("waiting" in states and self._stopping is None)

    def _is_ready(self, job: Job) -> bool:
        needed = self._by_folder[job.run.needs] if job.run.needs else None
        return (needed is None or needed.state == "finished") and self.launcher.has_room(job.run)

    def _start(self, job: Job) -> None:
        found = self.look(job.run)
        if found.state == "other" and self.set_aside is not None:
            job.note = f"set aside {self.set_aside(job.run.folder)}: {found.why}"
            found = Found("new")
        if found.state == "other":
            self._fail(
                job, f"{job.run.folder} holds another run: {found.why}. --set-aside moves it"
            )
        elif found.state == "finished":  # it was, and now its backbone is there to say so
            self._finish(job, found)
        else:
            try:
                attempt = self.prepare(job.run)
                self._handles[str(job.run.folder)] = self.launcher.start(job.run, attempt)
            except OSError as error:
                self._fail(job, f"{type(error).__name__}: {error}")
                return
            folder = job.run.folder
            if found.state == "new" and folder not in self._failures:
                job.attempts, job.spent = 0, 0.0  # of what was there before nothing is left
            if found.state == "begun":
                job.note = goes_on(folder, found)
            elif job.note == "stopped" or folder in self._failures:
                job.note = ""
            job.state, job.error = "running", None
            job.attempts += 1
            self._begun[folder] = time.monotonic()
            self._logs[folder] = attempt.log
            self.screen.started(job)
            self._tell()

    def _take_in(self, job: Job, code: int) -> None:
        folder = job.run.folder
        job.last = time.monotonic() - self._begun[folder]
        job.spent += job.last
        self._handles.pop(str(folder), None)
        found = self.look(job.run)
        if found.state == "finished":
            self._finish(job, found)
            return
        if self._stopping is not None:  # whatever its exit code, it goes on another time
            job.state, job.note = "waiting", "stopped"
            self._tell()
            return
        why = why_it_ended(code, self._logs[folder])
        if code == 0:
            why = f"it ended well, and there are no results of it: {found.why or found.state}"
        self._failures[folder] = self._failures.get(folder, 0) + 1
        if code == REFUSED or self._failures[folder] > self.retries:
            self._fail(job, why)
            return
        job.state, job.error = "waiting", why
        self.screen.ended(job, f"failed, and is tried again: {why}")
        self._tell()

    def _finish(self, job: Job, found: Found) -> None:
        job.state, job.error, job.config_sha256 = "finished", None, found.config_sha256
        if job.spent:
            job.seconds = round(job.spent, 1)
        self.screen.ended(job, self.in_words(found))
        self._tell()

    def _fail(self, job: Job, why: str) -> None:
        job.state, job.error = "failed", why
        self.screen.ended(job, f"failed: {why}")
        self._block_all()
        self._tell()

    def _block_all(self) -> None:
        """Mark what waits for a run that failed; jobs come after what they need."""
        for job in self.jobs:
            needed = self._by_folder[job.run.needs] if job.run.needs else None
            if job.state == "waiting" and needed and needed.state in ("failed", "blocked"):
                job.state, job.error = "blocked", f"it needs {needed.run.folder}, which failed"
                self.screen.ended(job, f"blocked: {job.error}")

    def _tell(self) -> None:
        try:
            self.changed(self.jobs, self._handles)
        except OSError as error:  # a full disk ends no run that still can write
            logger.error("The suite's state cannot be written: %s", error)


# --- What a killed suite has left at work: it is ended by checkpoints before anything begins.


def end_leftovers(launcher: Launcher, lock: SuiteLock, left: Mapping[str, Handle]) -> None:
    """Let what another process has left at work write a checkpoint and end.

    Whoever interrupts the wait leaves word of what was asked to end: a second signal would end it
    without a checkpoint.

    Args:
        lock: taken.
        left: what `lock.acquire` has returned: job -> how to find it.

    Raises:
        FileExistsError: another launcher has started some of it; nothing was ended.
    """
    _refuse_others(launcher, lock, left)
    handles = list(left.values())
    try:
        launcher.ask_leftovers(handles)
    finally:
        lock.tell(left)
    launcher.end_leftovers(handles)
    lock.tell({})


def _refuse_others(launcher: Launcher, lock: SuiteLock, left: Mapping[str, Handle]) -> None:
    """Refuse what this launcher cannot end: it would run beside the same run, started again."""
    owners = {job: find_launcher(handle) for job, handle in left.items()}
    others = [job for job, name in owners.items() if name not in (None, launcher.name)]
    if others:
        name = owners[others[0]]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise FileExistsError(
            f"{others[0]}{more}: started by --launcher {name}, under which run_suite was killed, "
            f"and maybe at work still. Nothing was started. Use --launcher {name}: it lets them "
            f"write a checkpoint and goes on. If they have ended, remove {lock.owner_file}."
        )
