"""Probes of frozen features: SGD, logistic regression, linear SVMs, and few-shot classifiers."""

# N rows, D features, K classes, G settings of the SGD grid

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor

from tract_transfer.evaluation.probes import (
    Features,
    Fit,
    Labels,
    Rows,
    Selection,
    knn_predict,
    unit_rows,
)

Floats = NDArray[np.float64]
Point = tuple[float, float]  # learning rate, weight decay

_BLOCK_ROWS = 4096
_FEW_SHOT_MAX_ITERS = 2000


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

    All settings are trained at once on the same batches, as in DINOv2. The best by top-1 on
    `selection` (the smallest learning rate, then the smallest decay, of equals) is trained again on
    all of train. Features are standardized by the rows that are fitted.

    Raises:
        ValueError: every setting diverged, or the best one did on all of train.
    """
    points = list(itertools.product(sorted(set(lrs)), sorted(set(weight_decays))))

    def logits(fitted: Rows, scored_x: Features, points: Sequence[Point]) -> Iterator[Tensor]:
        """Train on standardized rows; yield logits (G, n, K) for blocks of `scored_x`."""
        x, scored = (torch.from_numpy(x).float() for x in _standardized(fitted.x, scored_x))
        weight, bias = train_linear(
            x.to(device),
            torch.from_numpy(fitted.y).to(device),
            points,
            max_epochs=max_epochs,
            batch_size=batch_size,
            momentum=momentum,
            seed=seed,
            num_classes=num_classes,
        )
        for block in scored.split(_BLOCK_ROWS):
            yield torch.matmul(block.to(device), weight).add_(bias[:, None]).cpu()

    val = selection.val
    val_top1 = _top1_by_setting(logits(selection.fit, val.x, points), torch.from_numpy(val.y))
    lr, weight_decay = best = points[val_top1.index(max(val_top1))]
    scores = torch.cat([block[0] for block in logits(train, test_x, [best])])
    if max(val_top1) < 0 or not scores.isfinite().all():
        raise ValueError(
            f"The linear probe diverged at lr {lr:g}. Lower evaluation.linear.lrs {list(lrs)}."
        )
    details = {
        f"lr {rate:g}, weight decay {decay:g}": None if value < 0 else value
        for (rate, decay), value in zip(points, val_top1, strict=True)
    }
    return Fit(scores.numpy(), {"lr": lr, "weight_decay": weight_decay}, {"val_top1": details})


def _top1_by_setting(blocks: Iterable[Tensor], labels: Tensor) -> list[float]:
    """Return (G,) the top-1 of blocks of logits (G, n, K), -1 for a setting that diverged."""
    parts = [(block.argmax(dim=2), block.isfinite().all(dim=2)) for block in blocks]
    predicted, finite = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
    top1 = (predicted == labels).double().mean(dim=1)
    result: list[float] = torch.where(finite.all(dim=1), top1, -1.0).tolist()
    return result


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
    """Return weights (G, D, K) and biases (G, K) for each (learning rate, weight decay).

    SGD with momentum on the cross-entropy from zero weights, with a cosine learning rate to zero
    over all iterations and no weight decay on biases. The order of rows depends on (seed, epoch)
    only, and the settings do not influence each other. x is (N, D) float32, y (N,) labels.
    """
    rates, decays = torch.tensor(points, dtype=x.dtype, device=x.device).T[:, :, None, None]
    weight = x.new_zeros(len(points), x.shape[1], num_classes)
    bias = x.new_zeros(len(points), 1, num_classes)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    total, step = max_epochs * math.ceil(len(x) / batch_size), 0
    for epoch in range(max_epochs):
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(x)))
        for rows in order.to(x.device).split(batch_size):
            batch = x[rows]
            slope = (torch.matmul(batch, weight) + bias).softmax(dim=2)
            slope[:, torch.arange(len(rows), device=x.device), y[rows]] -= 1
            slope /= len(rows)
            weight_gradient = torch.matmul(batch.T, slope).addcmul_(decays, weight)
            bias_gradient = slope.sum(dim=1, keepdim=True)
            lr = rates * (0.5 * (1 + math.cos(math.pi * step / total)))
            weight -= weight_velocity.mul_(momentum).add_(weight_gradient) * lr
            bias -= bias_velocity.mul_(momentum).add_(bias_gradient) * lr
            step += 1
    return weight, bias[:, 0]


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

    C is the smallest with the best top-1 on `selection`; then all of train is fitted with it
    (L-BFGS from zero, scikit-learn's tolerance). Features are standardized by the rows that are
    fitted, in float64.

    Args:
        cs: candidates for C > 0, the weight of the summed loss against half the squared norm.
        max_iters: limit of L-BFGS for one fit.
        num_classes: K, the columns of the scores, which are log-probabilities: 1e-38 or less, and
            below all others, for a class without training rows.
    """
    val_top1 = accuracy_by_c([selection], cs, max_iters)
    c = max(val_top1, key=val_top1.__getitem__)  # the first of equals, so the smallest
    fit = _fit_logistic(train, test_x, c, max_iters, num_classes)
    details = {"val_top1": {f"{c:g}": value for c, value in val_top1.items()}, **fit.details}
    return fit._replace(details=details)


def accuracy_by_c(
    selections: Iterable[Selection], cs: Sequence[float], max_iters: int
) -> dict[float, float]:
    """Return C -> top-1 on `val`, summed over the selections, in ascending order of C.

    Each C starts from the solution of the one before.
    """
    totals = dict.fromkeys(sorted(map(float, cs)), 0.0)
    for fit, val in selections:
        fit_x, val_x = _standardized(fit.x, val.x)
        model = LogisticRegression(max_iter=max_iters, warm_start=True)
        for c in totals:
            _fit_quietly(model.set_params(C=c), fit_x, fit.y)
            totals[c] += float((model.predict(val_x) == val.y).mean())
    return totals


def _fit_logistic(train: Rows, test_x: Features, c: float, max_iters: int, num_classes: int) -> Fit:
    """Return the log-probabilities (N', K) of test images, and whether the fit converged."""
    regression = LogisticRegression(max_iter=max_iters, C=c)
    fit_x, score_x = _standardized(train.x, test_x)
    _fit_quietly(regression, fit_x, train.y)
    decision: Floats = regression.decision_function(score_x)
    if decision.ndim == 1:  # two classes: scikit-learn gives the log-odds of the second
        decision = np.stack([np.zeros_like(decision), decision], axis=1)
    log_p = log_softmax(decision, axis=1)
    floor = np.minimum(log_p.min(axis=1, keepdims=True), np.log(1e-38)) - 1
    scores = np.repeat(floor, num_classes, axis=1)
    scores[:, regression.classes_] = log_p
    return Fit(scores, {"c": c}, {"converged": bool(regression.n_iter_.max() < max_iters)})


def _standardized(fit_x: Features, other_x: Features) -> list[Floats]:
    """Return both in float64, with mean 0 and variance 1 of each feature over `fit_x`."""
    scaler = StandardScaler().fit(fit_x.astype(np.float64))
    return [scaler.transform(x.astype(np.float64)) for x in (fit_x, other_x)]


def _fit_quietly(model: Any, x: NDArray[Any], y: Labels) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # details report it
        # With few rows of many classes, scikit-learn suspects a regression target.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        model.fit(x, y)


def one_hot_marks(labels: Labels, num_classes: int) -> Labels:
    """Return marks (N, K) of classes (N,): 1 for the row's class, -1 for the others."""
    return np.where(np.arange(num_classes) == labels[:, None], 1, -1)


def linear_svm(
    train: Rows, test_x: Features, *, cs: Sequence[float], folds: int, max_iters: int, seed: int
) -> Fit:
    """Fit a linear SVM for each class and score the test images by their signed distances.

    Squared hinge loss, l2 penalty and weight 2 for positives, on features of length 1 (Goyal et al.
    2019; VISSL). The C of a class has the best mean average precision over stratified folds of
    train, the smallest of equals; then all its rows are fitted. A class with fewer rows than folds
    uses as many folds as rows, and C = 1 with a single row. A class without positives, or without
    negatives, ranks below all others, and its C in `chosen["c"]` is None.

    Args:
        train: y are marks (N, K): 1, -1, or 0 for rows that a class excludes.
        cs: candidates for C > 0.
        max_iters: limit of liblinear for one fit.
        seed: of the folds.
    """
    fit_x, score_x = unit_rows(train.x), unit_rows(test_x)
    models: dict[int, LinearSVC] = {}
    for k, marks in enumerate(train.y.T):
        counted = marks != 0
        if len(np.unique(marks[counted])) == 2:
            models[k] = _fit_svc(fit_x[counted], marks[counted], cs, folds, max_iters, seed)
    if not models:
        raise ValueError("No class has both positives and negatives to fit. Check data.train.")
    columns = {k: model.decision_function(score_x) for k, model in models.items()}
    floor = np.min(list(columns.values()), axis=0) - 1
    classes = range(train.y.shape[1])
    scores = np.stack([columns.get(k, floor) for k in classes], axis=1)
    chosen = [models[k].C if k in models else None for k in classes]
    unfinished = sum(int(model.n_iter_ >= max_iters) for model in models.values())
    return Fit(scores, {"c": chosen}, {"fits_at_max_iters": unfinished})


def _fit_svc(
    x: Features, y: Labels, cs: Sequence[float], folds: int, max_iters: int, seed: int
) -> LinearSVC:
    """Fit one class to marks y (N,), some 1 and some -1."""
    folds = min(folds, int((y == 1).sum()), int((y == -1).sum()))
    candidates = sorted(set(map(float, cs))) if folds > 1 else [1.0]
    model = LinearSVC(
        C=candidates[0], class_weight={1: 2.0, -1: 1.0}, max_iter=max_iters, random_state=0,
        dual="auto",  # the same optimum by whichever form is smaller
    )  # fmt: skip
    if len(candidates) == 1:
        _fit_quietly(model, x, y)
        return model
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    search = GridSearchCV(model, {"C": candidates}, scoring="average_precision", cv=split)
    _fit_quietly(search, x, y)
    best: LinearSVC = search.best_estimator_  # of equals, the first
    return best


def check_shots(y: Labels, ks: Sequence[int], class_names: Sequence[str]) -> None:
    """Raise ValueError if a class of y (as in Rows) has some training images, but fewer than k."""
    counts = np.bincount(y, minlength=len(class_names)) if y.ndim == 1 else (y == 1).sum(axis=0)
    present = np.flatnonzero(counts)
    if not len(present):
        raise ValueError("No training image shows a class. Check data.train.")
    rarest = present[counts[present].argmin()]
    if max(ks) > counts[rarest]:
        raise ValueError(
            f"evaluation.few_shot.ks: class {class_names[rarest]!r} has {counts[rarest]} training "
            f"images, fewer than k = {max(ks)}. Remove values above {counts[rarest]} from ks."
        )


def draws(train: Rows, k: int, samplings: int, seed: int) -> Iterator[Rows]:
    """Yield the training rows of each sampling; they depend on (seed, sampling, k) only.

    With classes (N,), k rows of every class that has rows. With marks (N, K), every class keeps k
    positives and (K - 1) k negatives, or all it has, and excludes the other rows (VISSL).
    """
    for sampling in range(samplings):
        rng = np.random.default_rng([seed, sampling, k])
        if train.y.ndim == 1:
            rows = np.concatenate([_draw(train.y, label, k, rng) for label in np.unique(train.y)])
            rows.sort()
            yield Rows(train.x[rows], train.y[rows])
            continue
        marks = np.zeros_like(train.y)
        for drawn, column in zip(marks.T, train.y.T, strict=True):
            for mark, count in ((1, k), (-1, (train.y.shape[1] - 1) * k)):
                drawn[_draw(column, mark, count, rng)] = mark
        yield Rows(train.x, marks)


def _draw(y: Labels, value: int, count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return up to `count` random rows in which y (N,) is `value`."""
    return rng.permutation(np.flatnonzero(y == value))[:count]


def few_shot_fit(
    classifier: str,
    train: Rows,
    test_x: Features,
    k: int,
    *,
    cs: Sequence[float],
    folds: int,
    temperature: float,
    seed: int,
    num_classes: int,
) -> Fit:
    """Fit a classifier to the rows of a draw with `k` shots, and score the test images.

    Args:
        classifier: `logistic` and `svm` select C from `cs` by cross-validation on the drawn rows,
            with `folds` folds, or k if that is fewer; with k = 1 they use C = 1. `knn` lets the k
            nearest vote, as `knn_predict` at `temperature`.
        seed: of the folds.
    """
    max_iters = _FEW_SHOT_MAX_ITERS
    if classifier == "knn":
        votes = knn_predict(train, test_x, ks=[k], temperature=temperature, num_classes=num_classes)
        return Fit(votes[k])
    if classifier == "svm":
        marks = train.y if train.y.ndim == 2 else one_hot_marks(train.y, num_classes)
        rows = Rows(train.x, marks)
        return linear_svm(rows, test_x, cs=cs, folds=folds, max_iters=max_iters, seed=seed)
    folds = min(folds, k)
    c = cs[0] if folds > 1 else 1.0
    if folds > 1 and len(cs) > 1:
        split = StratifiedKFold(folds, shuffle=True, random_state=seed)
        selections = [
            Selection(*(Rows(train.x[part], train.y[part]) for part in parts))
            for parts in split.split(train.x, train.y)
        ]
        top1 = accuracy_by_c(selections, cs, max_iters)
        c = max(top1, key=top1.__getitem__)  # the first of equals, so the smallest
    return _fit_logistic(train, test_x, c, max_iters, num_classes)
