"""The runs of a suite as a graph: what each run is, and which run's backbone it takes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tract_transfer.config.suite import ResourcesConfig

_ID_DIGITS = 12


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One run of a suite.

    Attributes:
        id: 12 hex digits of the hash of everything that decides its numbers (see `run_id`).
        task: `pretrain`, or the suite's name of a downstream task.
        config: the complete config, all keys resolved.
        folder: its output_dir, `<suite>/<method>/<task>/seed<seed>`.
        needs: the folder of the run whose backbone it takes.
        fingerprints: split -> fingerprint of its data; None if only the run can compute them.
        also: further methods that share this run, because what they change does not affect it.
    """

    id: str
    method: str
    task: str
    seed: int
    config: Mapping[str, Any]
    folder: Path
    needs: Path | None = None
    fingerprints: Mapping[str, str] | None = None
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    also: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """`seed 0  cifar100  tract`."""
        return f"seed {self.seed}  {self.task}  {self.method}"

    @property
    def processes(self) -> int:
        """Number of processes: one for each whole GPU."""
        return max(1, int(self.resources.gpus or 1))

    @property
    def threads(self) -> int:
        """Threads of each process: its share of `cpus`, at least one."""
        return max(1, (self.resources.cpus or 1) // self.processes)


def run_id(deciding: Mapping[str, Any]) -> str:
    """Return the first 12 hex digits of the sha256 of what decides a run's numbers.

    Args:
        deciding: plain values: the config without labels and paths, the fingerprints of the data,
            and the backbone it starts from.
    """
    text = json.dumps(deciding, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_DIGITS]


def order_tasks(needs: Mapping[str, str | None]) -> list[str]:
    """Return the tasks so that each comes after the one it needs.

    Args:
        needs: task -> the task it needs, or None; every task is a key.

    Raises:
        ValueError: a task needs an unknown task or, directly or indirectly, itself.
    """
    for task, needed in needs.items():
        if needed is not None and needed not in needs:
            close = get_close_matches(needed, needs, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"tasks.{task}.needs: {needed!r} is not one of the tasks {list(needs)}.{hint} "
                "null keeps the weights of the task's own config."
            )
    ordered: dict[str, None] = {}
    for task in needs:
        chain = [task]
        while (needed := needs[chain[-1]]) is not None and needed not in ordered:
            if needed in chain:
                circle = " needs ".join([*chain[chain.index(needed) :], needed])
                raise ValueError(f"tasks.{task}.needs: circular: {circle}. Break the circle.")
            chain.append(needed)
        ordered.update(dict.fromkeys(reversed(chain)))
    return list(ordered)
