"""Execute a planned suite: skip finished runs, resume those that were cut off, retry failures.

All state is in the folders: this process can be killed at any moment, and another one continues.
"""

import logging
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tract_transfer.config.file import ConfigError, dump_yaml
from tract_transfer.engine.run_folder import FolderInUseError, lock_folder
from tract_transfer.files import REFUSED, make_folder, remove_temporary_files, write_text
from tract_transfer.suite.launchers import (
    LOG_NAME,
    POLL_SECONDS,
    Attempt,
    Launcher,
    why_it_ended,
    write_stop_file,
)
from tract_transfer.suite.plan import PlannedRun
from tract_transfer.suite.screen import Screen, result_line
from tract_transfer.suite.state import FolderState, Job, Suite, backbone_sha256

PLAN_NAME = "plan"  # folder of the runs' configs and of the stop file
_TRAIN = (sys.executable, "-m", "tract_transfer.cli.train")
# For a run to end after a signal: a step or a batch of an evaluation, and a checkpoint.
_ENDING_SECONDS = 600.0
_STEP_SECONDS = 0.2
logger = logging.getLogger(__name__)


def execute(suite: Suite, launcher: Launcher, screen: Screen, *, set_aside: bool) -> int | None:
    """Run what is not finished; return the number of the signal that stopped the suite, or None.

    Args:
        set_aside: move folders of other runs to set_aside/ instead of refusing them.

    Raises:
        FolderInUseError: another process executes the suite.
        ConfigError: folders contain other runs, and `set_aside` is off.
    """
    make_folder(suite.folder / PLAN_NAME)
    with lock_folder(suite.folder):
        for folder in (suite.folder, suite.folder / PLAN_NAME):
            remove_temporary_files(folder)
        execution = Execution(suite, launcher, screen, set_aside=set_aside)
        _await_leftovers(suite)
        others = suite.take_stock()
        if not set_aside:
            refuse_others(others)
        with screen, _stops_on_signals(execution):
            for job in suite.jobs:
                if job.state == "finished":
                    screen.ended(job, "finished before")
            execution.run()
    return execution.stop_signals[0] if execution.stop_signals else None


def refuse_others(others: Mapping[Path, str]) -> None:
    """Raise ConfigError if there are folders that contain other runs; `others` has why."""
    if others:
        lines = [f"{folder} contains another run: {why}." for folder, why in others.items()]
        raise ConfigError(
            "\n".join(lines) + "\nNothing was started. Use --set-aside to move them to set_aside/ "
            "and run them again, or set another output_dir."
        )


def _await_leftovers(suite: Suite) -> None:
    """Wait until the runs that a killed suite left running have ended.

    They got SIGTERM when it ended, or get it now because this is another session (see `Attempt`),
    and hold the locks of their folders while they write a checkpoint.
    """
    if suite.interrupted:
        time.sleep(2 * POLL_SECONDS)  # until those on other machines have read the session
    end = time.monotonic() + _ENDING_SECONDS
    for folder in suite.interrupted:
        if holder := _holder(folder):
            logger.info("%s A suite that was killed left it; waiting for it to end.", holder)
        while _holder(folder) and time.monotonic() < end:
            time.sleep(_STEP_SECONDS)


def _holder(run_folder: Path) -> str:
    """Return the message about who holds the lock of a run folder; "" if it is free."""
    try:
        with lock_folder(run_folder):
            return ""
    except FolderInUseError as error:
        return str(error)
    except FileNotFoundError:
        return ""


class Execution:
    """Executes the jobs of a suite, each after the one it needs.

    Attributes:
        stop_signals: a signal handler appends to it at any moment: the first signal asks the runs
            to write a checkpoint and end, a second one kills them.
    """

    def __init__(
        self, suite: Suite, launcher: Launcher, screen: Screen, *, set_aside: bool
    ) -> None:
        self.suite, self.launcher, self.screen = suite, launcher, screen
        self.set_aside = set_aside
        self.stop_signals: list[int] = []
        self._signals_sent = 0
        self._started: dict[PlannedRun, tuple[Job, float]] = {}  # running jobs, and since when
        self._failures = Counter[Path]()  # in this session, by run folder
        self._stop_file = suite.folder / PLAN_NAME / "stop"
        self._session = uuid.uuid4().hex
        write_stop_file(self._stop_file, self._session)  # ends what another session left

    def run(self) -> None:
        """Execute the jobs; return when none is left, or all have stopped."""
        self._record()
        while self._step():
            self.screen.show(self.suite.jobs)
            time.sleep(_STEP_SECONDS)
        self.screen.show(self.suite.jobs)

    def _step(self) -> bool:
        """Handle runs that ended, send signals, start runs; return whether there is more to do."""
        for run, code in self.launcher.ended():
            self._handle_end(run, code)
        for number in self.stop_signals[self._signals_sent :]:
            self.launcher.stop(signal.SIGKILL if self._signals_sent else number)
            self._signals_sent += 1
        stopping = self._signals_sent > 0
        for job in self.suite.jobs:  # every job comes after the one it needs
            if job.state != "waiting":
                continue
            if job.needed and job.needed.state in ("failed", "blocked"):
                self._fail(job, f"it needs {job.needed.run.folder}, which failed", "blocked")
            elif not stopping and job.can_start and self.launcher.has_room(job.run):
                self._start(job)
        states = {job.state for job in self.suite.jobs}
        return "running" in states or ("waiting" in states and not stopping)

    def _start(self, job: Job) -> None:
        folder = job.run.folder
        content = job.inspect()
        if content.state == "finished":  # its backbone is now there to confirm it
            self._finish(job, content)
            return
        if content.state == "other" and not self.set_aside:
            self._fail(job, f"{folder} contains another run: {content.why}. Use --set-aside")
            return
        try:
            if content.state == "other":
                job.note = f"moved another run to {self.suite.set_aside(folder)}: {content.why}"
                content = FolderState("new")
            self.launcher.start(job.run, self._prepare(job))
        except OSError as error:
            self._fail(job, f"{type(error).__name__}: {error}")
            return
        self._started[job.run] = (job, time.monotonic())
        if content.state == "new" and folder not in self._failures:
            job.attempts, job.spent = 0, 0.0  # nothing is left of earlier attempts
        if content.state == "begun":
            job.note = content.why
        elif job.note == "stopped" or folder in self._failures:
            job.note = ""
        job.state, job.error = "running", None
        job.attempts += 1
        self.screen.started(job)
        self._record()

    def _prepare(self, job: Job) -> Attempt:
        """Write the run's complete config; return the attempt that runs it."""
        run = job.run
        job.begun_with = backbone_sha256(run)
        config_file = self.suite.folder / PLAN_NAME / f"{run.id}.yaml"
        write_text(config_file, dump_yaml(run.config))
        command = [*_TRAIN, "--config-file", str(config_file), "--resume"]
        if run.processes > 1:
            command += ["--num-gpus", str(run.processes)]
        return Attempt(command, run.folder / LOG_NAME, self._stop_file, self._session)

    def _handle_end(self, run: PlannedRun, code: int) -> None:
        """Update a job whose attempt has ended: finished, stopped, to be retried, or failed."""
        job, started = self._started.pop(run)
        job.last = time.monotonic() - started
        job.spent += job.last
        content = job.inspect()
        if content.state == "finished":
            self._finish(job, content)
            return
        if self._signals_sent:  # whatever its exit code, the next session resumes it
            job.state, job.note = "waiting", "stopped"
            self._record()
            return
        log = run.folder / LOG_NAME
        why = why_it_ended(code, log)
        if code == 0:
            why = f"exit code 0, but no results ({content.why or content.state}); see {log}"
        self._failures[run.folder] += 1
        if code == REFUSED or self._failures[run.folder] > self.suite.config.retries:
            self._fail(job, why)
            return
        job.state, job.error = "waiting", why
        self.screen.ended(job, f"failed, and is retried: {why}")
        self._record()

    def _finish(self, job: Job, content: FolderState) -> None:
        job.state, job.error, job.config_sha256 = "finished", None, content.config_sha256
        if job.spent:
            job.seconds = round(job.spent, 1)
        self.screen.ended(job, result_line(content.results))
        self._record()

    def _fail(self, job: Job, why: str, state: Literal["failed", "blocked"] = "failed") -> None:
        job.state, job.error = state, why
        self.screen.ended(job, f"{state}: {why}")
        self._record()

    def _record(self) -> None:
        """Write the state of the jobs."""
        try:
            self.suite.write()
        except OSError as error:  # a full disk must not end runs that can still write
            logger.error("The suite's state cannot be written: %s", error)


@contextmanager
def _stops_on_signals(execution: Execution) -> Iterator[None]:
    """Let SIGTERM and SIGINT stop an execution."""

    def handle(number: int, _frame: FrameType | None) -> None:
        execution.stop_signals.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {n: signal.signal(n, handle) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
