"""Values against the epoch: what evaluations measured on the way, and the speed-ups in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tract_transfer.report.compare import Row
from tract_transfer.report.runs import Run, is_finite
from tract_transfer.report.statistics import is_loss, paired_difference

# --- How many epochs a method saves: those the baseline needs to reach a value, over its own.

Curve = tuple[Sequence[float], Sequence[float]]  # epochs, rising, and the value at each


@dataclass(frozen=True)
class SpeedUp:
    """Epochs of the baseline over epochs of a method until both reach `target`, over seeds.

    Attributes:
        baseline, treated: seed -> epochs, interpolated between evaluations; infinite where the
            value is never reached, None where the first evaluation is past it already.
        ratio: the geometric mean over seeds; None unless every seed has its own ratio.
        low, high: its t interval, of the logarithms; None for one seed or without spread.
        remark: why there is no ratio or no interval, in words.
    """

    target: float
    baseline: dict[int, float | None]
    treated: dict[int, float | None]
    ratio: float | None
    low: float | None
    high: float | None
    remark: str


def epochs_to_reach(curve: Curve, target: float) -> float | None:
    """Return the epoch at which a curve first reaches `target`, by lines between its points.

    Returns:
        Infinity where it never does, None where its first point does: it is not known since when.
    """
    epochs, values = (np.asarray(part, np.float64) for part in curve)
    there = np.flatnonzero(values >= target)
    if not there.size:
        return math.inf
    i = there[0]
    if i == 0:
        return None
    share = (target - values[i - 1]) / (values[i] - values[i - 1])
    return float(epochs[i - 1] + share * (epochs[i] - epochs[i - 1]))


def end_of_slowest(baseline: Mapping[int, Curve]) -> float:
    """Return the lowest value that a seed of the baseline ends at: all of them reach it."""
    return min(values[-1] for _, values in baseline.values())


def speed_up(treated: Mapping[int, Curve], baseline: Mapping[int, Curve], target: float) -> SpeedUp:
    """Compare when two methods reach `target`, a value of which more is better.

    Args:
        treated: seed -> curve, of the seeds of `baseline`.

    Raises:
        ValueError: the seeds differ, or there is none.
    """
    if treated.keys() != baseline.keys() or not treated:
        raise ValueError(
            "Both methods must have the same seeds, and one at least: treated has "
            f"{sorted(treated)}, baseline has {sorted(baseline)}."
        )
    seeds = sorted(treated)
    ours = {seed: epochs_to_reach(treated[seed], target) for seed in seeds}
    theirs = {seed: epochs_to_reach(baseline[seed], target) for seed in seeds}
    remark = _unknown("the method", ours) or _unknown("the baseline", theirs)
    if remark:
        return SpeedUp(target, theirs, ours, None, None, None, remark)
    found = paired_difference(_logs(theirs), _logs(ours), resample=False)
    low, high = found.low, found.high
    if found.p_value is None or low is None or high is None:
        only = "one seed" if found.n == 1 else "every seed shows the same"
        return SpeedUp(
            target, theirs, ours, math.exp(found.mean), None, None, f"{only}: no interval"
        )
    return SpeedUp(target, theirs, ours, math.exp(found.mean), math.exp(low), math.exp(high), "")


def _unknown(who: str, epochs: Mapping[int, float | None]) -> str:
    never = [str(seed) for seed, epoch in epochs.items() if epoch is not None and math.isinf(epoch)]
    early = [str(seed) for seed, epoch in epochs.items() if epoch is None]
    if never:
        return f"{who} never reached it with {_seeds(never)}"
    if early:
        return f"{who} was past it at the first evaluation of {_seeds(early)}"
    return ""


def _seeds(seeds: Sequence[str]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def _logs(epochs: Mapping[int, float | None]) -> dict[int, float]:
    return {seed: math.log(epoch) for seed, epoch in epochs.items() if epoch is not None}


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
