"""Probes of frozen features: weighted nearest neighbours and logistic regression."""

# N images (train or test), D features, K classes

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

Features = NDArray[np.float32]
Labels = NDArray[np.int64]

# Similarities held at once by knn_predict; with the indices of the partition about 12 bytes each.
_MAX_SIMILARITIES = 2**24


@torch.inference_mode()
def extract_features(
    model_pooled: Callable[[Tensor], Tensor], batches: Iterable[Any], device: torch.device | str
) -> tuple[Features, Labels, Labels]:
    """Return features (N, D), labels (N,) and sample indices (N,) on the CPU.

    Args:
        model_pooled: images on `device` to features (B, D); its model must be in eval mode.
        batches: each with `images` (B, 3, H, W), `targets` (B,) and `indices` (B,).
        device: where the model stands.

    Raises:
        ValueError: no batch, features that are not (B, D), or not finite.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    indices: list[Tensor] = []
    for batch in batches:
        pooled = model_pooled(batch.images.to(device, non_blocking=True))
        if pooled.ndim != 2:
            raise ValueError(f"Pooled features must be (B, D), got {tuple(pooled.shape)}.")
        features.append(pooled.float().cpu())
        labels.append(torch.as_tensor(batch.targets).cpu().long())
        indices.append(torch.as_tensor(batch.indices).cpu().long())
    if not features:
        raise ValueError("No batch to extract features from. Check that the split has rows.")
    x = torch.cat(features).numpy()
    _check_finite("extracted", x)
    return x, torch.cat(labels).numpy(), torch.cat(indices).numpy()


def knn_predict(
    train_x: Features,
    train_y: Labels,
    test_x: Features,
    k: int,
    temperature: float,
    num_classes: int,
) -> NDArray[np.float64]:
    """Return (N, K) the share of each class in the vote of the `k` nearest training images.

    A neighbour of cosine similarity s votes with weight exp(s / temperature) (Wu et al. 2018,
    as in DINO). Weights are taken relative to the nearest one, so no temperature overflows them.
    A zero feature vector has similarity 0 to everything.

    Raises:
        ValueError: k is not in 1..len(train_x), temperature <= 0, shapes or labels that do not
            fit, or features that are not finite.
    """
    _check_probe(train_x, train_y, test_x, num_classes)
    if not 1 <= k <= len(train_x):
        raise ValueError(
            f"evaluation.knn.k must be in 1..{len(train_x)}, the number of training images; "
            f"got {k}. Lower evaluation.knn.k or give the probe more training images."
        )
    if not temperature > 0:
        raise ValueError(f"The temperature of kNN must be > 0, got {temperature}.")
    train_unit, test_unit = _unit_rows(train_x), _unit_rows(test_x)
    scores = np.empty((len(test_x), num_classes))
    rows = max(1, _MAX_SIMILARITIES // len(train_x))
    for start in range(0, len(test_x), rows):
        similarity = test_unit[start : start + rows] @ train_unit.T
        nearest = np.argpartition(similarity, -k, axis=1)[:, -k:]
        near = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64)
        weights = np.exp((near - near.max(axis=1, keepdims=True)) / temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        cells = np.arange(len(near))[:, None] * num_classes + train_y[nearest]
        votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(near) * num_classes)
        scores[start : start + rows] = votes.reshape(len(near), num_classes)
    return scores


@dataclass(frozen=True, eq=False)
class LogisticResult:
    """What `logistic_regression` found.

    Attributes:
        scores: (N, K) log-probabilities of the test images.
        best_c: the chosen inverse regularisation.
        val_accuracies: C -> top-1 on the part carved from train, ascending in C.
        converged: whether the final fit met its tolerance before `max_iters`.
    """

    scores: NDArray[np.float64]
    best_c: float
    val_accuracies: dict[float, float]
    converged: bool


def logistic_regression(
    train_x: Features,
    train_y: Labels,
    test_x: Features,
    *,
    cs: Sequence[float],
    val_fraction: float,
    seed: int,
    max_iters: int,
    num_classes: int | None = None,
) -> LogisticResult:
    """Fit a multinomial logistic regression on frozen features and score the test images.

    Features are standardised (StandardScaler) by the rows that are fitted, in float64. C is chosen
    on a stratified part of train, the smallest of the best; test is not looked at. Then all of
    train is fitted with it. Each C starts from the solution of the one before (L-BFGS).

    Args:
        train_x: (N, D) features.
        train_y: (N,) labels.
        test_x: (N', D) features.
        cs: candidates for C, the weight of the summed loss against half the squared norm.
        val_fraction: part of train to choose on, in (0, 1).
        seed: which rows that part holds.
        max_iters: limit of L-BFGS for one fit.
        num_classes: K, the columns of the scores; None takes the largest training label + 1.
            A class without training rows ranks below all others, at 1e-38 or less.

    Raises:
        ValueError: fewer than two classes to fit, no C or one <= 0, `val_fraction` that leaves a
            part empty, shapes or labels that do not fit, or features that are not finite.
    """
    if num_classes is None:
        num_classes = int(train_y.max(initial=-1)) + 1
    _check_probe(train_x, train_y, test_x, num_classes)
    if len(cs) == 0 or min(cs) <= 0:
        raise ValueError(f"Logistic regression needs values of C, all > 0; got {list(cs)}.")
    held_out = stratified_part(train_y, val_fraction, seed)
    num_fit_classes = len(np.unique(train_y[~held_out]))
    if num_fit_classes < 2 or not held_out.any():
        raise ValueError(
            f"Logistic regression needs 2 classes to fit and a row to choose C on; {len(train_y)} "
            f"rows split at {val_fraction=} give {num_fit_classes} classes and "
            f"{held_out.sum()} rows. Give the probe more training images or another fraction."
        )
    train, test = train_x.astype(np.float64), test_x.astype(np.float64)
    val_accuracies = _accuracy_by_c(train, train_y, held_out, cs, max_iters)
    best_c = max(val_accuracies, key=lambda c: val_accuracies[c])  # the first, so the smallest
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=max_iters, C=best_c)
    _fit(model, scaler.transform(train), train_y)
    scores = _log_probabilities(model, scaler.transform(test), num_classes)
    return LogisticResult(scores, best_c, val_accuracies, bool(model.n_iter_.max() < max_iters))


def stratified_part(labels: Labels, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Return an (N,) mask of about N x fraction rows, within one row of that share in each class.

    Raises:
        ValueError: `fraction` is not in (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The validation fraction must be in (0, 1), got {fraction}.")
    # Rows in class order, shuffled within a class; then every (1 / fraction)-th of them. This also
    # serves classes of too few rows for a share of their own.
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    steps = np.floor(np.arange(len(labels) + 1) * fraction + rng.random())
    mask = np.zeros(len(labels), np.bool_)
    mask[by_class] = np.diff(steps) > 0
    return mask


def _accuracy_by_c(
    x: NDArray[np.float64],
    y: Labels,
    held_out: NDArray[np.bool_],
    cs: Sequence[float],
    max_iters: int,
) -> dict[float, float]:
    scaler = StandardScaler().fit(x[~held_out])
    fit_x, val_x = scaler.transform(x[~held_out]), scaler.transform(x[held_out])
    model = LogisticRegression(max_iter=max_iters, warm_start=True)
    accuracies: dict[float, float] = {}
    for c in sorted(set(cs)):
        _fit(model.set_params(C=c), fit_x, y[~held_out])
        accuracies[float(c)] = float((model.predict(val_x) == y[held_out]).mean())
    return accuracies


def _fit(model: Any, x: NDArray[np.float64], y: Labels) -> None:
    with warnings.catch_warnings():  # reported as LogisticResult.converged
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)


def _log_probabilities(model: Any, x: NDArray[np.float64], num_classes: int) -> NDArray[np.float64]:
    decision: NDArray[np.float64] = model.decision_function(x)
    if decision.ndim == 1:  # two classes: scikit-learn gives the log-odds of the second
        decision = np.stack([np.zeros_like(decision), decision], axis=1)
    log_p = decision - decision.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    floor = np.minimum(log_p.min(axis=1, keepdims=True), np.log(1e-38)) - 1
    scores = np.repeat(floor, num_classes, axis=1)
    scores[:, model.classes_] = log_p
    return scores


def _unit_rows(x: Features) -> Features:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit: Features = x / np.maximum(norms, np.finfo(np.float32).tiny)
    return unit


def _check_probe(train_x: Features, train_y: Labels, test_x: Features, num_classes: int) -> None:
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"Need features (N, D) of one D: {train_x.shape}, {test_x.shape}.")
    if train_y.shape != train_x.shape[:1] or len(train_y) == 0:
        raise ValueError(f"Need a label a training row: {train_y.shape} for {train_x.shape}.")
    if train_y.min() < 0 or train_y.max() >= num_classes:
        raise ValueError(
            f"Training labels must be in 0..{num_classes - 1}, "
            f"got {train_y.min()}..{train_y.max()}."
        )
    _check_finite("training", train_x)
    _check_finite("test", test_x)


def _check_finite(what: str, x: Features) -> None:
    broken = int((~np.isfinite(x)).any(axis=1).sum())
    if broken:
        raise ValueError(
            f"Features must be finite: {broken} of {len(x)} {what} rows hold nan or inf. "
            "Check the weights of the backbone, or extract in float32."
        )
