"""Runs on a Ray cluster: Ray finds the machine with what a run asks for."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tract_transfer.suite.attempt import Attempt, on_threads
from tract_transfer.suite.launchers import Handle
from tract_transfer.suite.plan import PlannedRun

INSTALL = "Ray is not installed: pip install 'tract_transfer[ray]', or use --launcher local."
_KILLED = -9
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
            raise ImportError(INSTALL) from error
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
                code = _KILLED
            del self._running[run]
            done.append((run, code))
        return done

    def stop(self, number: int) -> None:
        """Tell the attempts to end; those that Ray has not started yet never begin."""
        for reference, attempt in self._running.values():
            attempt.stop(number)
            if number == -_KILLED:
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
