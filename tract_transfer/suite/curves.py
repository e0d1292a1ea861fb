"""Values against the epoch: what evaluations measured on the way, and the speed-ups in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tract_transfer.suite.compare import Row
from tract_transfer.suite.runs import Run, is_finite
from tract_transfer.suite.speed_up import Curve, SpeedUp, end_of_slowest, speed_up
from tract_transfer.suite.wording import is_loss

SHARES = (0.75, 0.9, 1.0)  # of what the slowest seed of the baseline ends at


@dataclass(frozen=True)
class Evaluations:
    """What the runs of a task measured on the way, on one split: method -> seed -> curve."""

    task: str
    metric: str
    split: str
    curves: dict[str, dict[int, Curve]]


@dataclass(frozen=True)
class SpeedUpRow:
    """The speed-up of a method on a task to a share of what the baseline ends at.

    Attributes:
        pairs: seeds that both have curves of; `seeds`: those that there should be.
    """

    task: str
    metric: str
    split: str
    method: str
    share: float
    pairs: int
    seeds: int
    result: SpeedUp


def curve_of(run: Run, key: str, split: str) -> Curve:
    """Return the epochs and finite values of a key that a run logged for a split, rising."""
    points = {
        float(line["epoch"]): float(line[key])
        for line in run.history
        if line.get("split") == split and is_finite(line.get("epoch")) and is_finite(line.get(key))
    }
    epochs = sorted(points)
    return epochs, [points[epoch] for epoch in epochs]


def evaluations_of(runs: Sequence[Run]) -> Evaluations:
    """Return what the finished runs of one task measured on the way, on val where there is one."""
    metric = runs[0].primary_metric
    lines = [line for run in runs for line in run.history if metric in line]
    split = "val" if any(line.get("split") == "val" for line in lines) else "test"
    curves: dict[str, dict[int, Curve]] = {}
    for run in runs:
        curve = curve_of(run, metric, split)
        if len(curve[0]) > 1 and run.seed is not None:
            curves.setdefault(run.method, {})[run.seed] = curve
    return Evaluations(runs[0].task, metric, split, curves)


def speed_ups(
    evaluations: Sequence[Evaluations], rows: Sequence[Row], baseline: str
) -> list[SpeedUpRow]:
    """Return the speed-ups of all methods on all tasks judged by more being better."""
    seeds = {row.task: len(row.seeds) for row in rows}
    found = []
    for own in evaluations:
        base: Mapping[int, Curve] = own.curves.get(baseline, {})
        for method, treated in own.curves.items():
            shared = sorted(base.keys() & treated.keys())
            if method == baseline or not shared or is_loss(own.metric):
                continue
            ours = {seed: treated[seed] for seed in shared}
            theirs = {seed: base[seed] for seed in shared}
            end = end_of_slowest(theirs)
            found += [
                SpeedUpRow(
                    own.task, own.metric, own.split, method, share, len(shared),
                    seeds.get(own.task, len(shared)), speed_up(ours, theirs, share * end),
                )
                for share in SHARES
            ]  # fmt: skip
    return found
