"""Where runs are carried out: on this machine, by a number of workers and its GPUs."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from tract_transfer.suite.plan import PlannedRun

# --- One attempt at a run, as a process of its own: so that a crash ends that run alone.

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


# Plain values by which an attempt is found again after a crash; `asked` is the signal that it was
# sent, if any.
Handle = dict[str, Any]


class Launcher(Protocol):
    """Starts attempts, and tells how they ended.

    Attributes:
        name: as --launcher has it.
    """

    name: str

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Refuse runs that this launcher can never start: a ValueError names key and fix."""

    def has_room(self, run: PlannedRun) -> bool:
        """Whether a run can be started now."""

    def start(self, run: PlannedRun, attempt: Attempt) -> Handle:
        """Start an attempt at a run."""

    def ended(self) -> list[tuple[PlannedRun, int]]:
        """Return the runs whose attempts have ended since the last call, with exit codes."""

    def stop(self, number: int) -> None:
        """Ask all attempts to write a checkpoint and end; SIGKILL ends them at once."""

    def ask_leftovers(self, handles: Sequence[Handle]) -> None:
        """Ask what another process left to write a checkpoint and end; mark it `asked`."""

    def end_leftovers(self, handles: Sequence[Handle]) -> None:
        """Wait until what was asked has ended; what does not end in its time is killed."""

    def close(self) -> None:
        """Let go of what it holds."""


class LocalLauncher:
    """This machine: `workers` runs at a time, each with its threads, GPUs and memory.

    Args:
        cores: those that this process may use.
        gpus: names of the GPUs, as CUDA_VISIBLE_DEVICES has them.
        memory_gb: of the machine.
    """

    name = "local"

    def __init__(self, workers: int, *, cores: int, gpus: Sequence[str], memory_gb: float) -> None:
        self.workers, self.cores, self.memory_gb = workers, cores, memory_gb
        self._free = dict.fromkeys(gpus, 1.0)  # GPU -> the share of it that nobody uses
        self._running: dict[PlannedRun, tuple[subprocess.Popen[bytes], dict[str, float]]] = {}

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Refuse runs that ask for more than the machine has."""
        has = {"cpus": self.cores, "gpus": len(self._free), "memory_gb": self.memory_gb}
        for run in runs:
            for key, there in has.items():
                wanted = getattr(run.resources, key)
                if wanted is not None and wanted > there:
                    raise ValueError(
                        f"resources.{key}: {run.task} asks for {wanted:g}, and this machine has "
                        f"{there:g}. Ask for less, or use --launcher ray or slurm."
                    )

    def has_room(self, run: PlannedRun) -> bool:
        """Whether a worker, and the cores, GPUs and memory that the run asks for, are free."""
        if len(self._running) >= self.workers:
            return False
        cpus = sum(self._threads(other) for other in self._running)
        memory = sum(other.resources.memory_gb or 0 for other in self._running)
        if self._running and cpus + self._threads(run) > self.cores:
            return False
        if self._running and memory + (run.resources.memory_gb or 0) > self.memory_gb:
            return False
        return self._choose(run) is not None

    def start(self, run: PlannedRun, attempt: Attempt) -> Handle:
        """Start an attempt on GPUs of its own."""
        shares = self._choose(run)
        assert shares is not None
        own = on_threads(max(1, self._threads(run) // run.processes))
        # A run without a GPU must not sit on the first one.
        own["CUDA_VISIBLE_DEVICES"] = ",".join(shares)
        attempt.environment = {**attempt.environment, **own}
        process = attempt.start()
        for gpu, share in shares.items():
            self._free[gpu] -= share
        self._running[run] = (process, shares)
        return {"pid": process.pid, "started": _started(process.pid)}

    def ended(self) -> list[tuple[PlannedRun, int]]:
        """Return the runs that have ended since, with their exit codes."""
        done = []
        for run, (process, shares) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            if code:  # what it started goes with it
                _kill_group(process.pid)
            for gpu, share in shares.items():
                self._free[gpu] += share
            del self._running[run]
            done.append((run, code))
        return done

    def stop(self, number: int) -> None:
        """Send all processes a signal."""
        for process, _ in self._running.values():
            if number == signal.SIGKILL:
                _kill_group(process.pid)
            elif process.poll() is None:
                process.send_signal(number)

    def ask_leftovers(self, handles: Sequence[Handle]) -> None:
        """Send processes of a killed suite SIGTERM.

        One that was sent a signal before is sent no other: a second would end it at once.
        """
        for handle in handles:
            if not handle.get("asked") and _is_same(handle):
                with suppress(ProcessLookupError):
                    os.kill(handle["pid"], signal.SIGTERM)
                handle["asked"] = int(signal.SIGTERM)

    def end_leftovers(self, handles: Sequence[Handle]) -> None:
        """Let processes that were asked write a checkpoint and end."""
        alive = [handle for handle in handles if _is_same(handle)]
        for handle in wait_for_leftovers(alive, lambda handle: not _is_same(handle)):
            logger.warning(
                "Process %d did not end: it is killed, and its run goes on from the checkpoint "
                "before.", handle["pid"],
            )  # fmt: skip
        for handle in alive:
            _kill_group(handle["pid"])

    def close(self) -> None:
        """Nothing is held."""

    def _threads(self, run: PlannedRun) -> int:
        """The run's own cores; or a worker's share of all, or fewer if the environment says so."""
        share = max(1, self.cores // self.workers)
        told = os.environ.get("OMP_NUM_THREADS", "")
        own = min(share, int(told)) if told.isdecimal() and int(told) else share
        return run.resources.cpus or own

    def _choose(self, run: PlannedRun) -> dict[str, float] | None:
        """Return GPU -> share for a run, or None where too few are free; {} where it needs none."""
        wanted = run.resources.gpus
        wanted = min(1, len(self._free)) if wanted is None else wanted
        if not wanted:
            return {}
        share = min(wanted, 1.0)
        free = [gpu for gpu, left in self._free.items() if left >= share - 1e-6]
        count = max(1, int(wanted))
        return dict.fromkeys(free[:count], share) if len(free) >= count else None


def this_machine(workers: int) -> LocalLauncher:
    """Return a launcher of this machine with all it has."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    memory_gb = psutil.virtual_memory().total / 2**30
    return LocalLauncher(workers, cores=cores, gpus=find_gpus(os.environ), memory_gb=memory_gb)


def find_launcher(handle: Handle) -> str | None:
    """Return the name of the launcher that can end a handle's attempt; None where it is gone.

    Of Ray's nothing is left, and of this machine's what still lives; Slurm alone knows of its jobs.
    """
    if "job" in handle:
        return "slurm"
    return "local" if _is_same(handle) else None


def find_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs as CUDA_VISIBLE_DEVICES would name them; without asking torch."""
    told = environment.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name.strip() for name in told.split(",") if name.strip() not in ("", "-1")]
    ask = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return said.split()


def _started(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def _is_same(handle: Handle) -> bool:
    """Whether the process of a handle lives, and is no later one of the same number."""
    try:
        process = psutil.Process(handle["pid"])
        same = abs(process.create_time() - handle["started"]) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError):
        return False


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
