"""One attempt at a run, as a process of its own: so that a crash ends that run alone."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

# For a run to end by a signal: a step or a batch of an evaluation, and a checkpoint.
ENDING_SECONDS = 600.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
LOG_NAME = "console.txt"
_TOLD = ("error", "failed")  # how tools begin the line that says why they end
Left = TypeVar("Left")
logger = logging.getLogger(__name__)


@dataclass
class Attempt:
    """A command, where it says what it does, and what it is told of the machine.

    Called on another machine, it runs the command and returns its exit code. There, files are the
    only way to reach it: a number in `stop_file` is sent to the process as a signal.

    Attributes:
        log: its standard output and error are appended to it.
        environment: over the machine's own.
    """

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    stop_file: Path
    folder: Path = field(default_factory=Path.cwd)
    _process: "subprocess.Popen[bytes] | None" = field(default=None, init=False, repr=False)
    _was_told: bool = field(default=False, init=False, repr=False)

    def start(self, *, ends_with_this: bool = False) -> "subprocess.Popen[bytes]":
        """Start the process in a session of its own: a terminal's Ctrl-C is not for it.

        Args:
            ends_with_this: it is sent SIGTERM when this process is gone (on Linux).
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=_end_with_parent() if ends_with_this else None,
            )

    def __call__(self) -> int:
        """Run the command to its end; return its exit code, below 0 of a signal."""
        if (number := _read_number(self.stop_file)) is not None:
            return 128 + number  # told to end while it queued
        self._was_told = False  # it may have been, in a job before
        process = self._process = self.start(ends_with_this=True)
        while (code := process.poll()) is None:
            if (number := _read_number(self.stop_file)) is not None:
                self._tell(process, number)
            time.sleep(_POLL_SECONDS)
        return code

    def stop(self, number: int) -> None:
        """Tell the attempt, wherever it runs, to end by a signal."""
        self.stop_file.parent.mkdir(parents=True, exist_ok=True)
        self.stop_file.write_text(str(int(number)))

    def checkpoint(self) -> Any:
        """Slurm takes the machine back: let the run write a checkpoint, and queue it again."""
        import submitit

        if self._process is not None:
            self._tell(self._process, signal.SIGTERM)
            self._process.wait()
            self._process = None  # no process can be pickled
        return submitit.helpers.DelayedSubmission(self)

    def _tell(self, process: "subprocess.Popen[bytes]", number: int) -> None:
        """Send a signal, if none was sent: a second would end the run without a checkpoint."""
        if not self._was_told:
            process.send_signal(number)
            self._was_told = True


def wait_for_leftovers(
    left: Sequence[Left], has_ended: Callable[[Left], bool], seconds: float | None = None
) -> list[Left]:
    """Wait until runs that were told to end have; return those that have not.

    Args:
        seconds: at most; None is `ENDING_SECONDS`.
    """
    seconds = ENDING_SECONDS if seconds is None else seconds
    left = [each for each in left if not has_ended(each)]
    if left:
        logger.info(
            "Still at work for the suite that was here before: %d. Each writes a checkpoint and "
            "ends, for which it has %.0f s.", len(left), seconds,
        )  # fmt: skip
    end = time.monotonic() + seconds
    while left and time.monotonic() < end:
        time.sleep(0.1)
        left = [each for each in left if not has_ended(each)]
    return left


def on_threads(count: int | None) -> dict[str, str]:
    """Return the variables that give a process so many threads; none where None."""
    return {} if count is None else dict.fromkeys(_THREADS, str(count))


def why_it_ended(code: int, log: Path) -> str:
    """Say why a process failed, by its exit code and the end of what it said."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = {"SIGKILL": ", as when memory runs out"}.get(name, "")
        return f"ended by {name}{hint}; see {log}"
    said = _last_words(log)
    return f"{said or f'exit code {code}'} (see {log})"


def _end_with_parent() -> Callable[[], object] | None:
    """Return what a child calls to be sent SIGTERM when the thread that started it is gone."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: a child between fork and exec must not
    return lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _last_words(log: Path, limit: int = 1200) -> str:
    """Return the last line of a log that says `error: why`, `failed: why` or, of a traceback,
    `SomeError: why`, with what follows it.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    heads = [line.partition(":")[0] for line in lines]
    errors = [i for i, head in enumerate(heads) if head in _TOLD or head.endswith("Error")]
    said = " ".join(lines[errors[-1] if errors else -1 :])
    if len(said) > limit:
        said = said[:limit].rpartition(" ")[0] + " ..."
    return said.removeprefix("error: ").removeprefix("failed: ")


def _read_number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
