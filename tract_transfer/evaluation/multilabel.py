"""Average precision of images that have several labels, by PASCAL VOC's classification rule."""

# N images, K classes

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tract_transfer.evaluation.probes import Labels, Scores
from tract_transfer.evaluation.protocol import Method
from tract_transfer.evaluation.voc import average_precision

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
