"""Multinomial logistic regression on frozen features."""

# N images (train or test), D features, K classes

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tract_transfer.evaluation.probes import Features, Fit, Labels, Rows, Selection, check_probe

Floats = NDArray[np.float64]


def logistic_regression(
    train: Rows,
    test_x: Features,
    *,
    selection: Selection,
    cs: Sequence[float],
    max_iters: int,
    num_classes: int,
) -> Fit:
    """Fit a multinomial logistic regression on frozen features and score the test images.

    C is chosen by top-1 on `selection`, the smallest of the best; then all of train is fitted with
    it (L-BFGS from zero, scikit-learn's tolerance). Features are standardised by the rows that are
    fitted, in float64.

    Args:
        train: what is fitted in the end.
        test_x: (N', D) features.
        selection: what C is chosen on.
        cs: candidates for C, the weight of the summed loss against half the squared norm.
        max_iters: limit of L-BFGS for one fit.
        num_classes: K, the columns of the scores, which are log-probabilities. A class without
            training rows ranks below all others, at 1e-38 or less.

    Raises:
        ValueError: fewer than two classes, no C or one <= 0, shapes or labels that do not fit, or
            features that are not finite.
    """
    check_probe(train, test_x, num_classes)
    accuracies = accuracy_by_c(selection, cs, max_iters)
    best_c = best_of(accuracies)
    scores, converged = fit_logistic(train, test_x, best_c, max_iters, num_classes)
    details = {
        "val_top1": {f"{c:g}": value for c, value in accuracies.items()},
        "converged": converged,
    }
    return Fit(scores, {"c": best_c}, details)


def accuracy_by_c(selection: Selection, cs: Sequence[float], max_iters: int) -> dict[float, float]:
    """Return C -> top-1 on `selection.val`, ascending; each C starts from the one before.

    Raises:
        ValueError: no C, or one <= 0.
    """
    if len(cs) == 0 or min(cs) <= 0:
        raise ValueError(f"Logistic regression needs values of C, all > 0; got {list(cs)}.")
    fit, val = selection
    scaler = StandardScaler().fit(fit.x.astype(np.float64))
    fit_x = scaler.transform(fit.x.astype(np.float64))
    val_x = scaler.transform(val.x.astype(np.float64))
    model = LogisticRegression(max_iter=max_iters, warm_start=True)
    accuracies: dict[float, float] = {}
    for c in sorted(set(cs)):
        _fit(model.set_params(C=c), fit_x, fit.y)
        accuracies[float(c)] = float((model.predict(val_x) == val.y).mean())
    return accuracies


def best_of(accuracies: dict[float, float]) -> float:
    """Return the smallest C of the best accuracy; `accuracies` ascends in C."""
    return max(accuracies, key=lambda c: accuracies[c])


def fit_logistic(
    train: Rows, test_x: Features, c: float, max_iters: int, num_classes: int
) -> tuple[Floats, bool]:
    """Return the log-probabilities (N', K) of test images, and whether the fit converged."""
    scaler = StandardScaler().fit(train.x.astype(np.float64))
    model = LogisticRegression(max_iter=max_iters, C=c)
    _fit(model, scaler.transform(train.x.astype(np.float64)), train.y)
    test = scaler.transform(test_x.astype(np.float64))
    return _log_probabilities(model, test, num_classes), bool(model.n_iter_.max() < max_iters)


def _fit(model: Any, x: Floats, y: Labels) -> None:
    with warnings.catch_warnings():  # the caller reports it
        warnings.simplefilter("ignore", ConvergenceWarning)
        # Few shots of many classes: scikit-learn asks whether these are not numbers to regress on.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        model.fit(x, y)


def _log_probabilities(model: Any, x: Floats, num_classes: int) -> Floats:
    decision: Floats = model.decision_function(x)
    if decision.ndim == 1:  # two classes: scikit-learn gives the log-odds of the second
        decision = np.stack([np.zeros_like(decision), decision], axis=1)
    log_p = decision - decision.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    floor = np.minimum(log_p.min(axis=1, keepdims=True), np.log(1e-38)) - 1
    scores = np.repeat(floor, num_classes, axis=1)
    scores[:, model.classes_] = log_p
    return scores
