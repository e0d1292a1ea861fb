"""Numbers and names in words, the same in every format of the report."""

from collections.abc import Mapping

from tract_transfer.suite.statistics import PairedDifference, Summary

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
