"""Compare the time of our logistic regression with a loop of 45 scikit-learn fits.

Both try DINOv2's 45 values of C on synthetic features. The loop fits every C to all rows from zero.
Ours fits nine tenths of the rows, each C starting from the previous solution, selects C on the rest
and fits it to all rows. They take turns, and the paired ratios are printed. Run with
OMP_NUM_THREADS=1: a loop of small products gains little from threads, and one thread is less
sensitive to other programs.

    OMP_NUM_THREADS=1 python benchmarks/probes.py [--pairs 3] [--rows 10000] [--features 512]
"""

import argparse
import os
import statistics
import time
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tract_transfer.evaluation.linear_probes import logistic_regression
from tract_transfer.evaluation.probes import Rows, hold_out_selection

CS = [10 ** (-6 + 11 * i / 44) for i in range(45)]
MAX_ITERS = 1000


def synthetic(rows: int, features: int, classes: int) -> Rows:
    """Make overlapping clusters, clipped at zero like a ResNet's features."""
    rng = np.random.default_rng(0)
    y = np.arange(rows) % classes
    centres = rng.normal(size=(classes, features)) * 0.15
    x = np.maximum(centres[y] + rng.normal(size=(rows, features)), 0)
    return Rows(x.astype(np.float32), y)


def ours(train: Rows, test: Rows, classes: int) -> tuple[float, float]:
    """Return the selected C and top-1 on test."""
    fit = logistic_regression(
        train,
        test.x,
        selection=hold_out_selection(train, 0.1, seed=0),
        cs=CS,
        max_iters=MAX_ITERS,
        num_classes=classes,
    )
    return fit.chosen["c"], float((fit.scores.argmax(axis=1) == test.y).mean())


def plain(train: Rows, test: Rows) -> float:
    """Fit every C from zero; return the best top-1 on test (an optimistic choice)."""
    scaler = StandardScaler().fit(train.x.astype(np.float64))
    x, test_x = (scaler.transform(rows.x.astype(np.float64)) for rows in (train, test))
    fits = [LogisticRegression(C=c, max_iter=MAX_ITERS).fit(x, train.y) for c in CS]
    return max(fit.score(test_x, test.y) for fit in fits)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=10)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    data = synthetic(arguments.rows + arguments.rows // 4, arguments.features, arguments.classes)
    train, test = (
        Rows(data.x[part], data.y[part])
        for part in (slice(arguments.rows), slice(arguments.rows, None))
    )
    print(f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}")
    ratios = []
    for _ in range(arguments.pairs):
        started = time.perf_counter()
        c, top1 = ours(train, test, arguments.classes)
        between = time.perf_counter()
        best = plain(train, test)
        seconds = between - started, time.perf_counter() - between
        ratios.append(seconds[0] / seconds[1])
        print(
            f"ours {seconds[0]:.2f} s (C {c:.2g}, top-1 {top1:.4f}), plain {seconds[1]:.2f} s "
            f"(best C on test: top-1 {best:.4f}), ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(
        f"median ratio {statistics.median(ratios):.2f} (min {min(ratios):.2f}, "
        f"max {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
