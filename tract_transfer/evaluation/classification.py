"""Metrics of image classification, with one label per image or several.

Equal logits rank by class index, lowest first, as in `argmax`. So top-1 is the trace of the
confusion matrix, and a model with constant output scores the share of class 0, not 100 %.
"""

# N images, B of a batch, K classes

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor

from tract_transfer.evaluation.voc import Method, average_precision

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Row = TypeVar("Row")


def check_metric(metric: str, num_classes: int) -> None:
    """Raise ValueError if `metric` (`top1`, `logistic_top5`, ...) is not defined for K classes."""
    if metric.endswith("top5") and num_classes <= 5:
        raise ValueError(
            f"{metric} needs more than 5 classes, and there are {num_classes}. Use "
            f"{metric.removesuffix('5')}1."
        )


class ClassificationEvaluator:
    """Top-1, top-5, mean per-class accuracy and cross-entropy.

    It keeps counts, not logits: memory does not grow with the number of images.
    """

    task = "classification"
    metrics = ("top1", "top5", "mean_per_class")  # top5: of more than 5 classes, see check_metric

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self._confusion = np.zeros((len(self.class_names),) * 2, np.int64)
        self._top5_hits = 0
        self._loss_sum = 0.0
        self._result: NDArray[np.int64] | None = None

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch of finite logits (B, K) and labels (B,) in 0..K-1."""
        num_classes = len(self.class_names)
        logits = predictions.detach().cpu().double().numpy()
        labels = targets.detach().cpu().numpy()
        _check_batch(logits, labels, num_classes)
        self._confusion += confusion_matrix(logits.argmax(axis=1), labels, num_classes)
        self._top5_hits += int((label_ranks(logits, labels) < 5).sum())
        self._loss_sum += float(cross_entropy(logits, labels).sum())

    def compute(self) -> dict[str, float]:
        """Return `top1`, `mean_per_class`, `loss` (nats) and, with more than 5 classes, `top5`."""
        rows = all_rows([(self._confusion, self._top5_hits, self._loss_sum)])
        confusions, top5_hits, loss_sums = zip(*rows, strict=True)
        confusion: NDArray[np.int64] = np.sum(confusions, axis=0)
        num_images = int(confusion.sum())
        if num_images == 0:
            raise ValueError("No image was evaluated. Check that the evaluated split has rows.")
        self._result = confusion
        metrics = {"top1": float(np.trace(confusion)) / num_images}
        if len(self.class_names) > 5:
            metrics["top5"] = sum(top5_hits) / num_images
        metrics["mean_per_class"] = float(np.nanmean(per_class_accuracy(confusion)))
        metrics["loss"] = sum(loss_sums) / num_images
        return metrics

    def details(self) -> dict[str, Any]:
        """Return class names, counts, per-class accuracy (None if absent) and the protocol."""
        assert self._result is not None, "call compute() first"
        return {
            "protocol": "One prediction per image; equal logits rank by class index, lowest first; "
            "mean_per_class averages over the classes that have images.",
            "num_images": int(self._result.sum()),
            "class_names": self.class_names,
            "per_class": _by_class(self.class_names, per_class_accuracy(self._result)),
            "confusion_matrix": self._result.tolist(),
        }


def all_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of all processes in rank order, the same list on each of them.

    Without a process group these are `rows`. A collective: every process must call it, even one
    without rows. Rows are pickled, so keep their arrays on the CPU.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return list(rows)
    gathered: list[list[Row]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(rows))
    return [row for part in gathered for row in part]


def _check_batch(logits: Floats, labels: Ints, num_classes: int) -> None:
    if logits.ndim != 2 or logits.shape[1] != num_classes or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"Need logits (B, {num_classes}) and labels (B,), got {logits.shape}, {labels.shape}."
        )
    invalid = int((~np.isfinite(logits)).sum())
    if invalid:
        raise ValueError(
            f"Logits must be finite: {invalid} of {logits.size} are nan or inf. Check for diverged "
            "training or an overflow in half precision."
        )
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"Labels must be in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}. Check "
            "the class names of the data set."
        )


def label_ranks(logits: Floats, labels: Ints) -> NDArray[np.int64]:
    """Return (N,) the number of classes that rank before the true one; logits (N, K), finite."""
    true = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    ranks: NDArray[np.int64] = ((logits > true) | ((logits == true) & earlier)).sum(axis=1)
    return ranks


def cross_entropy(logits: Floats, labels: Ints) -> NDArray[np.float64]:
    """Return (N,) the negative log-likelihood in nats of each label; logits (N, K), finite."""
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    losses: NDArray[np.float64] = -np.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return losses


def confusion_matrix(predicted: Ints, labels: Ints, num_classes: int) -> NDArray[np.int64]:
    """Return (K, K) counts: row = true class, column = predicted class."""
    cells = labels.astype(np.int64) * num_classes + predicted
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class_accuracy(confusion: Ints) -> NDArray[np.float64]:
    """Return (K,) the accuracy (recall) of each true class, nan where it has no image."""
    with np.errstate(invalid="ignore"):
        accuracy: NDArray[np.float64] = np.diagonal(confusion) / confusion.sum(axis=1)
    return accuracy


def multilabel_metrics(
    scores: Floats, marks: Ints, class_names: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return `map_11point` and `map_area`, and details; arguments as `class_average_precision`."""
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {
        "protocol": "Average precision of images ranked by score, for each class, at 11 recalls "
        "(VOC 2007) and by area (VOC 2010); images in which all objects of a class are difficult "
        "are excluded from its ranking; the mean is over classes with a positive.",
        "num_images": len(marks),
        "class_names": list(class_names),
    }
    methods: tuple[Method, ...] = ("11point", "area")
    for method in methods:
        precision = class_average_precision(scores, marks, method)
        if np.isnan(precision).all():
            raise ValueError("No class has a positive image to rank. Check data.test.")
        metrics[f"map_{method}"] = float(np.nanmean(precision))
        details[f"ap_{method}"] = _by_class(class_names, precision)
    return metrics, details


def class_average_precision(scores: Floats, marks: Ints, method: Method) -> NDArray[np.float64]:
    """Return (K,) the average precision of each class, nan for one without positives.

    Args:
        scores: (N, K), finite, larger for more likely classes. Equal scores rank in image order.
        marks: (N, K), 1 for positives, -1 for negatives, 0 for images the class excludes.
    """
    result = np.full(scores.shape[1], np.nan)
    for k in range(scores.shape[1]):
        counted = marks[:, k] != 0
        order = np.argsort(-scores[counted, k], kind="stable")
        positive = marks[counted, k][order] == 1
        if positive.any():
            hits = positive.cumsum()
            precision = hits / np.arange(1, len(hits) + 1)
            result[k] = average_precision(hits / hits[-1], precision, method)
    return result


def _by_class(class_names: Sequence[str], values: Floats) -> dict[str, float | None]:
    return {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(class_names, values, strict=True)
    }
