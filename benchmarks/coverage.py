"""Simulates the coverage and width of 95 % intervals of paired differences.

Compares the report's t interval and studentised bootstrap with scipy's BCa bootstrap, for
differences that are normal, skewed (exponential), or counted in whole images.

    python benchmarks/coverage.py
"""

import argparse
from collections.abc import Callable

import numpy as np
from scipy import stats

from tract_transfer.report.statistics import paired_difference, studentised_bootstrap

Draw = Callable[[np.random.Generator, int], np.ndarray]
KINDS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda random, n: random.normal(0, 1, n), 0.0),
    "exponential": (lambda random, n: random.exponential(1, n), 1.0),
    "normal, rounded to its sd": (lambda random, n: np.round(random.normal(0, 1, n)), 0.0),
}


def simulate(
    draw: Draw, truth: float, n: int, repeats: int
) -> tuple[dict[str, float], float, float]:
    """Return the coverage by method, the share of repeats in which the studentised interval is
    unbounded, and the median of its width over that of the t interval."""
    random = np.random.default_rng(0)
    inside = {"t": 0, "studentised": 0, "BCa": 0}
    widths, unbounded = [], 0
    for _ in range(repeats):
        values = draw(random, n)
        difference = paired_difference(
            dict(enumerate(values.tolist())), dict.fromkeys(range(n), 0.0), resample=False
        )
        if difference.p_value is None:  # no spread: the report shows no interval
            repeats -= 1
            continue
        low, high = difference.low, difference.high
        studentised = studentised_bootstrap(values, resamples=1999)
        bca = stats.bootstrap(
            (values,), np.mean, method="BCa", n_resamples=1999, random_state=random
        ).confidence_interval
        inside["t"] += low <= truth <= high
        inside["BCa"] += bca.low <= truth <= bca.high
        if studentised is None:
            unbounded += 1
            continue
        inside["studentised"] += studentised[0] <= truth <= studentised[1]
        widths.append((studentised[1] - studentised[0]) / (high - low))
    counts = {"t": repeats, "studentised": repeats - unbounded, "BCa": repeats}
    coverage = {name: count / max(counts[name], 1) for name, count in inside.items()}
    return coverage, unbounded / repeats, float(np.median(widths)) if widths else float("nan")


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2000)
    repeats = parser.parse_args().repeats
    print("| differences | pairs | t | studentised | its width | unbounded | BCa |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind, (draw, truth) in KINDS.items():
        for n in (4, 5, 6, 8, 10, 20):
            coverage, unbounded, width = simulate(draw, truth, n, repeats)
            cells = [f"{coverage['t']:.3f}", f"{coverage['studentised']:.3f}", f"{width:.2f}"]
            cells += [f"{unbounded:.3f}", f"{coverage['BCa']:.3f}"]
            print(f"| {kind} | {n} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
