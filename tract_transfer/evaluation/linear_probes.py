"""A linear classifier on frozen features by SGD: a whole grid of settings in one pass."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor

from tract_transfer.evaluation.probes import (
    Features,
    Fit,
    Labels,
    Rows,
    Selection,
    check_finite,
    check_probe,
    knn_predict,
    unit_rows,
)

Point = tuple[float, float]  # learning rate, weight decay
Train = Callable[[Tensor, Tensor, Sequence[Point]], tuple[Tensor, Tensor]]

_SCORED_AT_ONCE = 4096  # rows


def linear_probe(
    train: Rows,
    test_x: Features,
    *,
    selection: Selection,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    max_epochs: int,
    batch_size: int,
    momentum: float,
    seed: int,
    num_classes: int,
    device: torch.device | str = "cpu",
) -> Fit:
    """Train a linear classifier for every learning rate and weight decay, and report the best.

    All settings see the same batches at once, as in DINOv2. The best by top-1 on `selection` (of
    equals the smallest learning rate, then the smallest decay) is trained again on all of train.
    Features are standardised by the rows that are fitted.

    Raises:
        ValueError: fewer than two classes, an empty grid, every setting diverged, shapes or labels
            that do not fit, or features that are not finite.
    """
    check_probe(train, test_x, num_classes)
    points = list(itertools.product(sorted(set(lrs)), sorted(set(weight_decays))))
    if not points:
        raise ValueError("A linear probe needs a learning rate and a weight decay at least.")

    train_points = partial(
        train_linear,
        max_epochs=max_epochs,
        batch_size=batch_size,
        momentum=momentum,
        seed=seed,
        num_classes=num_classes,
    )
    top1 = _val_top1(selection, points, train_points, device)
    if max(top1) < 0:
        raise ValueError(
            f"Every setting of the linear probe diverged. Lower evaluation.linear.lrs {list(lrs)}."
        )
    lr, weight_decay = points[top1.index(max(top1))]
    scores = _final_scores(train, test_x, (lr, weight_decay), train_points, device)
    val_top1 = {
        f"lr {rate:g}, weight decay {decay:g}": None if value < 0 else value
        for (rate, decay), value in zip(points, top1, strict=True)
    }
    return Fit(scores.numpy(), {"lr": lr, "weight_decay": weight_decay}, {"val_top1": val_top1})


def _val_top1(
    selection: Selection, points: Sequence[Point], train_points: Train, device: torch.device | str
) -> list[float]:
    """Return the top-1 of each point on the selection, -1 where it diverged."""
    hits, diverged = torch.zeros(len(points)), torch.zeros(len(points), dtype=torch.bool)
    truth = torch.from_numpy(selection.val.y)
    blocks = _scores(selection.fit, selection.val.x, points, train_points, device)
    for block, labels in zip(blocks, truth.split(_SCORED_AT_ONCE), strict=True):
        hits += (block.argmax(dim=2) == labels).sum(dim=1)
        diverged |= ~block.isfinite().all(dim=2).all(dim=1)
    top1: list[float] = torch.where(diverged, -1.0, hits.double() / len(truth)).tolist()
    return top1


def _final_scores(
    train: Rows, test_x: Features, point: Point, train_points: Train, device: torch.device | str
) -> Tensor:
    """Return the logits (N, K) of the test images by the chosen point, trained on all of train."""
    blocks = _scores(train, test_x, [point], train_points, device)
    scores = torch.cat([block[0] for block in blocks])
    if not scores.isfinite().all():
        raise ValueError(
            f"The linear probe diverged on all of train at lr {point[0]:g}, which did not on a "
            "part of it. Leave it out of evaluation.linear.lrs."
        )
    return scores


def _scores(
    fitted: Rows,
    of: Features,
    points: Sequence[Point],
    train_points: Train,
    device: torch.device | str,
) -> Iterator[Tensor]:
    """Train the points on standardised rows; yield (G, n, K) logits, a block of `of` at a time."""
    scaler = StandardScaler().fit(fitted.x.astype(np.float64))
    x, rows = (
        torch.from_numpy(scaler.transform(part.astype(np.float64)).astype(np.float32))
        for part in (fitted.x, of)
    )
    weight, bias = train_points(x.to(device), torch.from_numpy(fitted.y).to(device), points)
    for part in rows.split(_SCORED_AT_ONCE):
        yield torch.matmul(part.to(device), weight).add_(bias[:, None]).cpu()


@torch.no_grad()
def train_linear(
    x: Tensor,
    y: Tensor,
    points: Sequence[Point],
    *,
    max_epochs: int,
    batch_size: int,
    momentum: float,
    seed: int,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Return weights (G, D, K) and biases (G, K) of each (learning rate, weight decay).

    SGD with momentum on the cross-entropy from zero weights; the learning rate falls to zero by a
    cosine over all iterations, weight decay leaves the biases out. The order of the rows depends
    on (seed, epoch) alone, and what a point learns on none of the others.

    Args:
        x: (N, D) float32.
        y: (N,) labels.
    """
    rates, decays = torch.tensor(points, dtype=x.dtype, device=x.device).T[:, :, None, None]
    weight = x.new_zeros(len(points), x.shape[1], num_classes)
    bias = x.new_zeros(len(points), 1, num_classes)
    velocities = torch.zeros_like(weight), torch.zeros_like(bias)
    total, step = max_epochs * math.ceil(len(x) / batch_size), 0
    for epoch in range(max_epochs):
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(x)))
        for rows in order.to(x.device).split(batch_size):
            batch = x[rows]
            slope = (torch.matmul(batch, weight) + bias).softmax(dim=2)
            slope[:, torch.arange(len(rows), device=x.device), y[rows]] -= 1
            slope /= len(rows)
            gradients = (
                torch.matmul(batch.T, slope).addcmul_(decays, weight),
                slope.sum(dim=1, keepdim=True),
            )
            factor = 0.5 * (1 + math.cos(math.pi * step / total))
            for value, velocity, gradient in zip(
                (weight, bias), velocities, gradients, strict=True
            ):
                value -= velocity.mul_(momentum).add_(gradient) * (rates * factor)
            step += 1
    return weight, bias[:, 0]


# --- Multinomial logistic regression on frozen features.

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


# --- Linear support vector machines on frozen features, one a class, as in VISSL.

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


# --- Probes that see k images a class: the draws of training images, and the classifiers on the

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
