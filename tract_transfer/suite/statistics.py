"""Spread over seeds, and whether a paired difference is more than that spread."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1; None for one value) of `n` values."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of treated - baseline over `n` seeds, with its t interval and paired t-test.

    `low`, `high` bound the mean at confidence `level`; both are None for one seed and equal to the
    mean when every seed shows the same difference. `p_value` (two-sided, of no difference) is
    None in both cases: the test does not exist without spread.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    n: int
    level: float


def summarize(values: Sequence[float]) -> Summary:
    """Return mean and spread of `values`.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    _check_finite("values", values)
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), std, len(values))


def paired_difference(
    treated: Mapping[int, float], baseline: Mapping[int, float], level: float = 0.95
) -> PairedDifference:
    """Compare two methods seed by seed.

    Args:
        treated: seed -> metric.
        baseline: seed -> metric, of the same seeds.
        level: confidence of the interval, in (0, 1).

    Raises:
        ValueError: the seeds differ, there is none, a metric is not finite, or a wrong level.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}.")
    if treated.keys() != baseline.keys():
        raise ValueError(
            "Both methods must have the same seeds to be paired: only treated has "
            f"{sorted(treated.keys() - baseline.keys())}, only baseline has "
            f"{sorted(baseline.keys() - treated.keys())}. Run the missing ones."
        )
    seeds = sorted(treated)
    a = [treated[seed] for seed in seeds]
    b = [baseline[seed] for seed in seeds]
    _check_finite("treated", a)
    _check_finite("baseline", b)
    differences = np.subtract(a, b)
    n, mean = len(seeds), float(differences.mean())
    if n == 1:
        return PairedDifference(mean, None, None, None, n, level)
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    # 0.3 - 0.1 and 0.2 differ by rounding: such a spread is none, and its p-value would be absurd.
    if error <= 1e-12 * max(np.abs(a).max(), np.abs(b).max()):
        return PairedDifference(mean, mean, mean, None, n, level)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return PairedDifference(mean, mean - half, mean + half, p_value, n, level)


def _check_finite(what: str, values: Sequence[float]) -> None:
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"{what} must hold at least one number, all finite; got {list(values)}.")
