"""Probes that see k images a class: the draws of training images, and the classifiers on them."""

# N images (train or test), D features, K classes

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold

from tract_transfer.evaluation.probes import Features, Fit, Labels, Rows, Selection
from tract_transfer.evaluation.probes_knn import knn_predict
from tract_transfer.evaluation.probes_logistic import accuracy_by_c, best_of, fit_logistic
from tract_transfer.evaluation.probes_svm import C_OF_ONE_ROW, linear_svm, one_hot_marks

Classifier = Callable[[Rows, Features, int, int], Fit]
_MAX_ITERS = 2000


def check_shots(y: Labels, ks: Sequence[int], class_names: Sequence[str]) -> None:
    """Refuse a k that is more than a class has; a class without any image is left out.

    Args:
        y: classes (N,), or marks (N, K), of which the positives count.

    Raises:
        ValueError: names the class with the fewest images, and their number.
    """
    counts = np.bincount(y, minlength=len(class_names)) if y.ndim == 1 else (y == 1).sum(axis=0)
    present = np.flatnonzero(counts)
    if not len(present):
        raise ValueError("No training image shows a class. Check data.train.")
    rarest = present[counts[present].argmin()]
    if max(ks) > counts[rarest]:
        raise ValueError(
            f"evaluation.few_shot.ks: class {class_names[rarest]!r} has {counts[rarest]} training "
            f"images, fewer than k = {max(ks)}. Leave out of ks what is above {counts[rarest]}."
        )


def draws(train: Rows, k: int, samplings: int, seed: int) -> Iterator[Rows]:
    """Yield the training rows of each sampling; they depend on (seed, sampling, k) alone.

    Of classes (N,) every class that has images gives k of them. Of marks (N, K) every class keeps
    k positives and (K - 1) k negatives, or all it has, and leaves the other rows out (VISSL).
    """
    for sampling in range(samplings):
        rng = np.random.default_rng([seed, sampling, k])
        if train.y.ndim == 1:
            rows = np.sort(np.concatenate(_drawn(train.y, np.unique(train.y), k, rng)))
            yield Rows(train.x[rows], train.y[rows])
            continue
        marks = np.zeros_like(train.y)
        for own, column in zip(marks.T, train.y.T, strict=True):
            for mark, count in ((1, k), (-1, (train.y.shape[1] - 1) * k)):
                (rows,) = _drawn(column, [mark], count, rng)
                own[rows] = mark
        yield Rows(train.x, marks)


def classifier(
    name: str,
    *,
    cs: Sequence[float],
    folds: int,
    temperature: float,
    seed: int,
    num_classes: int,
) -> Classifier:
    """Return what fits (drawn rows, test features (N', D), k, sampling) and scores the latter.

    Args:
        name: `logistic` and `svm` choose C among `cs` by cross-validation on the drawn rows alone,
            over `folds` parts or k where that is fewer; with k = 1 they take C = 1. `knn` lets the
            k nearest vote, as `knn_predict` at `temperature`.
        seed: with the sampling, what the folds are drawn by.
    """

    def logistic(train: Rows, test_x: Features, k: int, sampling: int) -> Fit:
        c = _logistic_c(train, cs, min(folds, k), seed + sampling)
        scores, converged = fit_logistic(train, test_x, c, _MAX_ITERS, num_classes)
        return Fit(scores, {"c": c}, {"converged": converged})

    def svm(train: Rows, test_x: Features, k: int, sampling: int) -> Fit:
        if train.y.ndim == 1:
            train = Rows(train.x, one_hot_marks(train.y, num_classes))
        return linear_svm(
            train, test_x, cs=cs, folds=folds, max_iters=_MAX_ITERS, seed=seed + sampling
        )

    def knn(train: Rows, test_x: Features, k: int, sampling: int) -> Fit:
        found = knn_predict(train, test_x, ks=[k], temperature=temperature, num_classes=num_classes)
        return Fit(found[k])

    return {"logistic": logistic, "svm": svm, "knn": knn}[name]


def _drawn(
    y: Labels, values: Sequence[int] | Labels, count: int, rng: np.random.Generator
) -> list[NDArray[np.intp]]:
    """Return up to `count` rows of each of `values`."""
    return [rng.permutation(np.flatnonzero(y == value))[:count] for value in values]


def _logistic_c(train: Rows, cs: Sequence[float], folds: int, seed: int) -> float:
    """Return the smallest C of the best mean top-1 over stratified folds of `train`."""
    if folds < 2:
        return C_OF_ONE_ROW
    if len(set(cs)) == 1:
        return float(cs[0])
    totals = dict.fromkeys(map(float, sorted(set(cs))), 0.0)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for fit, val in split.split(train.x, train.y):
        parts = Selection(*(Rows(train.x[rows], train.y[rows]) for rows in (fit, val)))
        for c, value in accuracy_by_c(parts, cs, _MAX_ITERS).items():
            totals[c] += value
    return best_of(totals)
