"""`suite.json`: the state of every run, written whole after each change; and who is at work."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import filelock
import yaml

from tract_transfer.files import RESULTS_FORMAT, make_folder, remove_temporary_files, write_json
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
        remove_temporary_files(self.owner_file.parent)
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


# --- What a run's folder holds of a planned run: nothing, a part, all, or another run.

_SHOWN_KEYS = 5


@dataclass(frozen=True)
class Found:
    """What is there.

    Attributes:
        state: `new`, `begun` (a checkpoint to go on from), `finished`, or `other`: of another
            config, other data, other weights or another version.
        why: of `other`, what differs; of `begun`, what is broken, if anything is.
        config_sha256: of config.yaml, where it was compared.
    """

    state: Literal["new", "begun", "finished", "other"]
    why: str = ""
    config_sha256: str = ""
    results: Mapping[str, Any] | None = None


def look(
    folder: Path,
    config: Mapping[str, Any],
    fingerprints: Mapping[str, str] | None,
    weights_sha256: str | None = None,
    *,
    weights_are_known: bool = True,
    changed: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]],
    known_sha256: str = "",
) -> Found:
    """Return what `folder` holds of the run that `config` describes.

    Args:
        fingerprints: of the data, split -> fingerprint; None where that is not known.
        weights_sha256: the hash in the card of the backbone it takes; None without a card. Off
            with `weights_are_known`, while that backbone is still to be trained.
        changed: (config then, config now) -> the keys that differ and may not, in words.
        known_sha256: of a config.yaml that was found to be this config before.
    """
    results, broken = _read_results(folder / "results.json")
    if results is not None and (form := results.get("format", RESULTS_FORMAT)) != RESULTS_FORMAT:
        return Found(
            "other", f"results.json has format {form!r}, and this version reads {RESULTS_FORMAT}"
        )
    if results is None and not broken and not any(folder.glob("checkpoints/iter_*")):
        return Found("new")
    try:
        text = (folder / "config.yaml").read_bytes()
    except OSError as error:
        return Found("other", f"config.yaml cannot be read ({error.strerror})")
    sha256 = hashlib.sha256(text).hexdigest()
    # Weights that a hash tells may lie anywhere: a suite can be moved.
    is_told = results is not None and (weights_sha256 is not None or not weights_are_known)
    anywhere = "model.weights: " if is_told else None
    if sha256 != known_sha256 and (why := _other_config(text, config, changed, anywhere)):
        return Found("other", why)
    if why := _other_data(folder, fingerprints):
        return Found("other", why)
    if results is None:
        return Found("begun", broken, sha256)
    if weights_are_known and results.get("weights_sha256") != weights_sha256:
        return Found("other", "its backbone has been trained anew since")
    return Found("finished", "", sha256, results)


def goes_on(folder: Path, found: Found) -> str:
    """Say where a run that was begun goes on from, and what is broken, if anything is."""
    newest = max((path.name for path in folder.glob("checkpoints/iter_*")), default="the beginning")
    return f"goes on from {newest}{f': {found.why}' if found.why else ''}"


def read_weights_sha256(folder: Path) -> str | None:
    """Return the hash that the card of a run's backbone tells; None without a whole card."""
    try:
        card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(card.get("sha256")) if isinstance(card, dict) else None


def _read_results(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return results that are whole, or of another format; or why they are neither, "" of none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"results.json cannot be read ({error})"
    if isinstance(results, dict) and results.get("format", RESULTS_FORMAT) != RESULTS_FORMAT:
        return results, ""
    if not isinstance(results, dict) or not isinstance(results.get("metrics"), dict):
        return None, "results.json has no metrics"
    if results.get("primary_metric") not in results["metrics"]:
        return None, "results.json lacks its primary metric"
    return results, ""


def _other_config(
    text: bytes,
    config: Mapping[str, Any],
    changed: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]],
    but_for: str | None,
) -> str:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        then = yaml.load(text, loader)
    except (yaml.YAMLError, ValueError) as error:
        return f"config.yaml is not YAML ({error})"
    if not isinstance(then, dict):
        return "config.yaml is no mapping"
    keys = [key for key in changed(then, config) if not (but_for and key.startswith(but_for))]
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return "; ".join(keys[:_SHOWN_KEYS]) + more


def _other_data(folder: Path, fingerprints: Mapping[str, str] | None) -> str:
    if fingerprints is None:
        return ""
    then = read_fingerprints(folder)
    if then is None:
        return "environment.json does not tell its data"
    differ = sorted(
        k for k in then.keys() | fingerprints.keys() if then.get(k) != fingerprints.get(k)
    )
    return f"other images or labels in data.{' and data.'.join(differ)}" if differ else ""


def read_fingerprints(folder: Path) -> dict[str, str] | None:
    """Return split -> fingerprint of the data that a run has read; None where it does not tell."""
    try:
        data = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return data if isinstance(data, dict) else None
