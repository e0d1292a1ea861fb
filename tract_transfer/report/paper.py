"""Rows of the paper's tables beside the runs that repeat them, with what differs in the setup.

The numbers are those of Petersen, Borgelt and Ermon, "TrAct: Making First-layer Pre-Activations
Trainable", NeurIPS 2024 (arXiv 2410.23970), tables 1 to 7, in percent; paper.csv has them. A run
says by its config's `paper` which row it stands beside.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tract_transfer.report.runs import Run
from tract_transfer.report.statistics import Summary, summarize

_IMAGENET = {"data.train.path": "ILSVRC/imagenet-1k"}
_FINE_TUNED = {**_IMAGENET, "solver.max_epochs": 50, "data.batch_size": 2048}
# row -> its title, and what the paper says of its setup as keys of the config.
SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "t1": (
        "table 1, CIFAR-100",
        {
            "data.train.path": "uoft-cs/cifar100",
            "data.batch_size": 128,
            "solver.optimizer": "sgd",
            "solver.lr": 0.1,
            "solver.momentum": 0.9,
            "solver.weight_decay": 5e-4,
            "solver.warmup_epochs": 1,
            "solver.step_factor": 0.2,
            "tract.lam": 0.1,
        },
    ),
    "t2": (
        "table 2, ImageNet",
        {
            **_IMAGENET,
            "data.batch_size": 256,
            "solver.optimizer": "sgd",
            "solver.momentum": 0.9,
            "solver.weight_decay": 1e-4,
            "tract.lam": 0.1,
        },
    ),
    "t3_small_400": ("table 3, ViT-S of 400 epochs", {**_FINE_TUNED, "tract.lam": 0.1}),
    "t3_small_800": ("table 3, ViT-S of 800 epochs", {**_FINE_TUNED, "tract.lam": 0.2}),
    "t3_base_400": ("table 3, ViT-B of 400 epochs", {**_FINE_TUNED, "tract.lam": 0.1}),
    "t4_cifar10": ("table 4, CIFAR-10", {"data.train.path": "uoft-cs/cifar10"}),
    "t4_cifar100": ("table 4, CIFAR-100", {"data.train.path": "uoft-cs/cifar100"}),
    "t4_flowers102": (
        "table 4, Flowers-102",
        {"data.train.path": "dpdl-benchmark/oxford_flowers102"},
    ),
    "t4_stanford_cars": ("table 4, Stanford Cars", {"data.train.path": "tanganke/stanford_cars"}),
    "t5": (
        "table 5, Faster R-CNN on VOC 2007",
        {
            "data.train.source": "voc",
            "data.train.sets": ["2007/trainval"],
            "data.test.sets": ["2007/test"],
            "model.freeze_at": 0,
            "model.detector.name": "torchvision_c5",
            "evaluation.protocol": "voc2007_devkit",
        },
    ),
}
_FOUND_BY_BACKBONE = ("t1", "t2")


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper beside a task of ours.

    Attributes:
        title: which row, in words.
        metric: a key of our metrics.
        paper: "vanilla", "tract" -> mean and standard deviation over its seeds, in percent; None
            where the paper has no such number.
        ours: method -> the summary over its seeds, a fraction.
        sides: method -> "vanilla" or "tract", by whether TrAct trained its first layer in this run.
        differing: what differs in the setup, each in words.
    """

    task: str
    title: str
    metric: str
    paper: dict[str, tuple[float | None, float | None]]
    ours: dict[str, Summary]
    sides: dict[str, str]
    differing: list[str]


def beside_the_paper(tasks: Mapping[str, Sequence[Run]]) -> tuple[list[PaperRow], list[str]]:
    """Return the rows of the paper that tasks stand beside, and those asked for and not found.

    Args:
        tasks: task -> its finished runs; those whose config has no `paper` have no row.
    """
    rows, problems = [], []
    for task, runs in tasks.items():
        groups: dict[tuple[str, str, Any], list[Run]] = {}
        for run in runs:
            if isinstance(name := run.config.get("paper"), str):
                solver = run.config.get("solver")
                epochs = solver.get("max_epochs") if isinstance(solver, dict) else None
                groups.setdefault((name, run.backbone, epochs), []).append(run)
        for (name, backbone, epochs), own in groups.items():
            numbers = _numbers(name, backbone, epochs)
            if not numbers:
                problems.append(
                    f"{task}: the paper's tables have no row {name} for {backbone} and {epochs} "
                    "epochs, which its config's `paper` asks for"
                )
            measured = {metric for run in own for metric in run.metrics}
            rows += [_row(task, name, own, n) for n in numbers if n["metric"] in measured]
    return rows, problems


@cache
def read_table() -> list[dict[str, str]]:
    """Return the rows of paper.csv."""
    with (Path(__file__).parent / "paper.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _numbers(name: str, backbone: str, epochs: Any) -> list[dict[str, str]]:
    """Return the paper's rows of a name, one a metric; of some by backbone and epochs."""
    rows = [row for row in read_table() if row["row"] == name]
    if name in _FOUND_BY_BACKBONE:
        rows = [
            row for row in rows if row["backbone"] == backbone and float(row["epochs"]) == epochs
        ]
    return rows


def _row(task: str, name: str, runs: Sequence[Run], found: Mapping[str, str]) -> PaperRow:
    title, setup = SETUPS[name]
    values: dict[str, list[float]] = {}
    sides = {}
    for run in runs:
        sides[run.method] = "tract" if _at(run.config, "tract.enabled") is True else "vanilla"
        if found["metric"] in run.metrics:
            values.setdefault(run.method, []).append(run.metrics[found["metric"]])
    expected = {"model.backbone.name": found["backbone"], **setup}
    if found["epochs"]:
        expected["solver.max_epochs"] = float(found["epochs"])
    differing = [text for key, value in expected.items() if (text := _differs(key, value, runs))]
    counts = {method: len(own) for method, own in values.items()}
    if found["seeds"] and set(counts.values()) != {int(found["seeds"])}:
        ours = ", ".join(f"{count} of {method}" for method, count in counts.items())
        differing.append(f"seeds: {ours} here, {found['seeds']} in the paper")
    differing += dict.fromkeys(
        str(run.results["protocol"]["official splits"])
        for run in runs
        if "official splits" in run.results["protocol"]
    )
    if name in _FOUND_BY_BACKBONE:
        title += f", {found['backbone']}, {found['epochs']} epochs"
    return PaperRow(
        task=task,
        title=title,
        metric=found["metric"],
        paper={side: _mean_and_std(found, side) for side in ("vanilla", "tract")},
        ours={method: summarize(own) for method, own in values.items()},
        sides=sides,
        differing=differing,
    )


def _mean_and_std(found: Mapping[str, str], side: str) -> tuple[float | None, float | None]:
    mean, std = found[side], found[f"{side}_std"]
    return float(mean) if mean else None, float(std) if std else None


def _differs(key: str, expected: Any, runs: Sequence[Run]) -> str:
    """Say that runs have another value at a dotted key than the paper; empty where none has."""
    if key.startswith("tract."):  # what it says of TrAct is of the runs with TrAct
        runs = [run for run in runs if _at(run.config, "tract.enabled") is True]
    if key == "model.backbone.name":
        values = [run.backbone for run in runs]
    else:
        values = [_at(run.config, key) for run in runs]
    others = dict.fromkeys(str(value) for value in values if value != expected)
    return f"{key}: {' and '.join(others)} here, {expected} in the paper" if others else ""


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
