"""Where runs are carried out: on this machine, by a number of workers and its GPUs."""

import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import psutil

from tract_transfer.suite.attempt import Attempt, on_threads, wait_for_leftovers
from tract_transfer.suite.plan import PlannedRun

# Plain values by which an attempt is found again after a crash; `asked` is the signal that it was
# sent, if any.
Handle = dict[str, Any]
logger = logging.getLogger(__name__)


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
