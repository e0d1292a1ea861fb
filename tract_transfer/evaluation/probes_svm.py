"""Linear support vector machines on frozen features, one a class, as in VISSL."""

# N images (train or test), D features, K classes

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import LinearSVC

from tract_transfer.evaluation.probes import (
    Features,
    Fit,
    Labels,
    Rows,
    check_finite,
    unit_rows,
)

# Of a class with a single positive (or negative) row there is nothing to select C on.
C_OF_ONE_ROW = 1.0
_CLASS_WEIGHT = {1: 2.0, -1: 1.0}


def one_hot_marks(labels: Labels, num_classes: int) -> Labels:
    """Return marks (N, K) of classes (N,): 1 for its own, -1 for all others."""
    marks = np.full((len(labels), num_classes), -1, np.int64)
    marks[np.arange(len(labels)), labels] = 1
    return marks


def linear_svm(
    train: Rows,
    test_x: Features,
    *,
    cs: Sequence[float],
    folds: int,
    max_iters: int,
    seed: int,
) -> Fit:
    """Fit a linear SVM for each class and score the test images by their signed distances.

    Squared hinge loss, l2 penalty, positives weighing 2, on features of length 1 (Goyal et al.
    2019; VISSL). For each class C is the best by mean average precision over stratified `folds`
    of train, the smallest of equals; then all of its rows are fitted. A class of fewer rows than
    folds has as many folds as rows, and of a single one C = 1.

    Args:
        train: y are marks (N, K): 1, -1, or 0 for rows that a class leaves out.
        test_x: (N', D) features.
        cs: candidates for C.
        folds: parts of the cross-validation.
        max_iters: limit of liblinear for one fit.
        seed: what the folds are drawn by.

    Returns:
        Scores (N', K); a class without positives, or without negatives, ranks below all others.
        `chosen["c"]` has C by class, None for such a class.

    Raises:
        ValueError: shapes or marks that do not fit, no class to fit, no C or one <= 0, or features
            that are not finite.
    """
    _check(train, test_x, cs)
    fit_x, score_x = unit_rows(train.x), unit_rows(test_x)
    of_class = [
        _fit_class(fit_x[marks != 0], marks[marks != 0], cs, folds, max_iters, seed)
        for marks in train.y.T
    ]
    fitted = [model for model in of_class if model is not None]
    if not fitted:
        raise ValueError("No class has both positives and negatives to fit. Check data.train.")
    columns = [None if model is None else model.decision_function(score_x) for model in of_class]
    floor = np.min([column for column in columns if column is not None], axis=0) - 1
    scores = np.stack([floor if column is None else column for column in columns], axis=1)
    unfinished = sum(int(model.n_iter_ >= max_iters) for model in fitted)
    chosen = [None if model is None else model.C for model in of_class]
    return Fit(scores, {"c": chosen}, {"fits_at_max_iters": unfinished})


def _fit_class(
    x: Features, y: Labels, cs: Sequence[float], folds: int, max_iters: int, seed: int
) -> LinearSVC | None:
    """Fit one class to its marks y (N,) of 1 and -1; None where there is one of them alone."""
    if len(np.unique(y)) < 2:
        return None
    model = _svc(_select_c(x, y, cs, folds, max_iters, seed), max_iters)
    with warnings.catch_warnings():  # counted as `fits_at_max_iters`
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)
    return model


def _select_c(
    x: Features, y: Labels, cs: Sequence[float], folds: int, max_iters: int, seed: int
) -> float:
    parts = min(folds, int((y == 1).sum()), int((y == -1).sum()))
    if parts < 2:
        return C_OF_ONE_ROW
    if len(set(cs)) == 1:
        return float(cs[0])
    split = StratifiedKFold(parts, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        precision = {
            float(c): cross_val_score(
                _svc(c, max_iters), x, y, cv=split, scoring="average_precision"
            ).mean()
            for c in sorted(set(cs))
        }
    return max(precision, key=lambda c: precision[c])  # the first, so the smallest


def _svc(c: float, max_iters: int) -> LinearSVC:
    """`dual="auto"`: the same optimum by whichever form is the smaller."""
    return LinearSVC(
        C=c, class_weight=_CLASS_WEIGHT, max_iter=max_iters, dual="auto", random_state=0
    )


def _check(train: Rows, test_x: Features, cs: Sequence[float]) -> None:
    if train.x.ndim != 2 or test_x.ndim != 2 or train.x.shape[1] != test_x.shape[1]:
        raise ValueError(f"Need features (N, D) of one D: {train.x.shape}, {test_x.shape}.")
    if train.y.ndim != 2 or len(train.y) != len(train.x) or len(train.x) == 0:
        raise ValueError(f"Need marks (N, K), a row each: {train.y.shape} for {train.x.shape}.")
    if not np.isin(train.y, (-1, 0, 1)).all():
        raise ValueError("Marks must be 1, -1 or 0.")
    if len(cs) == 0 or min(cs) <= 0:
        raise ValueError(f"A support vector machine needs values of C, all > 0; got {list(cs)}.")
    check_finite("training", train.x)
    check_finite("test", test_x)
