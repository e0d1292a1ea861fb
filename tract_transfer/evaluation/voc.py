"""PASCAL VOC average precision, for all images, classes and IoU thresholds at once.

Follows VOCevaldet.m and VOCap.m of the VOC development kit; where others depart from it, the
protocol says so.
"""

# N detections, M ground-truth objects, K classes, T IoU thresholds

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tract_transfer.evaluation.matching import (
    Detections,
    Floats,
    GroundTruth,
    best_overlaps,
    ranking,
)
from tract_transfer.evaluation.protocol import METHODS, Method, VocProtocol

# Decimal fractions, not multiples of a float step: an IoU of 11/20 must reach 0.55.
COCO_IOUS = tuple(percent / 100 for percent in range(50, 100, 5))
# i / 10 and tp / npos round alike when equal; 3 * 0.1 misses a recall of 3/10.
_RECALLS = {"11point": np.arange(11) / 10, "11point_float": np.arange(11) * 0.1}
TRUE_POSITIVE, FALSE_POSITIVE, IGNORED = 1, 0, -1


@dataclass(frozen=True, eq=False)
class Curve:
    """Recall and precision (each (n,)) after every counted detection, best score first."""

    recall: NDArray[np.float64]
    precision: NDArray[np.float64]

    def at(self, recalls: Floats) -> NDArray[np.float64]:
        """Return the interpolated precision: the best at any recall >= r, 0 where none is."""
        best = np.maximum.accumulate(self.precision[::-1])[::-1]
        reached: NDArray[np.float64] = np.append(best, 0.0)[np.searchsorted(self.recall, recalls)]
        return reached


@dataclass(frozen=True, eq=False)
class VocResult:
    """ap (K, T), nan for an absent class; npos (K,) objects not difficult; curves of 1st IoU."""

    ap: NDArray[np.float64]
    npos: NDArray[np.int64]
    curves: dict[str, Curve]

    def mean_ap(self, absent_as_zero: bool) -> NDArray[np.float64]:
        """Return (T,) the mean over the classes; absent ones are left out, or count as 0."""
        counted = np.nan_to_num(self.ap) if absent_as_zero else self.ap[self.npos > 0]
        mean: NDArray[np.float64] = counted.mean(axis=0)
        return mean


class Matches(NamedTuple):
    """outcome (T, N) of every detection, in their order; ranks (N,) their indices, best first."""

    outcome: NDArray[np.int8]
    ranks: NDArray[np.intp]


def average_precision(recall: Floats, precision: Floats, method: Method) -> float:
    """Return one number for a curve whose precision at r is the best at any recall >= r.

    Args:
        recall: (n,) non-decreasing, in [0, 1].
        precision: (n,).
        method: "11point" is the mean precision at 0, 0.1, ..., 1 (VOC 2007), "11point_float" that
            at multiples of the float 0.1 (py-faster-rcnn, detectron2); "area" integrates the curve
            exactly (VOC 2010 and later).

    Raises:
        ValueError: an unknown method or a recall that decreases.
    """
    if (np.diff(recall) < 0).any():
        raise ValueError("recall must not decrease: rank the detections by score.")
    curve = Curve(np.asarray(recall, np.float64), np.asarray(precision, np.float64))
    if method == "area":
        return float((np.diff(curve.recall, prepend=0.0) * curve.at(curve.recall)).sum())
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}.")
    return float(curve.at(_RECALLS[method]).sum() / 11)


def match(
    detections: Detections,
    ground_truth: GroundTruth,
    protocol: VocProtocol,
    iou_thresholds: Sequence[float],
) -> Matches:
    """Rank the detections, and say of each TRUE_POSITIVE, FALSE_POSITIVE or IGNORED.

    A detection belongs to the object of its image and class that it overlaps most (the first of
    equals), difficult or not. Too little overlap makes it false, enough with a difficult object
    ignored. Of those enough on any other object the best-scored is true, the rest are false. Equal
    scores rank by image id, then by order in the image, so the order of the images is free.
    """
    detections, ground_truth = _as_read(detections, ground_truth, protocol)
    order = ranking(detections, protocol.stable_ties)
    iou, owner = best_overlaps(detections, ground_truth, protocol.pixel_offset)
    iou, owner = iou[order], owner[order]
    difficult = np.append(ground_truth.difficult, False)[owner]  # owner -1 reads the False
    outcome = np.full((len(iou_thresholds), len(order)), FALSE_POSITIVE, np.int8)
    for row, threshold in zip(outcome, iou_thresholds, strict=True):
        enough = (iou > threshold) if protocol.iou_strict else (iou >= threshold)
        enough &= owner >= 0
        row[order[enough & difficult]] = IGNORED
        claims = np.flatnonzero(enough & ~difficult)
        _, first = np.unique(owner[claims], return_index=True)
        row[order[claims[first]]] = TRUE_POSITIVE
    return Matches(outcome, order)


def _as_read(
    detections: Detections, ground_truth: GroundTruth, protocol: VocProtocol
) -> tuple[Detections, GroundTruth]:
    """Return the rows in the protocol's coordinates, rounded as it rounds."""
    boxes, scores = detections.boxes_xyxy, detections.scores
    if protocol.round_boxes is not None:
        boxes = boxes.astype(np.float32)  # in which 1 is added there, before the text is written
    mins = np.array([protocol.min_offset] * 2 + [0] * 2, boxes.dtype)
    boxes = (boxes + mins).astype(np.float64)
    if protocol.round_boxes is not None:
        boxes = boxes.round(protocol.round_boxes)
    if protocol.round_scores is not None:
        scores = scores.astype(np.float64).round(protocol.round_scores)
    return (
        replace(detections, boxes_xyxy=boxes, scores=scores),
        replace(ground_truth, boxes_xyxy=ground_truth.boxes_xyxy.astype(np.float64) + mins),
    )


def voc_ap(
    detections: Detections,
    ground_truth: GroundTruth,
    class_names: Sequence[str],
    protocol: VocProtocol,
    iou_thresholds: Sequence[float],
) -> VocResult:
    """Return the average precision of every class at every IoU threshold.

    Raises:
        ValueError: a label is not in 0..K-1, no threshold, or no class with an object that is
            not difficult.
    """
    K = len(class_names)
    npos = count_objects(detections, ground_truth, K)
    if not iou_thresholds:
        raise ValueError("AP needs an IoU threshold.")
    outcome, ranks = match(detections, ground_truth, protocol, iou_thresholds)
    outcome, starts = outcome[:, ranks], np.searchsorted(detections.labels[ranks], np.arange(K + 1))
    ap = np.full((K, len(iou_thresholds)), np.nan)
    curves: dict[str, Curve] = {}
    for k in np.flatnonzero(npos).tolist():
        for t, row in enumerate(outcome[:, starts[k] : starts[k + 1]]):
            hits = np.cumsum(row[row != IGNORED], dtype=np.int64)
            curve = Curve(hits / npos[k], hits / np.arange(1, len(hits) + 1))
            ap[k, t] = average_precision(curve.recall, curve.precision, protocol.method)
            if t == 0:
                curves[class_names[k]] = curve
    return VocResult(ap, npos, curves)


def count_objects(
    detections: Detections, ground_truth: GroundTruth, num_classes: int
) -> NDArray[np.int64]:
    """Return (K,) how many objects of each class are not difficult.

    Raises:
        ValueError: a label is not in 0..K-1, or no class has such an object.
    """
    for what, labels in (("detections", detections.labels), ("objects", ground_truth.labels)):
        if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
            raise ValueError(
                f"Labels of {what} must be in 0..{num_classes - 1}, got {labels.min()}.."
                f"{labels.max()}. A detector that counts the background as a class must be shifted."
            )
    counts = np.bincount(ground_truth.labels[~ground_truth.difficult], minlength=num_classes)
    if not counts.any():
        raise ValueError(
            f"AP needs an object that is not difficult, and there is none among "
            f"{len(ground_truth.labels)}. Check the annotations of the evaluated split."
        )
    return counts
