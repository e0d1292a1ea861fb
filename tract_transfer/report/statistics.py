"""Spread over seeds, paired differences, and how every report format writes them as text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Floats = npt.NDArray[np.float64]
Value = TypeVar("Value")
LEVEL = 0.95
# From 4 pairs on, the studentised bootstrap has the coverage it claims, but with 4 it is almost
# twice as wide as the t interval (docs/guides/report.md has the measurements).
_MIN_BOOTSTRAP = 5
_MIN_FLIPPED = 6  # with 5 pairs, the smallest possible p-value is 2 / 2^5 = 6 %
# 0.3 - 0.1 differs from 0.2 by rounding: a spread this small is no spread.
_ROUNDING = 1e-12
_REMARKS = {  # what so few pairs cannot show
    1: "One pair: no interval and no test; even the sign may be chance.",
    2: "Two pairs: the interval extends 12.7 standard errors to either side, so only a difference "
    "far larger than its spread can be significant.",
} | {
    n: f"{n} pairs: interval and test assume normally distributed differences, which {n} pairs "
    f"cannot verify. A sign-flip test cannot get below p = {2 / 2**n:.2g}."
    for n in range(3, _MIN_FLIPPED)
}


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1; None for one value) of `n` values."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of treated - baseline over `n` seeds, with its uncertainty.

    There is no test without spread, that is for one seed or if all differences are equal.
    """

    mean: float
    low: float | None  # t interval; None for one seed, the mean if all differences are equal
    high: float | None
    p_value: float | None  # two-sided paired t-test; None without spread
    n: int
    level: float = LEVEL
    std: float | None = None  # of the differences; None for one seed
    effect_size: float | None = None  # Hedges's g; None below 3 pairs or without spread
    # None below `_MIN_BOOTSTRAP` pairs, without spread, or if equal differences unbound it
    bootstrap: tuple[float, float] | None = None
    permutation_p: float | None = None  # None below `_MIN_FLIPPED` pairs or without spread
    remark: str = ""  # what `n` is too small to show

    @property
    def excludes_zero(self) -> bool:
        """Whether the t interval excludes zero: exactly if the t-test rejects at 1 - level."""
        return self.p_value is not None and self.p_value < 1 - self.level


def summarize(values: Sequence[float]) -> Summary:
    """Return mean and standard deviation of one or more values."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), std, len(values))


def paired_difference(
    treated: Mapping[int, float], baseline: Mapping[int, float], *, resample: bool = True
) -> PairedDifference:
    """Compare two methods, seed -> metric, over one or more seeds that must be the same.

    `resample` adds the bootstrap and the sign-flip test, the slow part.
    """
    assert treated.keys() == baseline.keys(), (treated, baseline)
    a, b = (np.array([values[s] for s in sorted(baseline)]) for values in (treated, baseline))
    differences, n, rounding = a - b, len(a), _ROUNDING * float(np.abs([a, b]).max())
    mean = float(differences.mean())
    if abs(mean) <= rounding:
        mean = 0.0  # the differences cancel: the sign of the rounding error means nothing
    if n == 1:
        return PairedDifference(mean, None, None, None, n, remark=_REMARKS[1])
    std = float(differences.std(ddof=1))
    if std <= rounding * math.sqrt(n):
        remark = (
            f"All {n} pairs show the same difference: without spread there is no interval and no "
            "test. This points to a small test set, not to certainty."
        )
        return PairedDifference(mean, mean, mean, None, n, std=0.0, remark=remark)
    error = std / math.sqrt(n)
    half_width = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    return PairedDifference(
        mean,
        mean - half_width,
        mean + half_width,
        float(2 * stats.t.sf(abs(mean) / error, n - 1)),
        n,
        std=std,
        effect_size=effect_size(differences) if n > 2 else None,
        bootstrap=studentised_bootstrap(differences) if resample and n >= _MIN_BOOTSTRAP else None,
        permutation_p=sign_flip_test(differences) if resample and n >= _MIN_FLIPPED else None,
        remark=_REMARKS.get(n, ""),
    )


def pairs(
    values: Mapping[str, Mapping[int, Value]], baseline: str
) -> dict[str, tuple[dict[int, Value], dict[int, Value]]]:
    """Return method -> its values and the baseline's, by the seeds that both have.

    `values` is method -> seed -> value; methods that share no seed with the baseline are omitted.
    """
    base = values.get(baseline, {})
    return {
        method: ({s: by_seed[s] for s in seeds}, {s: base[s] for s in seeds})
        for method, by_seed in values.items()
        if method != baseline and (seeds := sorted(by_seed.keys() & base.keys()))
    }


def effect_size(differences: Floats) -> float:
    """Return Hedges's g of (n,) differences, n >= 3: mean / std without its small-sample bias.

    The factor (Hedges, 1981) is exact for normal differences: gamma(m / 2) / (sqrt(m / 2)
    gamma((m - 1) / 2)) with m = n - 1.
    """
    m = len(differences) - 1
    log_factor = special.gammaln(m / 2) - special.gammaln((m - 1) / 2) - math.log(m / 2) / 2
    return float(differences.mean() / differences.std(ddof=1) * math.exp(log_factor))


def studentised_bootstrap(differences: Floats, resamples: int = 4999) -> tuple[float, float] | None:
    """Return the bootstrap-t interval of the mean of (n,) differences (Efron, 1981).

    Each of B `resamples` is divided by its own standard error; t is infinite where that is zero.
    scipy's bootstrap has no such method, and its BCa covers far less than 95 % for few pairs.
    None if too many resamples without spread leave the interval unbounded.
    """
    n = len(differences)
    drawn = differences[np.random.default_rng(0).integers(0, n, (resamples, n))]  # (B, n)
    shifts, errors = drawn.mean(axis=1) - differences.mean(), drawn.std(axis=1, ddof=1)
    has_spread = errors > _ROUNDING * np.abs(differences).max()
    t = np.where(shifts == 0, 0, np.copysign(math.inf, shifts))
    np.divide(shifts, errors / math.sqrt(n), out=t, where=has_spread)
    upper = float(np.quantile(t, (1 + LEVEL) / 2, method="higher"))
    lower = float(np.quantile(t, (1 - LEVEL) / 2, method="lower"))
    if not (math.isfinite(upper) and math.isfinite(lower)):
        return None
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(n)
    return mean - upper * error, mean - lower * error


def sign_flip_test(differences: Floats) -> float:
    """Return the two-sided p-value of the mean of (n,) differences under random signs.

    Exact up to 14 differences, above that from 2^14 random flips.
    """
    scale = float(np.abs(differences).sum()) or 1.0

    def absolute_mean(flipped: Floats, axis: int) -> Floats:
        # Rounded, so that means that differ only by rounding errors count as ties.
        means: Floats = np.round(np.abs(flipped.sum(axis=axis)) / scale, 12)
        return means

    test = stats.permutation_test(
        (differences,), absolute_mean, permutation_type="samples", alternative="greater",
        vectorized=True, n_resamples=2**14, random_state=0,
    )  # fmt: skip
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in their order (Holm, 1979)."""
    p = np.array(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p))
    p[order] = np.maximum.accumulate(np.minimum(1, factors * p[order]))
    return list(map(float, p))


# Numbers as text, the same in every format of the report.

DASH = "–"
_METRICS = {
    "top1": "top-1 accuracy", "top5": "top-5 accuracy", "mean_per_class": "mean per-class accuracy",
    "ap": "AP 50:95", "ap50": "AP 50", "ap75": "AP 75",
    "knn20_top1": "k-NN (20) top-1", "logistic_top1": "logistic top-1",
    "linear_top1": "linear top-1", "svm_top1": "SVM top-1",
}  # fmt: skip


def metric_name(metric: str) -> str:
    """Return a metric's display name."""
    return _METRICS.get(metric, metric)


def is_loss(metric: str) -> bool:
    """Whether lower is better; a loss is not a fraction."""
    return "loss" in metric


def score(value: float, metric: str) -> str:
    """Return a fraction in percent, a loss unscaled."""
    return f"{value:.4f}" if is_loss(metric) else f"{100 * value:.2f}"


def spread(summary: Summary | None, metric: str) -> str:
    """Return mean ± standard deviation, without the latter for one value; a dash for none."""
    if summary is None:
        return DASH
    deviation = "" if summary.std is None else f" ± {score(summary.std, metric)}"
    return score(summary.mean, metric) + deviation


def gap(value: float, metric: str) -> str:
    """Return a difference with its sign, in percentage points unless the metric is a loss."""
    text = score(abs(value), metric)
    return f"{'+' if value > 0 else '−'}{text}" if float(text) else text


def bounds(interval: tuple[float, float] | None, metric: str) -> str:
    """Return an interval of differences; a dash for None."""
    return f"[{gap(interval[0], metric)}, {gap(interval[1], metric)}]" if interval else DASH


def interval(difference: PairedDifference, metric: str) -> str:
    """Return the t interval of a difference, or why there is none."""
    if difference.low is None or difference.high is None:
        return "[one pair, no interval]"
    if difference.p_value is None:
        return "[the same for every seed]"
    return bounds((difference.low, difference.high), metric)


def count_of(n: int, expected: int) -> str:
    """Return `n`, as `n of expected` if some are missing."""
    return f"{n} of {expected}" if n < expected else f"{n}"


def count_missing(n: int, expected: int) -> str:
    """Return `n of expected` if some, but not all, are missing; else an empty string."""
    return f"{n} of {expected}" if 0 < n < expected else ""


def p_value(value: float | None) -> str:
    """Return a p-value with two digits, `< 0.001`, or a dash."""
    return "< 0.001" if value is not None and value < 0.001 else or_dash(value, "{:.2g}")


def or_dash(value: float | None, template: str) -> str:
    """Return a formatted number, or a dash for None."""
    return DASH if value is None else template.format(value).replace("-", "−")


def seed_list(seeds: Sequence[int]) -> str:
    """Return `seed 1` or `seeds 1, 2`."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
