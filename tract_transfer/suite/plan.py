"""A run of a suite, and its id."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tract_transfer.config.suite import ResourcesConfig


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
    return hashlib.sha256(text.encode()).hexdigest()[:12]
