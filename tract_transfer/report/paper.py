"""Compares runs with the paper's tables, and lists the differences in setup.

The paper is Petersen, Borgelt and Ermon, "TrAct: Making First-layer Pre-Activations Trainable",
NeurIPS 2024 (arXiv 2410.23970). A run's config names its row under `paper`; paper.yaml has the
rows' setups, paper.csv the numbers of tables 1 to 7, in percent.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tract_transfer.report.runs import Run, look_up
from tract_transfer.report.statistics import Summary, summarize

_CSV, _YAML = (Path(__file__).parent / f"paper.{suffix}" for suffix in ("csv", "yaml"))
_ROWS_BY_BACKBONE = ("t1", "t2")  # these tables have a row for each backbone and number of epochs


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper and a task's runs."""

    task: str
    title: str
    metric: str
    # "vanilla", "tract" -> mean and standard deviation, in percent; None if not in the paper
    paper: dict[str, tuple[float | None, float | None]]
    ours: dict[str, Summary]  # method -> summary, a fraction
    sides: dict[str, str]  # method -> "tract" if TrAct trained its first layer, else "vanilla"
    differing: list[str]  # differences in setup


def compare_with_paper(tasks: Mapping[str, Sequence[Run]]) -> tuple[list[PaperRow], list[str]]:
    """Return the paper's rows for task -> finished runs, and the rows that it does not have.

    Runs without `paper` in their config have no row.
    """
    rows, problems = [], []
    for task, runs in tasks.items():
        groups: dict[tuple[str, str, Any], list[Run]] = {}
        for run in runs:
            if isinstance(name := run.config.get("paper"), str):
                key = (name, run.backbone, look_up(run.config, "solver.max_epochs"))
                groups.setdefault(key, []).append(run)
        for (name, backbone, epochs), group in groups.items():
            numbers = [row for row in read_table() if row["row"] == name]
            if name in _ROWS_BY_BACKBONE:
                setup = (backbone, epochs)
                numbers = [r for r in numbers if (r["backbone"], float(r["epochs"])) == setup]
            if not numbers:
                problems.append(
                    f"{task}: the config sets `paper: {name}`, but the paper's tables have no such "
                    f"row for {backbone} and {epochs} epochs"
                )
            measured = {metric for run in group for metric in run.metrics}
            rows += [_row(task, name, group, row) for row in numbers if row["metric"] in measured]
    return rows, problems


@cache
def read_table() -> list[dict[str, str]]:
    """Return the rows of paper.csv."""
    return list(csv.DictReader(_CSV.read_text(encoding="utf-8").splitlines()))


@cache
def read_setups() -> dict[str, dict[str, Any]]:
    """Return the contents of paper.yaml: row -> `title`, `setup`."""
    return dict(yaml.safe_load(_YAML.read_text(encoding="utf-8")))


def _row(task: str, name: str, runs: Sequence[Run], numbers: Mapping[str, str]) -> PaperRow:
    """Return one row of paper.csv, `numbers`, beside the runs of a task that name it."""
    title, setup = read_setups()[name]["title"], read_setups()[name]["setup"]
    metric, backbone, epochs = numbers["metric"], numbers["backbone"], numbers["epochs"]
    if name in _ROWS_BY_BACKBONE:
        title += f", {backbone}, {epochs} epochs"
    values: dict[str, list[float]] = {}
    for run in (run for run in runs if metric in run.metrics):
        values.setdefault(run.method, []).append(run.metrics[metric])
    expected = {"model.backbone.name": backbone, **setup}
    expected |= {"solver.max_epochs": float(epochs)} if epochs else {}
    differing = [text for key, value in expected.items() if (text := _differs(key, value, runs))]
    seeds = numbers["seeds"]
    if seeds and any(len(of_method) != int(seeds) for of_method in values.values()):
        ours = ", ".join(f"{len(of_method)} of {method}" for method, of_method in values.items())
        differing.append(f"seeds: {ours} here, {seeds} in the paper")
    official = [run.results["protocol"].get("official splits") for run in runs]
    differing += dict.fromkeys(str(text) for text in official if text is not None)
    paper = {
        side: (_number(numbers[side]), _number(numbers[f"{side}_std"]))
        for side in ("vanilla", "tract")
    }
    summaries = {method: summarize(of_method) for method, of_method in values.items()}
    sides = {run.method: "tract" if run.has_tract else "vanilla" for run in runs}
    return PaperRow(task, title, metric, paper, summaries, sides, differing)


def _differs(key: str, expected: Any, runs: Sequence[Run]) -> str:
    """Report the values of a dotted config key that differ from the paper's."""
    if key == "model.backbone.name":
        values = [run.backbone or "unknown" for run in runs]
    else:  # TrAct's options matter only in runs with TrAct
        relevant = [run for run in runs if run.has_tract or not key.startswith("tract.")]
        values = [look_up(run.config, key) for run in relevant]
    others = dict.fromkeys(str(value) for value in values if value != expected)
    return f"{key}: {' and '.join(others)} here, {expected} in the paper" if others else ""


def _number(text: str) -> float | None:
    return float(text) if text else None
