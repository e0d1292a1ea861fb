"""How often intervals of paired differences hold the truth, and how wide they are, by simulation.

The t interval and the studentised bootstrap of tract_transfer.suite.statistics, and scipy's BCa
bootstrap, of differences that are normal, skewed (exponential), or counted in whole images.

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


def covered(
    draw: Draw, truth: float, n: int, repeats: int
) -> tuple[dict[str, float], float, float]:
    """Return the share of intervals that hold `truth`, the share without a bootstrap interval, and
    the median width of the bootstrap's over the t interval's."""
    random = np.random.default_rng(0)
    inside = {"t": 0, "studentised": 0, "BCa": 0}
    widths, endless = [], 0
    for _ in range(repeats):
        values = draw(random, n)
        found = paired_difference(
            dict(enumerate(values.tolist())), dict.fromkeys(range(n), 0.0), resample=False
        )
        if found.p_value is None:  # no spread: neither interval is shown
            repeats -= 1
            continue
        t = (found.low, found.high)
        bootstrap = studentised_bootstrap(values, resamples=1999)
        bca = stats.bootstrap(
            (values,), np.mean, method="BCa", n_resamples=1999, random_state=random
        ).confidence_interval
        inside["t"] += t[0] <= truth <= t[1]
        inside["BCa"] += bca.low <= truth <= bca.high
        if bootstrap is None:
            endless += 1
            continue
        inside["studentised"] += bootstrap[0] <= truth <= bootstrap[1]
        widths.append((bootstrap[1] - bootstrap[0]) / (t[1] - t[0]))
    of = {"t": repeats, "studentised": repeats - endless, "BCa": repeats}
    shares = {name: count / max(of[name], 1) for name, count in inside.items()}
    return shares, endless / repeats, float(np.median(widths)) if widths else float("nan")


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2000)
    repeats = parser.parse_args().repeats
    print("| differences | pairs | t | studentised | its width | without | BCa |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind, (draw, truth) in KINDS.items():
        for n in (4, 5, 6, 8, 10, 20):
            shares, endless, width = covered(draw, truth, n, repeats)
            cells = [f"{shares['t']:.3f}", f"{shares['studentised']:.3f}", f"{width:.2f}"]
            cells += [f"{endless:.3f}", f"{shares['BCa']:.3f}"]
            print(f"| {kind} | {n} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
