"""The state of a suite: suite.json, and what its run folders contain."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tract_transfer.config.suite import SuiteConfig
from tract_transfer.engine.run_folder import changed_keys
from tract_transfer.files import (
    CONFIG_NAME,
    ENVIRONMENT_NAME,
    RESULTS_FORMAT,
    RESULTS_NAME,
    SUITE_FORMAT,
    SUITE_NAME,
    make_folder,
    redact,
    write_json,
)
from tract_transfer.suite.plan import PlannedRun

# What an entry recalls of its run, and of which type.
_HISTORY = {"attempts": int, "seconds": float, "spent": float, "begun_with": str}
_SHOWN_KEYS = 5  # of a config that differs


@dataclass(frozen=True)
class FolderState:
    """What a run folder contains.

    Attributes:
        state: `new`; `begun` (a checkpoint to resume from); `finished`; or `other`, a run with
            another config, data, backbone or format.
        why: what differs (`other`), or where the run resumes (`begun`).
        config_sha256: of config.yaml, if it was compared.
    """

    state: Literal["new", "begun", "finished", "other"]
    why: str = ""
    config_sha256: str = ""
    results: Mapping[str, Any] | None = None


@dataclass
class Job:
    """A planned run and its progress.

    Attributes:
        needed: the job whose backbone it takes; blocks this one if it fails.
        attempts: how often it was started since its folder was new.
        error: why the last attempt failed, or why the run is blocked.
        seconds: total time of its attempts, once it is finished.
        config_sha256: of config.yaml, once it is finished.
        note: what the next attempt does, for the screen.
        spent: seconds of its attempts so far, except those that a kill of the suite cut off.
        last: seconds of its last attempt in this session.
        begun_with: sha256 of the backbone it started from, if any.
    """

    run: PlannedRun
    needed: "Job | None" = None
    state: Literal["waiting", "running", "finished", "failed", "blocked"] = "waiting"
    attempts: int = 0
    error: str | None = None
    seconds: float | None = None
    config_sha256: str = ""
    note: str = ""
    spent: float = 0.0
    last: float = 0.0
    begun_with: str | None = None

    @property
    def can_start(self) -> bool:
        """Whether the backbone that it takes is available."""
        return self.needed is None or self.needed.state == "finished"

    def inspect(self) -> FolderState:
        """Return what the run folder contains."""
        weights = backbone_sha256(self.run) if self.can_start else None
        content = inspect_folder(self.run, weights, backbone_known=self.can_start)
        if content.state == "begun" and self.can_start and self.begun_with not in (None, weights):
            return FolderState("other", "its backbone has been retrained since it started")
        return content


class Suite:
    """A planned suite and the state of its runs, which `write` stores in suite.json.

    Attributes:
        jobs: one for each run, in the same order, with the history that suite.json has of it.
        interrupted: folders of runs that suite.json has as running: the suite was killed.
    """

    def __init__(self, config: SuiteConfig, runs: Sequence[PlannedRun]) -> None:
        self.config, self.runs = config, list(runs)
        self.folder = Path(config.output_dir)
        self.interrupted: list[Path] = []
        self.jobs = self._recall()

    def take_stock(self) -> dict[Path, str]:
        """Set every job's state from its folder; return folders with another run, and why."""
        others = {}
        for job in self.jobs:
            content = job.inspect()
            if content.state == "other":
                others[job.run.folder] = content.why
            elif content.state == "begun":
                job.note = content.why
            elif content.state == "finished" and job.can_start:
                job.state, job.config_sha256 = "finished", content.config_sha256
            elif content.state == "finished":
                job.note = "finished, if its backbone turns out the same"
        return others

    def set_aside(self, run_folder: Path) -> Path:
        """Move another run's folder to set_aside/; return its new path."""
        path = self.folder / "set_aside" / run_folder.relative_to(self.folder)
        number = 1
        while (target := path.with_name(f"{path.name}_{number}")).exists():
            number += 1
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(run_folder, target)
        return target

    def write(self) -> None:
        """Write suite.json; readers see the old file or the new one."""
        content = {
            "format": SUITE_FORMAT,
            "title": self.config.title,
            "baseline": self.config.baseline,
            "methods": list(self.config.methods),
            "tasks": list(dict.fromkeys(run.task for run in self.runs)),
            "seeds": list(dict.fromkeys(run.seed for run in self.runs)),
            "runs": [self._entry(job) for job in self.jobs],
        }
        make_folder(self.folder)
        write_json(self.folder / SUITE_NAME, content)

    def _entry(self, job: Job) -> dict[str, Any]:
        run = job.run
        progress = ("state", "attempts", "error", "seconds", "config_sha256", "begun_with")
        return {
            **{key: getattr(run, key) for key in ("id", "method", "task", "seed", "also")},
            "folder": os.path.relpath(run.folder, self.folder),
            "needs": os.path.relpath(run.needs, self.folder) if run.needs else None,
            **{key: getattr(job, key) for key in progress},
            "spent": round(job.spent, 1),
        }

    def _recall(self) -> list[Job]:
        """Return the jobs, with the history that an earlier suite.json has of the same runs."""
        try:
            entries = _read_json(self.folder / SUITE_NAME)["runs"]
            history = {(entry["folder"], entry["id"]): entry for entry in entries}
            running = [entry["folder"] for entry in entries if entry.get("state") == "running"]
            self.interrupted = [self.folder / folder for folder in running]
        except (LookupError, TypeError):
            history = {}
        jobs: dict[Path | None, Job] = {}  # by folder
        for run in self.runs:
            entry = history.get((os.path.relpath(run.folder, self.folder), run.id), {})
            recalled = {k: entry[k] for k, type_ in _HISTORY.items() if type(entry.get(k)) is type_}
            jobs[run.folder] = Job(run, jobs.get(run.needs), **recalled)
        return list(jobs.values())


def inspect_folder(
    run: PlannedRun, backbone: str | None = None, *, backbone_known: bool = True
) -> FolderState:
    """Return what a run's folder contains.

    Args:
        backbone: sha256 of the backbone that the run takes; None if its metadata has none.
        backbone_known: False while that backbone is not trained yet.
    """
    folder = run.folder
    results, broken = _read_results(folder / RESULTS_NAME)
    if results is not None and (form := results.get("format", RESULTS_FORMAT)) != RESULTS_FORMAT:
        why = f"{RESULTS_NAME} has format {form!r}, and this version reads {RESULTS_FORMAT}"
        return FolderState("other", why)
    checkpoints = list(folder.glob("checkpoints/iter_*"))
    if results is None and not broken and not checkpoints:
        return FolderState("new")
    try:
        text = (folder / CONFIG_NAME).read_bytes()
    except OSError as error:
        return FolderState("other", f"{CONFIG_NAME} cannot be read ({error.strerror})")
    sha256 = hashlib.sha256(text).hexdigest()
    # A suite can be moved: if a hash identifies the backbone, its path does not matter.
    by_hash = results is not None and (backbone is not None or not backbone_known)
    if why := _config_changes(text, run, by_hash) or _data_changes(run):
        return FolderState("other", why)
    if results is None:
        newest = max((path.name for path in checkpoints), default="the beginning")
        return FolderState("begun", f"resumes from {newest}{broken and f': {broken}'}", sha256)
    if backbone_known and results.get("weights_sha256") != backbone:
        return FolderState("other", "its backbone has been retrained since")
    return FolderState("finished", "", sha256, results)


def backbone_sha256(run: PlannedRun) -> str | None:
    """Return the sha256 in the metadata of the backbone that a run takes; None without one."""
    weights = run.config["model"]["weights"]
    if weights in (None, "pretrained"):
        return None
    path = Path(weights)
    return _read_json((path if path.is_dir() else path.parent) / "model.json").get("sha256")


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; {} if the file is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_results(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return complete results, or those of another format; else None and what is broken."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        is_other = results.get("format", RESULTS_FORMAT) != RESULTS_FORMAT
        if is_other or results["primary_metric"] in results["metrics"]:
            return results, ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"{path.name} cannot be read ({error})"
    except (AttributeError, LookupError, TypeError):
        pass
    return None, f"{path.name} lacks its primary metric"


def _config_changes(text: bytes, run: PlannedRun, weights_may_move: bool) -> str:
    """Return how the config.yaml in a folder differs from a run's config; "" if it does not."""
    try:
        config = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError) as error:
        return f"{CONFIG_NAME} is not YAML ({error})"
    if not isinstance(config, dict):
        return f"{CONFIG_NAME} is not a mapping"
    changes = changed_keys(config, redact(run.config, by_name=False))  # as it is written
    if weights_may_move:
        changes = [change for change in changes if not change.startswith("model.weights: ")]
    more = f" and {len(changes) - _SHOWN_KEYS} more" if len(changes) > _SHOWN_KEYS else ""
    return "; ".join(changes[:_SHOWN_KEYS]) + more


def _data_changes(run: PlannedRun) -> str:
    """Return which splits differ from those that the run in the folder read; "" if none do."""
    if run.fingerprints is None:
        return ""
    then, now = _read_json(run.folder / ENVIRONMENT_NAME).get("data"), run.fingerprints
    if not isinstance(then, dict):
        return f"{ENVIRONMENT_NAME} has no fingerprints of its data"
    splits = sorted({split for split, _ in then.items() ^ now.items()})
    return f"other images or labels in data.{' and data.'.join(splits)}" if splits else ""
