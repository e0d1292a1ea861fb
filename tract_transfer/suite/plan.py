"""Methods x tasks x seeds as a list of runs: each downstream run after the backbone it needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRETRAIN = "pretrain"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a suite.

    Attributes:
        task: `pretrain`, or the suite's name of a downstream task.
        config_file: what it runs.
        overrides: dotted key -> value, over the file's keys.
        folder: its output_dir, `<suite>/<method>/<task>/seed<seed>`.
        needs: the folder of the pre-training whose backbone it takes.
    """

    task: str
    method: str
    seed: int
    config_file: Path
    overrides: Mapping[str, Any]
    folder: Path
    needs: Path | None


def expand(
    output_dir: Path,
    methods: Mapping[str, Mapping[str, Mapping[str, Any]]],
    seeds: Sequence[int],
    pretrain: Path,
    tasks: Mapping[str, Path],
) -> list[PlannedRun]:
    """List the runs of a suite in an order they can be run in: whole seeds, one after another.

    Args:
        methods: name -> {"pretrain": overrides, "downstream": overrides}.
        pretrain: config of the pre-training.
        tasks: name -> config of a downstream task.
    """
    runs = []
    for seed in seeds:
        for task, config_file in {PRETRAIN: pretrain, **tasks}.items():
            for method, overrides in methods.items():
                needs = None if task == PRETRAIN else output_dir / method / PRETRAIN / f"seed{seed}"
                folder = output_dir / method / task / f"seed{seed}"
                own = overrides["pretrain" if needs is None else "downstream"]
                labels = {"name": task, "method": method, "seed": seed, "output_dir": str(folder)}
                weights = {} if needs is None else {"model.weights": str(needs)}
                runs.append(
                    PlannedRun(
                        task, method, seed, config_file, {**own, **labels, **weights}, folder, needs
                    )
                )
    return runs
