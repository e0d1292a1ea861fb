"""`suite.json`: the state of every run, written whole after each change; and who is at work."""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from tract_transfer.files import make_folder, remove_leftovers, write_json
from tract_transfer.suite.plan import PRETRAIN, PlannedRun

SUITE_NAME, KEPT_NAME = "suite.json", ".plan.json"
_LOCK_NAME, _OWNER_NAME = ".lock", ".owner.json"
FORMAT = 1
STATES = ("waiting", "running", "finished", "failed", "blocked")


@dataclass
class Job:
    """A planned run and what has become of it.

    Attributes:
        state: one of STATES; `blocked` where the run it needs failed.
        attempts: how often it was started since it began: with a new folder the count begins anew.
        error: why the last attempt failed, or what it waits for will not come.
        seconds: of all its attempts, once it is finished.
        config_sha256: of the config.yaml that was found to be its own.
        note: what the next attempt begins with, for the screen.
        spent: seconds of all its attempts so far, without those that ended with the suite itself.
        last: seconds of its last attempt in this session.
        begun_with: the hash of the backbone it began with, if any.
    """

    run: PlannedRun
    state: str = "waiting"
    attempts: int = 0
    error: str | None = None
    seconds: float | None = None
    config_sha256: str = ""
    note: str = ""
    spent: float = 0.0
    last: float = 0.0
    begun_with: str | None = None


class Journal:
    """Writes suite.json; a reader sees the old file or the new one."""

    def __init__(self, folder: Path, *, title: str, baseline: str, methods: Sequence[str]) -> None:
        self.path = folder / SUITE_NAME
        self._head = {"format": FORMAT, "title": title, "baseline": baseline}
        self._methods = list(methods)

    def write(self, jobs: Sequence[Job]) -> None:
        """Write the state of all runs."""
        runs = [job.run for job in jobs]
        tasks = sorted(dict.fromkeys(run.task for run in runs), key=lambda task: task != PRETRAIN)
        content = {
            **self._head,
            "methods": self._methods,
            "tasks": tasks,
            "seeds": list(dict.fromkeys(run.seed for run in runs)),
            "runs": [self._entry(job) for job in jobs],
        }
        make_folder(self.path.parent)
        write_json(self.path, content)

    def _entry(self, job: Job) -> dict[str, Any]:
        run, here = job.run, self.path.parent
        return {
            "id": run.id,
            "method": run.method,
            "task": run.task,
            "seed": run.seed,
            "folder": os.path.relpath(run.folder, here),
            "needs": os.path.relpath(run.needs, here) if run.needs else None,
            "state": job.state,
            "attempts": job.attempts,
            "error": job.error,
            "seconds": job.seconds,
            "also": list(run.also),
            "config_sha256": job.config_sha256,
            "spent": round(job.spent, 1),
            "begun_with": job.begun_with,
        }

    def recall(self, runs: Sequence[PlannedRun]) -> list[Job]:
        """Return the runs with what an earlier suite.json tells of the same ones."""
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))["runs"]
            known = {(entry["folder"], entry["id"]): entry for entry in entries}
        except (OSError, ValueError, LookupError, TypeError):
            known = {}
        jobs = []
        for run in runs:
            entry = known.get((os.path.relpath(run.folder, self.path.parent), run.id), {})
            jobs.append(
                Job(
                    run,
                    attempts=int(entry.get("attempts") or 0),
                    seconds=entry.get("seconds"),
                    config_sha256=str(entry.get("config_sha256") or ""),
                    spent=float(entry.get("spent") or 0.0),
                    begun_with=entry.get("begun_with"),
                )
            )
        return jobs


class SuiteLock:
    """Keeps a second process out of a suite's folder; the system frees it when this one dies.

    Attributes:
        owner_file: tells who is at work, and on what.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = filelock.FileLock(folder / _LOCK_NAME)
        self.owner_file = folder / _OWNER_NAME
        self._jobs: dict[str, Any] = {}

    def acquire(self) -> dict[str, Any]:
        """Take the folder; return the leftovers of a process that died: job -> how to find it.

        They stay written down until `tell` says otherwise: who ends them may die as well.

        Raises:
            FileExistsError: another process is at work here.
        """
        self._take()
        remove_leftovers(self.owner_file.parent)
        left = _read(self.owner_file).get("jobs")
        left = left if isinstance(left, dict) else {}
        self.tell(left)
        return left

    def check(self) -> None:
        """Refuse a folder as `acquire` does, and leave it as it is."""
        if Path(self._lock.lock_file).exists():
            self._take()
            self._lock.release()

    def _take(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            owner = _read(self.owner_file)
            raise FileExistsError(
                f"{self.owner_file.parent}: another run_suite is at work here (process "
                f"{owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}). Wait for "
                "it, or end it, or set another output_dir."
            ) from None

    def tell(self, jobs: Mapping[str, Any]) -> None:
        """Write down which jobs run, so that whoever comes after a crash can end them."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        self._jobs = dict(jobs)
        write_json(self.owner_file, {**owner, "jobs": self._jobs})

    def release(self) -> None:
        """Leave the folder to others, with word of the jobs that are not known to have ended."""
        if not self._jobs:
            self.owner_file.unlink(missing_ok=True)
        self._lock.release()


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
