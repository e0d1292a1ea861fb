"""Where runs execute: as processes of this machine, tasks of a Ray cluster, or jobs of Slurm."""

import ctypes
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tract_transfer.files import num_cores
from tract_transfer.suite.plan import PlannedRun

LOG_NAME = "console.txt"
KILLED = -int(signal.SIGKILL)
_SLURM_WARNING_SECONDS = 120  # before its time limit a job is asked to write a checkpoint
_MAX_REQUEUES = 10_000  # of a job after its time limit; submitit's default is 3
POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
_ERROR = re.compile(r"^(?:error|failed|[^:\n]*Error)(?=:|$)", re.MULTILINE)
_SHOWN_CHARACTERS = 1200  # of an error
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Attempt:
    """One attempt at a run: a process of its own, so that a crash ends only that run.

    Calling it on another machine runs the command and returns its exit code. There it reads
    `stop_file`, which has the current session of the suite and the signal to send. If that is
    another session, the suite was killed and started again, and the run gets SIGTERM.

    Attributes:
        log: its standard output and error are appended to this file.
        environment: added to the machine's own.
    """

    command: Sequence[str]
    log: Path
    stop_file: Path
    session: str
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = field(default_factory=Path.cwd)
    _process: "subprocess.Popen[bytes] | None" = field(default=None, init=False, repr=False)
    _signalled: bool = field(default=False, init=False, repr=False)

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the process in its own session, which a terminal's Ctrl-C does not reach.

        On Linux it gets SIGTERM when the thread that started it ends, however that ends.
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
                preexec_fn=_end_with_parent(),
            )

    def __call__(self) -> int:
        """Run the command to its end; return its exit code, negative for a signal."""
        if number := self._requested():
            return 128 + number  # stopped while it was queued
        self._signalled = False  # it may have been, in an earlier job
        process = self._process = self.start()
        while (code := process.poll()) is None:
            if number := self._requested():
                self._signal(process, number)
            time.sleep(POLL_SECONDS)
        return code

    def stop(self, number: int) -> None:
        """Send a signal to all attempts of this session, wherever they run."""
        write_stop_file(self.stop_file, self.session, number)

    def checkpoint(self) -> Any:
        """Let the run write a checkpoint and queue it again; Slurm takes the machine back."""
        import submitit

        if self._process is not None:
            self._signal(self._process, signal.SIGTERM)
            self._process.wait()
            self._process = None  # a process cannot be pickled
        return submitit.helpers.DelayedSubmission(self)

    def _requested(self) -> int:
        """Return the signal that this attempt should get; 0 for none."""
        try:
            session, number = self.stop_file.read_text().split()
        except (OSError, ValueError):  # it is being written
            return 0
        return int(number) if session == self.session else int(signal.SIGTERM)

    def _signal(self, process: "subprocess.Popen[bytes]", number: int) -> None:
        """Send at most one signal: a second one would end the run without a checkpoint."""
        if not self._signalled:
            process.send_signal(number)
            self._signalled = True


def write_stop_file(path: Path, session: str, number: int = 0) -> None:
    """Write the current session of a suite, and the signal that its attempts should get."""
    path.write_text(f"{session} {int(number)}")


class Launcher:
    """Starts attempts and reports how they ended.

    Attributes:
        workers: maximum number of runs at a time; None leaves it to the cluster.
    """

    def __init__(self, workers: int | None) -> None:
        self.workers = workers
        self._running: dict[PlannedRun, Any] = {}  # what `start` keeps of an attempt

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Raise ValueError, with key, run and fix, if this launcher can never start a run."""
        raise NotImplementedError

    def has_room(self, run: PlannedRun) -> bool:
        """Return whether a run can start now."""
        return self.workers is None or len(self._running) < self.workers

    def start(self, run: PlannedRun, attempt: Attempt) -> None:
        """Start an attempt at a run; raise OSError if it cannot be started."""
        raise NotImplementedError

    def ended(self) -> list[tuple[PlannedRun, int]]:
        """Return the runs that have ended since the last call, with their exit codes."""
        codes = [(run, self._exit_code(run)) for run in self._running]
        done = [(run, code) for run, code in codes if code is not None]
        for run, _ in done:
            del self._running[run]
        return done

    def stop(self, number: int) -> None:
        """Ask all runs to write a checkpoint and end; SIGKILL ends them at once."""
        raise NotImplementedError

    def close(self) -> None:
        """Release what the launcher holds."""

    def _exit_code(self, run: PlannedRun) -> int | None:
        """Return the exit code of a running attempt; None while it runs."""
        raise NotImplementedError


class LocalLauncher(Launcher):
    """This machine: each run gets its threads, GPUs and memory.

    Args:
        cores: number of cores that this process may use.
        gpus: names of the GPUs, as in CUDA_VISIBLE_DEVICES.
        memory_gb: memory of the machine.
    """

    def __init__(self, workers: int, *, cores: int, gpus: Sequence[str], memory_gb: float) -> None:
        super().__init__(workers)
        self.cores, self.memory_gb = cores, memory_gb
        self.gpus = list(gpus)
        self._threads_per_worker = max(1, cores // workers)
        # The process of a run, and GPU -> share.
        self._running: dict[PlannedRun, tuple[subprocess.Popen[bytes], dict[str, float]]] = {}

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Refuse runs that need more than the machine has."""
        machine = {"cpus": self.cores, "gpus": len(self.gpus), "memory_gb": self.memory_gb}
        for run in runs:
            for key, available in machine.items():
                needed = getattr(run.resources, key)
                if needed is not None and needed > available:
                    raise ValueError(
                        f"resources.{key}: {run.task} needs {needed:g}, and this machine has "
                        f"{available:g}. Ask for less, or use --launcher ray or slurm."
                    )

    def has_room(self, run: PlannedRun) -> bool:
        """Return whether a worker and the cores, GPUs and memory that a run needs are free."""
        if not super().has_room(run) or self._choose_gpus(run) is None:
            return False
        runs = [*self._running, run]
        cpus = sum(map(self._threads, runs))
        memory_gb = sum(run.resources.memory_gb or 0 for run in runs)
        return not self._running or (cpus <= self.cores and memory_gb <= self.memory_gb)

    def start(self, run: PlannedRun, attempt: Attempt) -> None:
        """Start a process with its own threads and GPUs."""
        shares = self._choose_gpus(run)
        assert shares is not None
        # An empty CUDA_VISIBLE_DEVICES keeps a run without a GPU off the first one.
        attempt.environment["CUDA_VISIBLE_DEVICES"] = ",".join(shares)
        attempt.environment |= _thread_variables(max(1, self._threads(run) // run.processes))
        self._running[run] = (attempt.start(), shares)

    def stop(self, number: int) -> None:
        """Send every process a signal."""
        for process, _ in self._running.values():
            if number == signal.SIGKILL:
                _kill_group(process.pid)
            else:
                process.send_signal(number)

    def _exit_code(self, run: PlannedRun) -> int | None:
        process, _ = self._running[run]
        code = process.poll()
        if code:  # its data workers, say, end with it
            _kill_group(process.pid)
        return code

    def _threads(self, run: PlannedRun) -> int:
        """Return the cores of a run: its own, or a worker's share within OMP_NUM_THREADS."""
        limit = os.environ.get("OMP_NUM_THREADS", "")
        share = self._threads_per_worker
        return run.resources.cpus or min(share, int(limit) if limit.isdecimal() else share) or 1

    def _choose_gpus(self, run: PlannedRun) -> dict[str, float] | None:
        """Return GPU -> share for a run; {} if it needs none, None if too few are free."""
        needed = run.resources.gpus
        needed = min(1, len(self.gpus)) if needed is None else needed
        if not needed:
            return {}
        share, count = min(needed, 1.0), max(1, int(needed))
        taken = [shares for _, shares in self._running.values()]
        free = [g for g in self.gpus if sum(t.get(g, 0) for t in taken) + share <= 1 + 1e-6]
        return dict.fromkeys(free[:count], share) if len(free) >= count else None


def this_machine(workers: int) -> LocalLauncher:
    """Return a launcher with all cores, visible GPUs and memory of this machine."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = [str(index) for index in range(torch.cuda.device_count())]  # does not initialize it
    else:
        gpus = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    memory_gb = psutil.virtual_memory().total / 2**30
    return LocalLauncher(workers, cores=num_cores(), gpus=gpus, memory_gb=memory_gb)


class RayLauncher(Launcher):
    """A Ray cluster whose machines share the paths of the suite's folder, the code and the data.

    Args:
        address: of the cluster; None starts one on this machine.
        num_cpus: of a cluster that is started here; None is all.
    """

    def __init__(
        self, address: str | None, workers: int | None, *, num_cpus: int | None = None
    ) -> None:
        super().__init__(workers)
        self._ray = _import("ray", "ray")
        local = {} if address else {"num_cpus": num_cpus, "include_dashboard": False}
        self._ray.init(address=address, log_to_driver=False, **local)
        self._running: dict[PlannedRun, tuple[Any, Attempt]] = {}

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Refuse runs that no machine of the cluster can take: Ray would wait forever."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for run in runs:
            needed = _ray_resources(run)
            if not any(all(m.get(key, 0) >= n for key, n in needed.items()) for m in machines):
                raise ValueError(
                    f"resources: {run.task} needs {needed}, and no machine of the Ray cluster has "
                    "all of it. Ask for less, or add a machine."
                )

    def start(self, run: PlannedRun, attempt: Attempt) -> None:
        """Submit an attempt as a task; Ray sets CUDA_VISIBLE_DEVICES."""
        needed = _ray_resources(run)
        attempt.environment |= _thread_variables(run.threads)
        task = self._ray.remote(
            num_cpus=needed["CPU"],
            num_gpus=needed.get("GPU", 0),
            memory=needed.get("memory"),
            max_retries=0,  # the suite counts retries
        )(Attempt.__call__)
        try:
            reference = task.remote(attempt)
        except self._ray.exceptions.RayError as error:
            raise OSError(f"Ray refused {run.title}: {error}") from error
        self._running[run] = (reference, attempt)

    def stop(self, number: int) -> None:
        """Stop the attempts; those that Ray has not started yet never start."""
        for reference, attempt in self._running.values():
            attempt.stop(number)
            if number == signal.SIGKILL:
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster; end one that was started here."""
        self._ray.shutdown()

    def _exit_code(self, run: PlannedRun) -> int | None:
        """Return the exit code; a lost machine or cluster counts as a kill."""
        reference, _ = self._running[run]
        try:
            return int(self._ray.get(reference, timeout=0))
        except self._ray.exceptions.GetTimeoutError:
            return None
        except self._ray.exceptions.RayError:
            return KILLED


def _ray_resources(run: PlannedRun) -> dict[str, float]:
    """Return what a run needs, in Ray's names; memory in bytes."""
    needed = {
        "CPU": float(run.resources.cpus or 1),
        "GPU": run.resources.gpus or 0.0,
        "memory": (run.resources.memory_gb or 0) * 2**30,
    }
    return {key: amount for key, amount in needed.items() if amount}


class SlurmLauncher(Launcher):
    """Slurm by submitit; its machines share the paths of the suite's folder, code and data.

    Args:
        folder: for submitit's own files.
        cluster: `slurm`, or submitit's `local` to try it on one machine.
    """

    def __init__(self, folder: Path, workers: int | None, *, cluster: str = "slurm") -> None:
        super().__init__(workers)
        self._submitit = _import("submitit", "slurm")
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise ValueError(
                "--launcher slurm: this machine has no sbatch. Start the suite where jobs are "
                "submitted, or use --launcher local."
            )
        self.folder, self.cluster = folder, cluster
        self._running: dict[PlannedRun, tuple[Any, Attempt]] = {}

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Refuse runs without a time limit, or with a share of a GPU."""
        for run in runs:
            if run.resources.hours is None:
                raise ValueError(
                    f"resources.hours: {run.task} has none, and Slurm ends a job at its limit. "
                    "Set it for the suite or the task: the run continues in a new job."
                )
            if (run.resources.gpus or 0) % 1:
                raise ValueError(
                    f"resources.gpus: {run.task} needs {run.resources.gpus:g}, and Slurm assigns "
                    "whole GPUs. Ask for 1."
                )

    def start(self, run: PlannedRun, attempt: Attempt) -> None:
        """Submit an attempt as a job."""
        needed = run.resources
        executor = self._submitit.AutoExecutor(
            folder=self.folder, cluster=self.cluster, slurm_max_num_timeout=_MAX_REQUEUES
        )
        parameters: dict[str, Any] = {
            "name": f"{run.task}-{run.method}-{run.seed}",
            "timeout_min": max(1, round((needed.hours or 1) * 60)),
            "cpus_per_task": needed.cpus or 1,
            "gpus_per_node": int(needed.gpus or 0),
            "mem_gb": needed.memory_gb,
            "slurm_partition": needed.partition,
            "slurm_account": needed.account,
            "slurm_signal_delay_s": _SLURM_WARNING_SECONDS,
        }
        executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
        attempt.environment |= _thread_variables(run.threads)
        try:
            job = executor.submit(attempt)
        except RuntimeError as error:  # submitit's, with the message of sbatch
            raise OSError(
                f"Slurm refused {run.title}: {' '.join(str(error).split())}. If it limits the "
                "number of jobs, set workers to that limit."
            ) from error
        self._running[run] = (job, attempt)

    def stop(self, number: int) -> None:
        """Stop the jobs; cancel those that are still queued, as Slurm knows for certain."""
        for job, attempt in self._running.values():
            attempt.stop(number)
            if number == signal.SIGKILL:
                job.cancel(check=False)
            elif self.cluster == "slurm":
                subprocess.run(["scancel", "--state=PENDING", job.job_id], check=False)

    def _exit_code(self, run: PlannedRun) -> int | None:
        """Return the exit code; a job without a result counts as killed."""
        job, _ = self._running[run]
        if not job.done():
            return None
        try:
            return int(job.result())
        except Exception:  # whatever ended the job, the run can be retried
            return KILLED


def _import(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        hint = f"pip install 'tract_transfer[{extra}]', or use --launcher local."
        raise ImportError(f"{package} is not installed: {hint}") from error


def _thread_variables(count: int) -> dict[str, str]:
    return dict.fromkeys(_THREADS, str(count))


def why_it_ended(code: int, log: Path) -> str:
    """Explain a failure by the exit code and the last error in the log."""
    if code < 0:
        hint = ", as when memory runs out" if code == KILLED else ""
        return f"ended by signal {-code} ({signal.strsignal(-code)}){hint}; see {log}"
    return f"{_last_error(log) or f'exit code {code}'} (see {log})"


def _last_error(log: Path) -> str:
    """Return the end of a log from its last `error: ` or `SomeError: ` on, else its last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            text = file.read().decode(errors="replace").strip()
    except OSError:
        return ""
    start = max((match.start() for match in _ERROR.finditer(text)), default=text.rfind("\n") + 1)
    error = textwrap.shorten(text[start:], _SHOWN_CHARACTERS, placeholder=" ...")
    return error.removeprefix("error: ").removeprefix("failed: ")


def _end_with_parent() -> Callable[[], object] | None:
    """Return what a child calls to get SIGTERM when the thread that started it ends (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # not in the child: between fork and exec it must not look up
    return lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
