"""A suite as a graph of runs: what each is, which backbone it waits for, and which are the same."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

PRETRAIN = "pretrain"
_ID_DIGITS = 12


@dataclass(frozen=True)
class Resources:
    """What a run is given: cores, GPUs (below 1: a share of one) and memory; null where unsaid.

    `hours`, `partition` and `account` are Slurm's.
    """

    cpus: int | None = None
    gpus: float | None = None
    memory_gb: float | None = None
    hours: float | None = None
    partition: str | None = None
    account: str | None = None


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One run of a suite.

    Attributes:
        id: 12 hex digits of the hash of what decides its numbers (see `run_id`).
        task: `pretrain`, or the suite's name of a downstream task.
        config: all keys of its config, resolved.
        folder: its output_dir, `<suite>/<method>/<task>/seed<seed>`.
        needs: the folder of the run whose backbone it takes.
        fingerprints: split -> fingerprint of its data; None where only a run can tell.
        also: further methods whose run this is: what they change does not reach it.
    """

    id: str
    method: str
    task: str
    seed: int
    config: Mapping[str, Any]
    folder: Path
    needs: Path | None = None
    fingerprints: Mapping[str, str] | None = None
    resources: Resources = field(default_factory=Resources)
    also: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Return `seed 0  cifar100  tract`."""
        return f"seed {self.seed}  {self.task}  {self.method}"

    @property
    def processes(self) -> int:
        """How many processes it is started as: one for each of its GPUs."""
        return max(1, int(self.resources.gpus or 1))

    @property
    def threads(self) -> int:
        """How many threads each of its processes is given: its share of `cpus`, or one."""
        return max(1, (self.resources.cpus or 1) // self.processes)


def order_tasks(needs: Mapping[str, str | None]) -> list[str]:
    """Return the tasks in an order in which each comes after the one it needs.

    Args:
        needs: task -> the task it needs, or None; every task is a key.

    Raises:
        ValueError: a task needs one that is not there, or, in the end, itself.
    """
    for task, needed in needs.items():
        if needed is not None and needed not in needs:
            near = get_close_matches(needed, needs, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"tasks.{task}.needs: {needed!r} is no task of {list(needs)}.{hint} "
                "null keeps the weights of the task's own config."
            )
    ordered: dict[str, None] = {}
    for task in needs:
        way = [task]
        while (needed := needs[way[-1]]) is not None and needed not in ordered:
            if needed in way:
                circle = " needs ".join([*way[way.index(needed) :], needed])
                raise ValueError(f"tasks.{task}.needs: goes in a circle: {circle}. Break it.")
            way.append(needed)
        ordered.update(dict.fromkeys(reversed(way)))
    return list(ordered)


def run_id(deciding: Mapping[str, Any]) -> str:
    """Return the name of a run: 12 hex digits of the sha256 of what decides its numbers.

    Args:
        deciding: plain values: its config without labels and places, the fingerprints of its data,
            and what it begins with.
    """
    text = json.dumps(deciding, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_DIGITS]


def join_same(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Let methods share the runs that are the same in both; needs lead to the one that stays.

    Raises:
        ValueError: two tasks of a method, or two methods in every task, are the same.
    """
    kept: dict[str, PlannedRun] = {}
    instead: dict[Path, Path] = {}
    for run in runs:
        first = kept.get(run.id)
        if first is None:
            kept[run.id] = run
        elif first.task != run.task:
            raise ValueError(
                f"tasks {first.task} and {run.task} are the same run (method {run.method}, seed "
                f"{run.seed}): same config, same data. Leave one out."
            )
        else:
            instead[run.folder] = first.folder
            kept[run.id] = replace(first, also=(*first.also, run.method))
    _check_methods_differ(runs)
    return [
        replace(run, needs=instead.get(run.needs, run.needs)) if run.needs else run
        for run in kept.values()
    ]


def _check_methods_differ(runs: Sequence[PlannedRun]) -> None:
    ids: dict[str, set[str]] = {}
    for run in runs:
        ids.setdefault(run.method, set()).add(run.id)
    seen: dict[frozenset[str], str] = {}
    for method, own in ids.items():
        other = seen.setdefault(frozenset(own), method)
        if other != method:
            raise ValueError(
                f"methods.{method}: the same runs as {other}'s in every task, so there is nothing "
                "to compare. Give it an override (methods.<name>.pretrain, .downstream or .tasks), "
                "or leave it out."
            )


def count_states(states: Sequence[str]) -> str:
    """Return `3 finished, 1 running` of the states there are."""
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
