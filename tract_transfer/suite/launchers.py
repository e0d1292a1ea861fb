"""Where runs execute: as processes of this machine, tasks of a Ray cluster, or jobs of Slurm."""

import ctypes
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tract_transfer.suite.plan import PlannedRun

LOG_NAME = "console.txt"
_INSTALL = "{0} is not installed: pip install 'tract_transfer[{1}]', or use --launcher local."
KILLED = -int(signal.SIGKILL)
# For a run to end after a signal: a step or a batch of an evaluation, and a checkpoint.
ENDING_SECONDS = 600.0
_CANCEL_SECONDS = 60.0  # for Slurm to end a cancelled job
_SLURM_WARNING_SECONDS = 120  # before its time limit a job is asked to write a checkpoint
_MAX_REQUEUES = 10_000  # of a job after its time limit; submitit's default is 3
_RAY_GET_SECONDS = 1.0  # never wait for the result of a task that still runs
_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
_ERROR = re.compile(r"^(?:error|failed|[^:\n]*Error)(?=:|$)", re.MULTILINE)
_SHOWN_CHARACTERS = 1200  # of an error
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
logger = logging.getLogger(__name__)
# Plain values by which another process finds an attempt that outlives this one: a job of Slurm.
Handle = dict[str, Any]


@dataclass
class Attempt:
    """One attempt at a run: a process of its own, so that a crash ends only that run.

    Calling it on another machine runs the command and returns its exit code. Files are the only way
    to reach it there: a signal number in `stop_file` is sent to the process.

    Attributes:
        log: its standard output and error are appended to this file.
        environment: added to the machine's own.
    """

    command: Sequence[str]
    log: Path
    stop_file: Path
    environment: Mapping[str, str] = field(default_factory=dict)
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
        if (number := _read_number(self.stop_file)) is not None:
            return 128 + number  # stopped while it was queued
        self._signalled = False  # it may have been, in an earlier job
        process = self._process = self.start()
        while (code := process.poll()) is None:
            if (number := _read_number(self.stop_file)) is not None:
                self._signal(process, number)
            time.sleep(_POLL_SECONDS)
        return code

    def stop(self, number: int) -> None:
        """Send the attempt a signal by its stop file, wherever it runs."""
        _write_stop_file(self.stop_file, number)

    def checkpoint(self) -> Any:
        """Let the run write a checkpoint and queue it again; Slurm takes the machine back."""
        import submitit

        if self._process is not None:
            self._signal(self._process, signal.SIGTERM)
            self._process.wait()
            self._process = None  # a process cannot be pickled
        return submitit.helpers.DelayedSubmission(self)

    def _signal(self, process: "subprocess.Popen[bytes]", number: int) -> None:
        """Send at most one signal: a second one would end the run without a checkpoint."""
        if not self._signalled:
            process.send_signal(number)
            self._signalled = True


class Launcher:
    """Starts attempts and reports how they ended.

    Attributes:
        name: the value of --launcher.
        workers: maximum number of runs at a time; None leaves it to the cluster.
    """

    name: str

    def __init__(self, workers: int | None) -> None:
        self.workers = workers
        self._running: dict[PlannedRun, Any] = {}  # what `start` keeps of an attempt

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Refuse runs that this launcher can never start.

        Raises:
            ValueError: names key, run and fix.
        """
        raise NotImplementedError

    def has_room(self, run: PlannedRun) -> bool:
        """Return whether a run can start now."""
        return self.workers is None or len(self._running) < self.workers

    def start(self, run: PlannedRun, attempt: Attempt) -> Handle | None:
        """Start an attempt at a run; return a handle if it can outlive this process.

        Raises:
            OSError: it cannot be started.
        """
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

    def end_jobs(self, left: Mapping[str, Handle]) -> None:
        """End the jobs that a killed suite left, by run folder, each with a checkpoint.

        Raises:
            FileExistsError: this launcher cannot end them.
        """
        if left:
            raise FileExistsError(
                f"{', '.join(left)}: started with --launcher slurm by a suite that was killed, and "
                "may still be running. Nothing was started. Use --launcher slurm, which lets them "
                "write a checkpoint. If they have ended, remove .owner.json in the suite's folder."
            )

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

    name = "local"

    def __init__(self, workers: int, *, cores: int, gpus: Sequence[str], memory_gb: float) -> None:
        super().__init__(workers)
        self.cores, self.memory_gb = cores, memory_gb
        self._threads_per_worker = max(1, cores // workers)
        self._free = dict.fromkeys(gpus, 1.0)  # GPU -> free share
        self._running: dict[PlannedRun, tuple[subprocess.Popen[bytes], dict[str, float]]] = {}

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Refuse runs that need more than the machine has."""
        machine = {"cpus": self.cores, "gpus": len(self._free), "memory_gb": self.memory_gb}
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
        cpus = sum(self._threads(each) for each in runs)
        memory_gb = sum(each.resources.memory_gb or 0 for each in runs)
        return not self._running or (cpus <= self.cores and memory_gb <= self.memory_gb)

    def start(self, run: PlannedRun, attempt: Attempt) -> Handle | None:
        """Start a process with its own threads and GPUs."""
        shares = self._choose_gpus(run)
        assert shares is not None
        # An empty CUDA_VISIBLE_DEVICES keeps a run without a GPU off the first one.
        threads = max(1, self._threads(run) // run.processes)
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(shares)}
        attempt.environment = {**attempt.environment, **thread_variables(threads), **devices}
        process = attempt.start()
        for gpu, share in shares.items():
            self._free[gpu] -= share
        self._running[run] = (process, shares)
        return None

    def stop(self, number: int) -> None:
        """Send every process a signal."""
        for process, _ in self._running.values():
            if number == signal.SIGKILL:
                _kill_group(process.pid)
            else:
                process.send_signal(number)

    def _exit_code(self, run: PlannedRun) -> int | None:
        process, shares = self._running[run]
        code = process.poll()
        if code is not None:
            for gpu, share in shares.items():
                self._free[gpu] += share
            if code:  # its data workers, say, end with it
                _kill_group(process.pid)
        return code

    def _threads(self, run: PlannedRun) -> int:
        """Return the cores of a run: its own, or a worker's share within OMP_NUM_THREADS."""
        limit = os.environ.get("OMP_NUM_THREADS", "")
        limited = limit.isdecimal() and int(limit) > 0
        share = min(self._threads_per_worker, int(limit)) if limited else self._threads_per_worker
        return run.resources.cpus or share

    def _choose_gpus(self, run: PlannedRun) -> dict[str, float] | None:
        """Return GPU -> share for a run; {} if it needs none, None if too few are free."""
        needed = run.resources.gpus
        needed = min(1, len(self._free)) if needed is None else needed
        if not needed:
            return {}
        share, count = min(needed, 1.0), max(1, int(needed))
        free = [gpu for gpu, left in self._free.items() if left >= share - 1e-6]
        return dict.fromkeys(free[:count], share) if len(free) >= count else None


def this_machine(workers: int) -> LocalLauncher:
    """Return a launcher with all cores, GPUs and memory of this machine."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    memory_gb = psutil.virtual_memory().total / 2**30
    return LocalLauncher(workers, cores=cores, gpus=find_gpus(os.environ), memory_gb=memory_gb)


def find_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the GPUs, as in CUDA_VISIBLE_DEVICES."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]  # does not initialize CUDA


class RayLauncher(Launcher):
    """A Ray cluster whose machines share the paths of the suite's folder, the code and the data.

    Args:
        address: of the cluster; None starts one on this machine.
        num_cpus: of a cluster that is started here; None is all.

    Raises:
        ImportError: Ray is not installed.
    """

    name = "ray"

    def __init__(
        self, address: str | None, workers: int | None, *, num_cpus: int | None = None
    ) -> None:
        super().__init__(workers)
        try:
            import ray
        except ImportError as error:
            raise ImportError(_INSTALL.format("Ray", "ray")) from error
        self._ray: Any = ray
        local = {} if address else {"num_cpus": num_cpus, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, **local)
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

    def start(self, run: PlannedRun, attempt: Attempt) -> Handle | None:
        """Submit an attempt as a task; Ray sets CUDA_VISIBLE_DEVICES."""
        needed = _ray_resources(run)
        attempt.environment = {**attempt.environment, **thread_variables(run.threads)}
        attempt.stop_file.unlink(missing_ok=True)
        task = self._ray.remote(
            num_cpus=needed["CPU"],
            num_gpus=needed.get("GPU", 0),
            memory=needed.get("memory", 0) or None,
            max_retries=0,  # the suite counts retries
        )(_call)
        try:
            reference = task.remote(attempt)
        except self._ray.exceptions.RayError as error:
            raise OSError(f"Ray refused {run.title}: {error}") from error
        self._running[run] = (reference, attempt)
        return None

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
        errors = self._ray.exceptions
        with suppress(errors.RayError):  # if wait fails, get reports the task's own error
            if not self._ray.wait([reference], timeout=0)[0]:
                return None
        try:
            return int(self._ray.get(reference, timeout=_RAY_GET_SECONDS))
        except errors.GetTimeoutError:
            return None
        except errors.RayError:
            return KILLED


def _call(attempt: Attempt) -> int:
    return attempt()


def _ray_resources(run: PlannedRun) -> dict[str, float]:
    """Return what a run needs, in Ray's names; memory in bytes."""
    needed = {"CPU": float(run.resources.cpus or 1)}
    if run.resources.gpus:
        needed["GPU"] = run.resources.gpus
    if run.resources.memory_gb:
        needed["memory"] = run.resources.memory_gb * 2**30
    return needed


class SlurmLauncher(Launcher):
    """Slurm by submitit; its machines share the paths of the suite's folder, code and data.

    Args:
        folder: for submitit's own files.
        cluster: `slurm`, or submitit's `local` to try it on one machine.

    Raises:
        ImportError: submitit is not installed.
        ValueError: this machine has no Slurm.
    """

    name = "slurm"

    def __init__(self, folder: Path, workers: int | None, *, cluster: str = "slurm") -> None:
        super().__init__(workers)
        try:
            import submitit
        except ImportError as error:
            raise ImportError(_INSTALL.format("submitit", "slurm")) from error
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise ValueError(
                "--launcher slurm: this machine has no sbatch. Start the suite where jobs are "
                "submitted, or use --launcher local."
            )
        self._submitit: Any = submitit
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

    def start(self, run: PlannedRun, attempt: Attempt) -> Handle | None:
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
        attempt.environment = {**attempt.environment, **thread_variables(run.threads)}
        attempt.stop_file.unlink(missing_ok=True)
        try:
            job = executor.submit(attempt)
        except RuntimeError as error:  # submitit's, with the message of sbatch
            raise OSError(
                f"Slurm refused {run.title}: {' '.join(str(error).split())}. If it limits the "
                "number of jobs, set workers to that limit."
            ) from error
        self._running[run] = (job, attempt)
        return {"job": job.job_id, "stop_file": str(attempt.stop_file)}

    def stop(self, number: int) -> None:
        """Stop the jobs; cancel those that are still queued."""
        for job, attempt in self._running.values():
            attempt.stop(number)
            if number == signal.SIGKILL:
                job.cancel(check=False)
            else:
                self._cancel_if_queued(job)

    def end_jobs(self, left: Mapping[str, Handle]) -> None:
        """Let jobs write a checkpoint and end; cancel those that do not end in time."""
        jobs = [self._submitit.SlurmJob(self.folder, handle["job"]) for handle in left.values()]
        for job, handle in zip(jobs, left.values(), strict=True):
            _write_stop_file(Path(handle["stop_file"]), signal.SIGTERM)
            self._cancel_if_queued(job)
        late = self._wait(jobs, ENDING_SECONDS)
        for job in late:
            logger.warning("Job %s did not end and is cancelled.", job.job_id)
            job.cancel(check=False)
        self._wait(late, _CANCEL_SECONDS)

    def _wait(self, jobs: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Wait until jobs have ended; return those that have not in time."""
        end = time.monotonic() + seconds
        while jobs and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            jobs = [job for job in jobs if not self._has_ended(job)]
        return jobs

    def _exit_code(self, run: PlannedRun) -> int | None:
        """Return the exit code; a job without a result counts as killed."""
        job, _ = self._running[run]
        if not job.done():
            return None
        try:
            return int(job.result())
        except Exception:  # whatever ended the job, the run can be retried
            return KILLED

    def _cancel_if_queued(self, job: Any) -> None:
        """Cancel a job that has not started.

        Slurm decides: the state known here may be old, and a running job would be ended without a
        checkpoint.
        """
        if self.cluster == "slurm":
            subprocess.run(["scancel", "--state=PENDING", job.job_id], check=False)

    def _has_ended(self, job: Any) -> bool:
        has_result: bool = job.paths.result_pickle.exists()
        return has_result or (self.cluster == "slurm" and bool(job.done()))


def thread_variables(count: int) -> dict[str, str]:
    """Return the environment variables that give a process `count` threads."""
    return dict.fromkeys(_THREADS, str(count))


def why_it_ended(code: int, log: Path) -> str:
    """Explain a failure by the exit code and the last error in the log."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = ", as when memory runs out" if -code == signal.SIGKILL else ""
        return f"ended by {name}{hint}; see {log}"
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
    error = " ".join(text[start:].splitlines())
    if len(error) > _SHOWN_CHARACTERS:
        error = error[:_SHOWN_CHARACTERS].rpartition(" ")[0] + " ..."
    return error.removeprefix("error: ").removeprefix("failed: ")


def _end_with_parent() -> Callable[[], object] | None:
    """Return what a child calls to get SIGTERM when the thread that started it ends (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # not in the child: between fork and exec it must not look up
    return lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _read_number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _write_stop_file(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(int(number)))


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
