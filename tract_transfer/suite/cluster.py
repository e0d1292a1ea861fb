"""Runs as Slurm jobs, by submitit: queued again after a time limit or a preemption."""

import logging
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tract_transfer.suite.launchers import Attempt, Handle, on_threads, wait_for_leftovers
from tract_transfer.suite.plan import PlannedRun

INSTALL_SUBMITIT = (
    "submitit is not installed: pip install 'tract_transfer[slurm]', or use --launcher local."
)
KILLED = -9
_SIGNAL_SECONDS = 120  # before its time is over, a job is told to write a checkpoint
_MOST_JOBS = 10_000  # of a run, each until its time is over; submitit's own limit is 3
_CANCEL_SECONDS = 60.0  # which Slurm takes to end a job that was cancelled
logger = logging.getLogger(__name__)


class SlurmLauncher:
    """Slurm, whose machines share the suite's folder, the code and the data by their paths.

    Args:
        folder: of submitit's own files.
        workers: at most so many jobs at a time; None leaves it to Slurm.
        cluster: `slurm`, or submitit's `local` to try it on one machine.

    Raises:
        ImportError: submitit is not installed.
        ValueError: there is no Slurm on this machine.
    """

    name = "slurm"

    def __init__(self, folder: Path, workers: int | None, *, cluster: str = "slurm") -> None:
        try:
            import submitit
        except ImportError as error:
            raise ImportError(INSTALL_SUBMITIT) from error
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise ValueError(
                "--launcher slurm: this machine has no sbatch. Start the suite where jobs are "
                "submitted, or use --launcher local."
            )
        self._submitit: Any = submitit
        self.folder, self.workers, self.cluster = folder, workers, cluster
        self._running: dict[PlannedRun, tuple[Any, Attempt]] = {}

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Refuse runs without a time limit, or with a part of a GPU."""
        for run in runs:
            if run.resources.hours is None:
                raise ValueError(
                    f"resources.hours: {run.task} has none, and Slurm ends a job at its limit. "
                    "Set it for the suite or for the task: a run goes on in a new job."
                )
            if (run.resources.gpus or 0) % 1:
                raise ValueError(
                    f"resources.gpus: {run.task} asks for {run.resources.gpus:g}, and Slurm gives "
                    "whole GPUs. Ask for 1."
                )

    def has_room(self, run: PlannedRun) -> bool:
        """Whether fewer than `workers` are under way."""
        return self.workers is None or len(self._running) < self.workers

    def start(self, run: PlannedRun, attempt: Attempt) -> Handle:
        """Submit an attempt as a job.

        Raises:
            OSError: Slurm does not take it.
        """
        wanted = run.resources
        executor = self._submitit.AutoExecutor(
            folder=self.folder, cluster=self.cluster, slurm_max_num_timeout=_MOST_JOBS
        )
        asked: dict[str, Any] = {
            "name": f"{run.task}-{run.method}-{run.seed}",
            "timeout_min": max(1, round((wanted.hours or 1) * 60)),
            "cpus_per_task": wanted.cpus or 1,
            "gpus_per_node": int(wanted.gpus or 0),
            "mem_gb": wanted.memory_gb,
            "slurm_partition": wanted.partition,
            "slurm_account": wanted.account,
            "slurm_signal_delay_s": _SIGNAL_SECONDS,
        }
        executor.update_parameters(**{k: v for k, v in asked.items() if v is not None})
        attempt.environment = {**attempt.environment, **on_threads(run.threads)}
        attempt.stop_file.unlink(missing_ok=True)
        try:
            job = executor.submit(attempt)
        except RuntimeError as error:  # submitit's, with what sbatch said
            raise OSError(
                f"Slurm does not take {run.title}: {' '.join(str(error).split())}. Where it has a "
                "limit of jobs, set workers to it."
            ) from error
        self._running[run] = (job, attempt)
        return {"job": job.job_id, "stop_file": str(attempt.stop_file)}

    def ended(self) -> list[tuple[PlannedRun, int]]:
        """Return the runs whose jobs have ended since; one without a result counts as killed."""
        done = []
        for run, (job, _) in list(self._running.items()):
            if not job.done():
                continue
            try:
                code = int(job.result())
            except Exception:  # whatever took the job, the run is to be retried
                code = KILLED
            del self._running[run]
            done.append((run, code))
        return done

    def stop(self, number: int) -> None:
        """Tell the jobs to end; those that still queue are cancelled."""
        for job, attempt in self._running.values():
            attempt.stop(number)
            if number == signal.SIGKILL:
                job.cancel(check=False)
            else:
                self._cancel_queued(job)

    def ask_leftovers(self, handles: Sequence[Handle]) -> None:
        """Tell the jobs of a suite that was killed to end, by a file that each heeds once."""
        for handle in handles:
            if "job" in handle:
                stop_file = Path(handle["stop_file"])
                stop_file.parent.mkdir(parents=True, exist_ok=True)
                stop_file.write_text(str(int(signal.SIGTERM)))
                self._cancel_queued(self._job(handle["job"]))
                handle["asked"] = int(signal.SIGTERM)

    def end_leftovers(self, handles: Sequence[Handle]) -> None:
        """Let the jobs that were asked write a checkpoint and end."""
        left = [self._job(handle["job"]) for handle in handles if "job" in handle]
        late = wait_for_leftovers(left, self._has_ended)
        for job in late:
            logger.warning(
                "Job %s did not end: it is cancelled, and its run goes on from the checkpoint "
                "before.", job.job_id,
            )  # fmt: skip
            job.cancel(check=False)
        wait_for_leftovers(late, self._has_ended, _CANCEL_SECONDS)

    def _cancel_queued(self, job: Any) -> None:
        """Cancel a job that has not begun.

        Slurm itself looks: what is known here of a job's state is old, and one that runs would be
        ended without a checkpoint.
        """
        if self.cluster == "slurm":
            subprocess.run(["scancel", "--state=PENDING", job.job_id], check=False)

    def _job(self, name: str) -> Any:
        from submitit.local.local import LocalJob

        kind = self._submitit.SlurmJob if self.cluster == "slurm" else LocalJob
        return kind(self.folder, name)

    def _has_ended(self, job: Any) -> bool:
        """Whether it left a result, or is known to be gone."""
        if job.paths.result_pickle.exists():
            return True
        if self.cluster == "slurm":
            return bool(job.done())
        try:
            return psutil.Process(int(job.job_id)).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def close(self) -> None:
        """Nothing is held."""


# --- Runs on a Ray cluster: Ray finds the machine with what a run asks for.

INSTALL_RAY = "Ray is not installed: pip install 'tract_transfer[ray]', or use --launcher local."
_GET_SECONDS = 1.0  # for what has ended: of a task that runs, nobody waits for the result


class RayLauncher:
    """A Ray cluster whose machines share the suite's folder, the code and the data by their paths.

    Args:
        address: of the cluster; None starts one on this machine.
        workers: at most so many runs at a time; None leaves it to Ray.
        num_cpus: of a cluster that is started here; None is all.

    Raises:
        ImportError: Ray is not installed.
    """

    name = "ray"

    def __init__(
        self, address: str | None, workers: int | None, *, num_cpus: int | None = None
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(INSTALL_RAY) from error
        self._ray: Any = ray
        own: dict[str, Any] = {} if address else {"num_cpus": num_cpus, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, **own)
        self.workers = workers
        self._running: dict[PlannedRun, tuple[Any, Attempt]] = {}

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Refuse runs that no machine of the cluster can take: Ray would wait forever."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for run in runs:
            wanted = _resources(run)
            if not any(all(m.get(key, 0) >= n for key, n in wanted.items()) for m in machines):
                raise ValueError(
                    f"resources: {run.task} asks for {wanted}, and no machine of the Ray cluster "
                    "has all of it. Ask for less, or add a machine."
                )

    def has_room(self, run: PlannedRun) -> bool:
        """Whether fewer than `workers` are under way."""
        return self.workers is None or len(self._running) < self.workers

    def start(self, run: PlannedRun, attempt: Attempt) -> Handle:
        """Hand an attempt to Ray, which gives it CUDA_VISIBLE_DEVICES.

        Raises:
            OSError: Ray does not take it.
        """
        wanted = _resources(run)
        attempt.environment = {**attempt.environment, **on_threads(run.threads)}
        attempt.stop_file.unlink(missing_ok=True)
        carry_out = self._ray.remote(
            num_cpus=wanted["CPU"],
            num_gpus=wanted.get("GPU", 0),
            memory=wanted.get("memory", 0) or None,
            max_retries=0,  # a retry is the suite's to count
        )(_carry_out)
        try:
            reference = carry_out.remote(attempt)
        except self._ray.exceptions.RayError as error:
            raise OSError(f"Ray does not take {run.title}: {error}") from error
        self._running[run] = (reference, attempt)
        return {}  # Ray ends the tasks of a driver that died

    def ended(self) -> list[tuple[PlannedRun, int]]:
        """Return the runs that have ended since; a lost machine or cluster counts as a kill."""
        by_reference = {reference: run for run, (reference, _) in self._running.items()}
        ready = list(by_reference)
        if not ready:
            return []
        with suppress(self._ray.exceptions.RayError):  # then each of them tells its own
            ready, _ = self._ray.wait(ready, num_returns=len(ready), timeout=0)
        done = []
        for reference in ready:
            run = by_reference[reference]
            try:
                code = int(self._ray.get(reference, timeout=_GET_SECONDS))
            except self._ray.exceptions.GetTimeoutError:  # where wait could not tell, it runs
                continue
            except self._ray.exceptions.RayError:
                code = KILLED
            del self._running[run]
            done.append((run, code))
        return done

    def stop(self, number: int) -> None:
        """Tell the attempts to end; those that Ray has not started yet never begin."""
        for reference, attempt in self._running.values():
            attempt.stop(number)
            if number == -KILLED:
                self._ray.cancel(reference, force=True)

    def ask_leftovers(self, handles: Sequence[Handle]) -> None:
        """There are none: tasks end with their driver."""

    def end_leftovers(self, handles: Sequence[Handle]) -> None:
        """There are none: tasks end with their driver."""

    def close(self) -> None:
        """Leave the cluster; end one that was started here."""
        self._ray.shutdown()


def _carry_out(attempt: Attempt) -> int:
    return attempt()


def _resources(run: PlannedRun) -> dict[str, float]:
    """Return what a run asks of Ray, in Ray's names; memory in bytes."""
    wanted = {"CPU": float(run.resources.cpus or 1)}
    if run.resources.gpus:
        wanted["GPU"] = run.resources.gpus
    if run.resources.memory_gb:
        wanted["memory"] = run.resources.memory_gb * 2**30
    return wanted
