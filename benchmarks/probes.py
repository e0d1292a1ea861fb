"""Time of our logistic regression over scikit-learn's plain loop of 45 fits, on made-up features.

Both try DINOv2's 45 values of C. The loop fits each to all rows from zero; ours fits them to nine
tenths, each from the one before, measures them on the rest, and fits the chosen one to all rows.
They take turns; the paired ratios are printed. Run it with OMP_NUM_THREADS=1: a loop of small
products gains little from threads, and other programs disturb it less.

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


def made_up(rows: int, features: int, classes: int) -> Rows:
    """Clusters that overlap, cut off at zero as a ResNet's features are."""
    rng = np.random.default_rng(0)
    y = np.arange(rows) % classes
    centres = rng.normal(size=(classes, features)) * 0.15
    x = np.maximum(centres[y] + rng.normal(size=(rows, features)), 0)
    return Rows(x.astype(np.float32), y)


def ours(train: Rows, test: Rows, classes: int) -> tuple[float, float]:
    """Return C and top-1 on test."""
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
    """Fit every C from zero; return the best top-1, which a test set must not choose."""
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
    data = made_up(arguments.rows + arguments.rows // 4, arguments.features, arguments.classes)
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
            f"(best of all C on test {best:.4f}), ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(
        f"median ratio {statistics.median(ratios):.2f} (min {min(ratios):.2f}, "
        f"max {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
