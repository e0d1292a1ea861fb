"""Metrics against the epoch, and the speed-ups computed from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tract_transfer.report.runs import Run, is_finite
from tract_transfer.report.statistics import is_loss, paired_difference, pairs, seed_list

Curve = tuple[Sequence[float], Sequence[float]]  # epochs in ascending order, and the value at each
SHARES = (0.75, 0.9, 1.0)  # of the baseline's lowest final value


@dataclass(frozen=True)
class Evaluations:
    """A task's evaluations during training, on one split: method -> seed -> curve."""

    task: str
    metric: str
    split: str
    curves: dict[str, dict[int, Curve]]


@dataclass(frozen=True)
class SpeedUp:
    """The baseline's epochs over a method's epochs until both reach `target`.

    Epochs are interpolated between evaluations; infinite if the target is never reached, None if
    the first evaluation exceeds it.
    """

    target: float
    baseline: dict[int, float | None]  # seed -> epochs
    treated: dict[int, float | None]
    ratio: float | None  # geometric mean over seeds; None unless every seed has a ratio
    low: float | None  # t interval, from the logarithms; None for one seed or without spread
    high: float | None
    remark: str  # why there is no ratio or no interval


@dataclass(frozen=True)
class SpeedUpRow:
    """The speed-up of a method on a task, to a share of the baseline's lowest final value."""

    task: str
    metric: str
    split: str
    method: str
    share: float
    pairs: int  # seeds for which both methods have a curve, of `seeds` in the report
    seeds: int
    result: SpeedUp


def curve_of(run: Run, key: str, split: str) -> Curve:
    """Return the finite values that a run logged under `key` for a split."""
    points = {
        float(line["epoch"]): float(line[key])
        for line in run.history
        if line.get("split") == split and is_finite(line.get("epoch")) and is_finite(line.get(key))
    }
    epochs = sorted(points)
    return epochs, [points[epoch] for epoch in epochs]


def evaluations_of(runs: Sequence[Run]) -> Evaluations:
    """Return the evaluations of one task's finished runs, on val if they have it, else on test."""
    metric = runs[0].primary_metric
    splits = {line.get("split") for run in runs for line in run.history if metric in line}
    split = "val" if "val" in splits else "test"
    curves: dict[str, dict[int, Curve]] = {}
    for run in runs:
        curve = curve_of(run, metric, split)
        if len(curve[0]) > 1 and run.seed is not None:
            curves.setdefault(run.method, {})[run.seed] = curve
    return Evaluations(runs[0].task, metric, split, curves)


def speed_ups(
    evaluations: Sequence[Evaluations], baseline: str, expected_seeds: int
) -> list[SpeedUpRow]:
    """Return the speed-ups of every method on every task whose metric is not a loss."""
    rows = []
    for task in evaluations:
        if is_loss(task.metric):
            continue
        for method, (treated, untreated) in pairs(task.curves, baseline).items():
            end = min(values[-1] for _, values in untreated.values())  # every seed reaches it
            n = len(untreated)
            rows += [
                SpeedUpRow(
                    task.task, task.metric, task.split, method, share, n, expected_seeds,
                    speed_up(treated, untreated, share * end),
                )
                for share in SHARES
            ]  # fmt: skip
    return rows


def speed_up(treated: Mapping[int, Curve], baseline: Mapping[int, Curve], target: float) -> SpeedUp:
    """Compare the epochs at which two methods, seed -> curve, reach `target` from below."""
    epochs, baseline_epochs = (
        {seed: epochs_to_reach(curves[seed], target) for seed in sorted(curves)}
        for curves in (treated, baseline)
    )
    remark = _unknown("the method", epochs) or _unknown("the baseline", baseline_epochs)
    ratio = low = high = None
    if not remark:
        logs, baseline_logs = (
            {seed: math.log(epoch) for seed, epoch in by_seed.items() if epoch is not None}
            for by_seed in (epochs, baseline_epochs)
        )
        difference = paired_difference(baseline_logs, logs, resample=False)
        ratio = math.exp(difference.mean)
        if difference.n == 1:
            remark = "one seed: no interval"
        elif difference.p_value is None:
            remark = "the same for every seed: no interval"
        elif difference.low is not None and difference.high is not None:
            low, high = math.exp(difference.low), math.exp(difference.high)
    return SpeedUp(target, baseline_epochs, epochs, ratio, low, high, remark)


def epochs_to_reach(curve: Curve, target: float) -> float | None:
    """Return the epoch at which a curve first reaches `target`, interpolated linearly.

    Infinity if it never does; None if its first point already does: the epoch is unknown.
    """
    epochs, values = curve
    i = next((i for i, value in enumerate(values) if value >= target), None)
    if not i:
        return math.inf if i is None else None
    share = (target - values[i - 1]) / (values[i] - values[i - 1])
    return epochs[i - 1] + share * (epochs[i] - epochs[i - 1])


def _unknown(name: str, epochs: Mapping[int, float | None]) -> str:
    """Report the seeds for which the epoch at the target is unknown."""
    never = [seed for seed, epoch in epochs.items() if epoch == math.inf]
    early = [seed for seed, epoch in epochs.items() if epoch is None]
    if never:
        return f"{name} never reached it with {seed_list(never)}"
    return f"{name} exceeded it at the first evaluation with {seed_list(early)}" if early else ""
