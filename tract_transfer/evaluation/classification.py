"""Accuracy and loss of class scores.

Equal logits rank by class index, lowest first, as `argmax` does. So top-1 is the trace of the
confusion matrix, and a model of constant output scores the share of class 0, not 100 %.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from tract_transfer.evaluation.probes import Labels, Scores
from tract_transfer.evaluation.voc import Method, average_precision

# --- Join what the processes of a group have collected.

Row = TypeVar("Row")


def all_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of all processes in rank order, the same list on each of them.

    Without a process group these are `rows` themselves. A collective: every process must call it,
    also one without rows. Rows are pickled, so keep arrays in them on the CPU.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return list(rows)
    gathered: list[list[Row]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(rows))
    return [row for part in gathered for row in part]


Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


def label_ranks(logits: Floats, labels: Ints) -> NDArray[np.int64]:
    """Return (N,) how many classes rank before the true one: 0 is a top-1 hit.

    Args:
        logits: (N, K).
        labels: (N,) in 0..K-1.

    Raises:
        ValueError: a shape or label does not fit, or a logit is not finite.
    """
    _check(logits, labels)
    true = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    ranks: NDArray[np.int64] = ((logits > true) | ((logits == true) & earlier)).sum(axis=1)
    return ranks


def cross_entropy(logits: Floats, labels: Ints) -> NDArray[np.float64]:
    """Return (N,) the negative log-likelihood, in nats, of each label.

    Raises:
        ValueError: as `label_ranks`.
    """
    _check(logits, labels)
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    true = np.take_along_axis(shifted, labels[:, None], axis=1)[:, 0]
    losses: NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=1)) - true
    return losses


def confusion_matrix(predicted: Ints, labels: Ints, num_classes: int) -> NDArray[np.int64]:
    """Return (K, K) counts: row = true class, column = predicted class.

    Raises:
        ValueError: the lengths differ, or a class is not in 0..K-1.
    """
    if predicted.shape != labels.shape or labels.ndim != 1:
        raise ValueError(f"Need two (N,) arrays, got {predicted.shape} and {labels.shape}.")
    _check_classes("label", labels, num_classes)
    _check_classes("prediction", predicted, num_classes)
    cells = labels.astype(np.int64) * num_classes + predicted
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class_accuracy(confusion: Ints) -> NDArray[np.float64]:
    """Return (K,) the accuracy (recall) of each true class, nan where it has no image."""
    images = confusion.sum(axis=1)
    accuracy = np.full(len(images), np.nan)
    np.divide(np.diagonal(confusion), images, out=accuracy, where=images > 0)
    return accuracy


def mean_per_class_accuracy(confusion: Ints) -> float:
    """Return the mean accuracy of the classes that have an image.

    Raises:
        ValueError: no class has one.
    """
    if confusion.sum() == 0:
        raise ValueError("The confusion matrix is empty: no image was evaluated.")
    return float(np.nanmean(per_class_accuracy(confusion)))


class ClassificationEvaluator:
    """Top-1, top-5, mean per-class accuracy and cross-entropy.

    Counts are kept, not logits: memory does not grow with the number of images.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        num_classes = len(self.class_names)
        self._confusion = np.zeros((num_classes, num_classes), np.int64)
        self._top5_hits = 0
        self._loss_sum = 0.0
        self._result: NDArray[np.int64] | None = None

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            predictions: (B, K) logits.
            targets: (B,) labels in 0..K-1.

        Raises:
            ValueError: a shape or label does not fit, or a logit is not finite.
        """
        num_classes = len(self.class_names)
        logits = predictions.detach().cpu().double().numpy()
        labels = targets.detach().cpu().numpy()
        if logits.ndim != 2 or logits.shape[1] != num_classes:
            raise ValueError(f"Logits must be (B, {num_classes}), one a class; got {logits.shape}.")
        ranks = label_ranks(logits, labels)
        self._confusion += confusion_matrix(logits.argmax(axis=1), labels, num_classes)
        self._top5_hits += int((ranks < 5).sum())
        self._loss_sum += float(cross_entropy(logits, labels).sum())

    def compute(self) -> dict[str, float]:
        """Return `top1`, `mean_per_class`, `loss` (nats) and, with more than 5 classes, `top5`.

        Raises:
            ValueError: no process was given an image.
        """
        rows = all_rows([(self._confusion, self._top5_hits, self._loss_sum)])
        confusion: NDArray[np.int64] = np.sum([row[0] for row in rows], axis=0)
        images = int(confusion.sum())
        if images == 0:
            raise ValueError("No image was evaluated. Check that the evaluated split has rows.")
        self._result = confusion
        metrics = {"top1": float(np.trace(confusion)) / images}
        if len(self.class_names) > 5:
            metrics["top5"] = sum(row[1] for row in rows) / images
        metrics["mean_per_class"] = mean_per_class_accuracy(confusion)
        metrics["loss"] = sum(row[2] for row in rows) / images
        return metrics

    def details(self) -> dict[str, Any]:
        """Return class names, counts, accuracy a class (None where absent) and the protocol.

        Raises:
            RuntimeError: `compute` was not called.
        """
        if self._result is None:
            raise RuntimeError("details() describes what compute() found: call compute() first.")
        accuracy = per_class_accuracy(self._result)
        return {
            "protocol": "One prediction an image; equal logits rank by class index, lowest first; "
            "mean_per_class is over the classes that have images.",
            "num_images": int(self._result.sum()),
            "class_names": self.class_names,
            "per_class": {
                name: None if np.isnan(value) else float(value)
                for name, value in zip(self.class_names, accuracy, strict=True)
            },
            "confusion_matrix": self._result.tolist(),
        }


def _check(logits: Floats, labels: Ints) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"Need logits (N, K) and labels (N,): {logits.shape}, {labels.shape}.")
    broken = int((~np.isfinite(logits)).sum())
    if broken:
        raise ValueError(
            f"Logits must be finite: {broken} of {logits.size} are nan or inf. "
            "Look for a diverged training or an overflow in half precision."
        )
    _check_classes("label", labels, logits.shape[1])


def _check_classes(what: str, classes: Ints, num_classes: int) -> None:
    if classes.size and (classes.min() < 0 or classes.max() >= num_classes):
        raise ValueError(
            f"Every {what} must be in 0..{num_classes - 1}, "
            f"got {classes.min()}..{classes.max()}. Check the class names of the data set."
        )


# --- Average precision of images that have several labels, by PASCAL VOC's classification rule.

_METHODS: tuple[Method, ...] = ("11point", "area")


def class_average_precision(scores: Scores, marks: Labels, method: Method) -> NDArray[np.float64]:
    """Return (K,) the average precision of each class, nan for one without positives.

    Args:
        scores: (N, K), larger for what is likelier there; of equal ones the earlier image leads.
        marks: (N, K), 1, -1, or 0 for images that the class leaves out.
        method: `11point` (VOC 2007) or `area` (VOC 2010 and later).

    Raises:
        ValueError: shapes that do not fit, or scores that are not finite.
    """
    if scores.shape != marks.shape or scores.ndim != 2:
        raise ValueError(f"Need scores and marks (N, K): {scores.shape}, {marks.shape}.")
    if not np.isfinite(scores).all():
        raise ValueError("Scores must be finite. Check the features of the probe.")
    found = np.full(scores.shape[1], np.nan)
    for k in range(scores.shape[1]):
        own = marks[:, k] != 0
        order = np.argsort(-scores[own, k], kind="stable")
        positive = marks[own, k][order] == 1
        if positive.any():
            hits = positive.cumsum()
            precision = hits / np.arange(1, len(hits) + 1)
            found[k] = average_precision(hits / hits[-1], precision, method)
    return found


def multilabel_metrics(
    scores: Scores, marks: Labels, class_names: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return `map_11point` and `map_area`, and what stands behind them by class.

    Raises:
        ValueError: as `class_average_precision`, or no class has a positive.
    """
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {
        "protocol": "Average precision of ranked images, a class at a time, by 11 recalls (VOC "
        "2007) and by area (VOC 2010); images with difficult objects alone of a class are left out "
        "of its ranking; the mean is over classes that have a positive.",
        "num_images": len(marks),
        "class_names": list(class_names),
    }
    for method in _METHODS:
        precision = class_average_precision(scores, marks, method)
        if np.isnan(precision).all():
            raise ValueError("No class has a positive to rank. Check data.test.")
        metrics[f"map_{method}"] = float(np.nanmean(precision))
        details[f"ap_{method}"] = {
            name: None if np.isnan(value) else float(value)
            for name, value in zip(class_names, precision, strict=True)
        }
    return metrics, details
