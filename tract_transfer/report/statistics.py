"""Spread over seeds, and whether a paired difference is more than that spread.

All are pure functions of numbers, and the same at every call: what draws at random is seeded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Floats = npt.NDArray[np.float64]
LEVEL = 0.95
# The studentised bootstrap covers as it says from 4 pairs on, but is almost twice as wide as the t
# interval then (docs/report.md has the measurements).
MIN_PAIRS_BOOTSTRAP = 5
MIN_PAIRS_FLIPPED = 6  # two of the 2^5 flips of 5 signs are 6 %: no p-value below 5 % to be had
_RESAMPLES = 4999
_MAX_EXACT_PAIRS = 14
# 0.3 - 0.1 and 0.2 differ by rounding: such a spread is none, and its p-value would be absurd.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1; None for one value) of `n` values."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of treated - baseline over `n` seeds, and what it is worth.

    Attributes:
        low, high: the t interval of the mean at confidence `level`; None for one seed, and equal to
            the mean when every seed shows the same difference.
        p_value: of the two-sided paired t-test of no difference; None in both of those cases.
        std: of the differences; None for one seed.
        effect_size: mean / std, corrected for small n; None below 3 pairs or without spread.
        bootstrap: the studentised bootstrap interval; None below `MIN_PAIRS_BOOTSTRAP` pairs,
            without spread, or where equal differences leave it without an end.
        permutation_p: two-sided, of the mean under flipped signs; None below
            `MIN_PAIRS_FLIPPED` pairs or without spread.
        remark: what `n` is too small to say, in words; empty where nothing is.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    n: int
    level: float = LEVEL
    std: float | None = None
    effect_size: float | None = None
    bootstrap: tuple[float, float] | None = None
    permutation_p: float | None = None
    remark: str = ""

    @property
    def excludes_zero(self) -> bool:
        """Whether the t interval does: exactly where the paired t-test rejects at 1 - level."""
        return self.p_value is not None and self.p_value < 1 - self.level


def summarize(values: Sequence[float]) -> Summary:
    """Return mean and spread of `values`.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    _check_finite("values", values)
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), std, len(values))


def paired_difference(
    treated: Mapping[int, float],
    baseline: Mapping[int, float],
    level: float = LEVEL,
    *,
    resample: bool = True,
) -> PairedDifference:
    """Compare two methods seed by seed.

    Args:
        treated: seed -> metric.
        baseline: seed -> metric, of the same seeds.
        level: confidence of the intervals, in (0, 1).
        resample: whether to add the bootstrap and the permutation test, the slow part.

    Raises:
        ValueError: the seeds differ, there is none, a metric is not finite, or a wrong level.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}.")
    differences, largest = _paired(treated, baseline)
    n, mean = len(differences), float(differences.mean())
    if abs(mean) <= _ROUNDING * largest:
        mean = 0.0  # differences that cancel: what rounding leaves of them has no sign
    if n == 1:
        remark = "One pair: no interval and no test; even its sign may be chance."
        return PairedDifference(mean, None, None, None, n, level, remark=remark)
    std = float(differences.std(ddof=1))
    if std <= _ROUNDING * math.sqrt(n) * largest:
        remark = (
            f"All {n} pairs show the same difference: without spread there is no interval and no "
            "test. Few test images do that, and not certainty."
        )
        return PairedDifference(mean, mean, mean, None, n, level, std=0.0, remark=remark)
    error = std / math.sqrt(n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    draws, flips = (resample and n >= least for least in (MIN_PAIRS_BOOTSTRAP, MIN_PAIRS_FLIPPED))
    return PairedDifference(
        mean,
        mean - half,
        mean + half,
        float(2 * stats.t.sf(abs(mean) / error, n - 1)),
        n,
        level,
        std=std,
        effect_size=effect_size(differences) if n > 2 else None,
        bootstrap=studentised_bootstrap(differences, level) if draws else None,
        permutation_p=sign_flip_test(differences) if flips else None,
        remark=_few_pairs(n),
    )


def _paired(treated: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[Floats, float]:
    """Return treated - baseline (n,) by rising seed, and the largest size of a value of either."""
    if treated.keys() != baseline.keys():
        raise ValueError(
            "Both methods must have the same seeds to be paired: only treated has "
            f"{sorted(treated.keys() - baseline.keys())}, only baseline has "
            f"{sorted(baseline.keys() - treated.keys())}. Run the missing ones."
        )
    seeds = sorted(treated)
    a, b = ([values[seed] for seed in seeds] for values in (treated, baseline))
    _check_finite("treated", a)
    _check_finite("baseline", b)
    return np.subtract(a, b), float(np.abs([a, b]).max())


def effect_size(differences: Floats) -> float:
    """Return Cohen's d_z, the mean over the standard deviation, without its small-sample bias.

    The factor is Hedges's (1981), exact for normal differences: gamma(m / 2) / (sqrt(m / 2)
    gamma((m - 1) / 2)) with m = n - 1, so that n is 3 at least.
    """
    m = len(differences) - 1
    log_factor = special.gammaln(m / 2) - special.gammaln((m - 1) / 2) - math.log(m / 2) / 2
    return float(differences.mean() / differences.std(ddof=1) * math.exp(log_factor))


def studentised_bootstrap(
    differences: Floats, level: float = LEVEL, resamples: int = _RESAMPLES
) -> tuple[float, float] | None:
    """Return the bootstrap-t interval of the mean of (n,) differences (Efron, 1981).

    Each of B `resamples` has its own standard error; where it has none, its t is infinite.

    Returns:
        The interval, or None where so many resamples have no spread that it has no end.
    """
    n = len(differences)
    drawn = differences[np.random.default_rng(0).integers(0, n, (resamples, n))]  # (B, n)
    shifts, errors = drawn.mean(axis=1) - differences.mean(), drawn.std(axis=1, ddof=1)
    flat = errors <= _ROUNDING * np.abs(differences).max()
    t = np.where(shifts == 0, 0, np.copysign(math.inf, shifts))
    np.divide(shifts, errors / math.sqrt(n), out=t, where=~flat)
    upper = float(np.quantile(t, (1 + level) / 2, method="higher"))
    lower = float(np.quantile(t, (1 - level) / 2, method="lower"))
    if not (math.isfinite(upper) and math.isfinite(lower)):
        return None
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    mean = float(differences.mean())
    return mean - upper * error, mean - lower * error


def sign_flip_test(differences: Floats, resamples: int = 2**_MAX_EXACT_PAIRS) -> float:
    """Return the two-sided p-value of the mean of (n,) differences under random signs.

    Exact up to 14 differences; beyond, among `resamples` flips and the signs as they are.
    """
    n = len(differences)
    if n <= _MAX_EXACT_PAIRS:
        signs = 1.0 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        drawn = np.random.default_rng(0).choice((-1.0, 1.0), (resamples, n))
        signs = np.concatenate([np.ones((1, n)), drawn])
    sums = np.abs(signs @ differences)
    tolerance = _ROUNDING * np.abs(differences).sum()
    return float(np.mean(sums >= sums[0] - tolerance))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in their order (Holm, 1979).

    To call significant what is below alpha after it is wrong about any of them with a chance of at
    most alpha, however they depend on each other.
    """
    order = np.argsort(p_values, kind="stable")
    corrected = [0.0] * len(order)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _few_pairs(n: int) -> str:
    if n == 2:
        return (
            "Two pairs: the interval is 12.7 standard errors to either side, and only a difference "
            "far beyond its spread could be told from chance."
        )
    if n < MIN_PAIRS_FLIPPED:
        return (
            f"{n} pairs: interval and test assume that differences are distributed normally, which "
            f"{n} pairs cannot show. A sign-flip test could not get below p = {2 / 2**n:.2g}."
        )
    return ""


def _check_finite(what: str, values: Sequence[float]) -> None:
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"{what} must hold at least one number, all finite; got {list(values)}.")


# --- Numbers and names in words, the same in every format of the report.

_METRICS = {
    "top1": "top-1 accuracy", "top5": "top-5 accuracy", "mean_per_class": "mean per-class accuracy",
    "ap": "AP 50:95", "ap50": "AP 50", "ap75": "AP 75",
    "knn20_top1": "k-NN (20) top-1", "logistic_top1": "logistic top-1",
    "linear_top1": "linear top-1", "svm_top1": "SVM top-1",
}  # fmt: skip


def metric_name(metric: str) -> str:
    """Return a metric's name in words; an unknown one is its own name."""
    return _METRICS.get(metric, metric)


def is_loss(metric: str) -> bool:
    """Whether less of a metric is better; it is then no fraction."""
    return "loss" in metric


def score(value: float, metric: str) -> str:
    """Return a fraction in percent, a loss as it is."""
    return f"{value:.4f}" if is_loss(metric) else f"{100 * value:.2f}"


def spread(summary: Summary | None, metric: str) -> str:
    """Return mean ± standard deviation; one value has no deviation, none is a dash."""
    if summary is None:
        return "–"
    deviation = "" if summary.std is None else f" ± {score(summary.std, metric)}"
    return score(summary.mean, metric) + deviation


def count_seeds(summary: Summary | None, seeds: int) -> str:
    """Return how many of `seeds` are behind a mean; nothing where it is all of them, or none."""
    if summary is None or summary.n >= seeds:
        return ""
    return f"{summary.n} of {seeds}"


def gap(value: float, metric: str) -> str:
    """Return a difference with its sign, in percentage points unless it is of losses."""
    text = score(abs(value), metric)
    return f"{'+' if value > 0 else '−'}{text}" if float(text) else text


def interval(difference: PairedDifference, metric: str) -> str:
    """Return the t interval of a difference, or why there is none."""
    if difference.low is None or difference.high is None:
        return "[one pair, no interval]"
    if difference.p_value is None:
        return "[the same for every seed]"
    return bounds((difference.low, difference.high), metric)


def bounds(both: tuple[float, float] | None, metric: str) -> str:
    """Return an interval of differences; a dash for none."""
    return f"[{gap(both[0], metric)}, {gap(both[1], metric)}]" if both else "–"


def count_pairs(difference: PairedDifference, seeds: int) -> str:
    """Return the number of pairs, and of how many there should be where some are missing."""
    if difference.n < seeds:
        return f"{difference.n} of {seeds} pairs"
    return f"{difference.n} pair{'s' * (difference.n > 1)}"


def p_value(value: float | None) -> str:
    """Return a p-value with two digits, `< 0.001`, or a dash."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def effect(value: float | None) -> str:
    """Return an effect size with its sign, or a dash."""
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def factor(value: float | None) -> str:
    """Return `× 1.25`, or a dash."""
    return "–" if value is None else f"× {value:.2f}"


def number(value: float | None, digits: int = 1) -> str:
    """Return a number with thousands apart, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def listed(by: Mapping[str, object]) -> str:
    """Return `a 1, b 2` of a mapping."""
    return ", ".join(f"{key} {value}" for key, value in by.items())
