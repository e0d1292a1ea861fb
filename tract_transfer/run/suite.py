"""The bridge that runs a suite: its plan, what is there of it already, and what is to be done."""

import logging
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tract_transfer.config.file import ConfigError, dump_yaml
from tract_transfer.config.suite import SuiteConfig
from tract_transfer.engine.run_folder import changed_keys
from tract_transfer.files import make_folder, remove_temporary_files, write_text
from tract_transfer.run.suite_plan import Draft, Inspector, plan_suite
from tract_transfer.suite.execute import Execution, end_leftovers
from tract_transfer.suite.journal import (
    KEPT_NAME,
    Found,
    Job,
    Journal,
    SuiteLock,
    goes_on,
    look,
    read_weights_sha256,
)
from tract_transfer.suite.launchers import LOG_NAME, Attempt, Handle, Launcher
from tract_transfer.suite.plan import PlannedRun
from tract_transfer.suite.screen import Lines, LiveTable, result_in_words

logger = logging.getLogger(__name__)
TRAIN = (sys.executable, "-m", "tract_transfer.cli.train")
PLAN_NAME = "plan"  # the folder of the runs' configs
_SHOWN_CONFLICTS = 5


class Suite:
    """A planned suite, and what its folder holds of it.

    Args:
        remember: keep what was looked at in the folder, at which then nobody else may be at work.
        refuse: folders whose configs tell that they hold other runs, before any data are read.

    Raises:
        ConfigError: the plan cannot be run; of all runs, one line a problem.
        FileExistsError: another process is at work on the suite.
    """

    def __init__(self, config: SuiteConfig, *, remember: bool, refuse: bool = False) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        if remember:
            SuiteLock(self.folder).check()
        inspector = Inspector(self.folder / KEPT_NAME)

        def glance(drafts: Sequence[Draft]) -> None:
            if not all(inspector.knows(draft.config, draft.needed) for draft in drafts):
                looks = [(Job(draft.run), _look_at_config(draft.run)) for draft in drafts]
                refuse_others([each for each in looks if each[1].state == "other"])

        try:
            self.runs = plan_suite(config, inspector.inspect, glance if refuse else None)
            if remember:
                inspector.keep()
        finally:
            inspector.close()
        self.journal = Journal(
            self.folder, title=config.title, baseline=config.baseline, methods=list(config.methods)
        )
        self.jobs = self.journal.recall(self.runs)
        self._by_folder = {job.run.folder: job for job in self.jobs}
        self._weights: dict[Path, str | None] = {}

    def look(self, run: PlannedRun) -> Found:
        """Return what the run's folder holds of it."""
        job = self._by_folder[run.folder]
        needed = self._by_folder[run.needs] if run.needs else None
        is_known = needed is None or needed.state == "finished"
        weights = self._weights_of(run) if is_known else None
        found = look(
            run.folder,
            run.config,
            run.fingerprints,
            weights,
            weights_are_known=is_known,
            changed=changed_keys,
            known_sha256=job.config_sha256,
        )
        if found.state == "begun" and is_known and job.begun_with not in (None, weights):
            return Found("other", "its backbone has been trained anew since it began")
        return found

    def take_stock(self) -> list[tuple[Job, Found]]:
        """Set every job's state by its folder; return those that hold another run, and why."""
        others = []
        for job in self.jobs:
            found = self.look(job.run)
            needed = self._by_folder[job.run.needs] if job.run.needs else None
            if found.state == "other":
                others.append((job, found))
            elif found.state == "begun":
                job.note = goes_on(job.run.folder, found)
            elif found.state == "finished" and (needed is None or needed.state == "finished"):
                job.state, job.config_sha256 = "finished", found.config_sha256
            elif found.state == "finished":
                job.note = "finished, if its backbone comes out the same"
        return others

    def prepare(self, run: PlannedRun) -> Attempt:
        """Write down the run's whole config; return the attempt that runs it."""
        self._by_folder[run.folder].begun_with = self._weights_of(run)
        file = self.folder / PLAN_NAME / f"{run.id}.yaml"
        make_folder(file.parent)
        write_text(file, dump_yaml(run.config))
        command = [*TRAIN, "--config-file", str(file), "--resume"]
        if run.processes > 1:
            command += ["--num-gpus", str(run.processes)]
        stop_file = self.folder / PLAN_NAME / f"{run.id}.stop"
        return Attempt(command, run.folder / LOG_NAME, {}, stop_file)

    def set_aside(self, folder: Path) -> Path:
        """Move another run's folder out of the way; return where it is now."""
        place = self.folder / "set_aside" / folder.relative_to(self.folder)
        number = 1
        while (target := place.with_name(f"{place.name}_{number}")).exists():
            number += 1
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, target)
        self._weights.pop(folder, None)
        return target

    def _weights_of(self, run: PlannedRun) -> str | None:
        """The hash of the backbone that the run begins with; None where no card tells it."""
        weights = run.config["model"]["weights"]
        if weights in (None, "pretrained"):
            return None
        path = Path(weights)
        folder = path if path.is_dir() else path.parent
        if folder not in self._weights or self._weights[folder] is None:
            self._weights[folder] = read_weights_sha256(folder)
        return self._weights[folder]


def refuse_others(others: Sequence[tuple[Job, Found]]) -> None:
    """Refuse to go on where folders hold other runs.

    Raises:
        ConfigError: there are any.
    """
    if not others:
        return
    lines = [f"{job.run.folder} holds another run: {found.why}." for job, found in others]
    more = len(lines) - _SHOWN_CONFLICTS
    told = [*lines[:_SHOWN_CONFLICTS], *([f"... and {more} more."] if more > 0 else [])]
    raise ConfigError(
        "\n".join(told) + "\nNothing was started. --set-aside moves them to set_aside/ and runs "
        "them anew; another output_dir leaves them as they are."
    )


def carry_out(
    suite: Suite,
    launcher: Launcher,
    screen: Lines | LiveTable,
    *,
    set_aside: bool,
) -> int | None:
    """Do what is to be done; return the number of the signal that stopped it, or None.

    Raises:
        FileExistsError: another process is at work on the suite.
        ConfigError: folders hold other runs, and they are not to be set aside.
    """
    suite.folder.mkdir(parents=True, exist_ok=True)
    lock = SuiteLock(suite.folder)
    left = lock.acquire()
    remove_temporary_files(suite.folder / PLAN_NAME)
    try:
        end_leftovers(launcher, lock, left)
        others = suite.take_stock()
        if not set_aside:
            refuse_others(others)

        def changed(jobs: Sequence[Job], handles: Mapping[str, Handle]) -> None:
            lock.tell(handles)
            suite.journal.write(jobs)

        execution = Execution(
            suite.jobs,
            launcher,
            screen,
            look=suite.look,
            prepare=suite.prepare,
            set_aside=suite.set_aside if set_aside else None,
            in_words=lambda found: result_in_words(found.results),
            changed=changed,
            retries=suite.config.retries,
        )
        with screen, _stop_on_signals(execution):
            for job in suite.jobs:
                if job.state == "finished":
                    screen.skipped(job)
            execution.run()
        return execution.first_stop
    finally:
        lock.release()


def list_plan(suite: Suite, others: Sequence[tuple[Job, Found]]) -> list[str]:
    """Return a line for every run: its id, what would be done, and where."""
    why = {job.run.folder: found.why for job, found in others}
    lines = []
    for job in suite.jobs:
        run = job.run
        todo = "skip: finished" if job.state == "finished" else job.note or "run"
        if run.folder in why:
            todo = f"holds another run: {why[run.folder]}"
        also = f" (also {', '.join(run.also)})" if run.also else ""
        lines.append(f"{run.id}  {run.folder}{also}  {todo}")
    return lines


@contextmanager
def _stop_on_signals(execution: Execution) -> Iterator[None]:
    """Let SIGTERM or SIGINT ask the runs to write checkpoints and end; a second one kills them."""
    numbers = (signal.SIGTERM, signal.SIGINT)

    def ask(number: int, _frame: FrameType | None) -> None:
        execution.stop_requested = signal.SIGKILL if execution.first_stop else number
        execution.first_stop = execution.first_stop or number

    before: dict[int, Any | Callable[..., Any]] = {n: signal.signal(n, ask) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _look_at_config(run: PlannedRun) -> Found:
    """Return what the run's folder holds as far as its config tells, without data and weights."""
    return look(run.folder, run.config, None, weights_are_known=False, changed=changed_keys)
