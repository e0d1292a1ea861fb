"""PASCAL VOC average precision, vectorized over images, classes and IoU thresholds.

Follows VOCevaldet.m and VOCap.m of the VOC development kit. Other implementations differ from it in
details; a VocProtocol names them.
"""

# N detections, M objects, K classes, T IoU thresholds, P pairs of boxes

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Method = Literal["11point", "11point_float", "area"]

# Decimal fractions, not multiples of a float step: an IoU of 11/20 must reach 0.55.
COCO_IOUS = tuple(percent / 100 for percent in range(50, 100, 5))
CURVE_RECALLS = np.arange(101) / 100
# i / 10 and tp / npos round alike when equal; 3 * 0.1 misses a recall of 3/10.
_RECALLS = {"11point": np.arange(11) / 10, "11point_float": np.arange(11) * 0.1}
METHODS: dict[Method, str] = {
    "11point": "the mean interpolated precision at recalls 0, 0.1, ..., 1",
    "11point_float": "the mean interpolated precision at 11 multiples of the float 0.1 (a recall "
    "of exactly 0.3, 0.6 or 0.7 falls short of its point)",
    "area": "the area under the interpolated precision-recall curve",
}
TRUE_POSITIVE, FALSE_POSITIVE, IGNORED = 1, 0, -1
_MAX_PAIRS = 2**20  # pairs of boxes compared at once, about 200 bytes each


class Detections(NamedTuple):
    """image_ids (N,) int, labels (N,) in 0..K-1, boxes_xyxy (N, 4) pixels, scores (N,)."""

    image_ids: Ints
    labels: Ints
    boxes_xyxy: Floats
    scores: Floats


class GroundTruth(NamedTuple):
    """image_ids (M,) int, labels (M,) in 0..K-1, boxes_xyxy (M, 4) pixels, difficult (M,) bool.

    areas (M,), in square pixels, are those of the objects: a mask's area can differ from its box's.
    """

    image_ids: Ints
    labels: Ints
    boxes_xyxy: Floats
    difficult: NDArray[np.bool_]
    areas: Floats


@dataclass(frozen=True)
class VocProtocol:
    """How boxes are read, ranked, matched and averaged.

    Input boxes are 0-based with exclusive ends. VOC's own are 1-based with inclusive ends: add 1 to
    x1 and y1 (`min_offset`), keep x2 and y2, and compute a width as x2 - x1 + 1 (`pixel_offset`).
    Up to rounding, both conventions give the same overlaps.

    Attributes:
        name: the name in configs and reports.
        reproduces: which implementation it reproduces; starts the protocol's sentence.
        method: how precision and recall become one number; see METHODS.
        iou_strict: a match needs IoU > threshold instead of >=.
        min_offset: added to x1 and y1 first, 0 or 1.
        pixel_offset: added to x2 - x1 and y2 - y1, 0 or 1.
        round_scores: decimals of the scores in the ranking; None does not round.
        round_boxes: decimals of the detected coordinates, as float32; None does not round.
        stable_ties: rank equal scores by image id, then by order in the image. False uses NumPy's
            default argsort, whose order depends on the machine.
        absent_as_zero: the mean counts a class without an object as 0 instead of excluding it.
    """

    name: str
    reproduces: str
    method: Method
    iou_strict: bool = False
    min_offset: int = 0
    pixel_offset: int = 0
    round_scores: int | None = None
    round_boxes: int | None = None
    stable_ties: bool = True
    absent_as_zero: bool = False

    @property
    def sentence(self) -> str:
        """The protocol in words, reported next to the number."""
        width = "x2 - x1, x2 exclusive"
        if self.pixel_offset:
            width = f"x2 - x1 + 1{' after adding 1 to x1 and y1' if self.min_offset else ''}"
        decimals = {"scores": self.round_scores, "boxes": self.round_boxes}
        rounded = [f"{what} to {10**-n:g}" for what, n in decimals.items() if n is not None]
        rounding = f"rounds {' and '.join(rounded) or 'nothing'}"
        ties = "in image order" if self.stable_ties else "as NumPy's argsort leaves them"
        absent = "count as 0 in" if self.absent_as_zero else "are excluded from"
        return (
            f"VOC AP ({self.name}), {self.reproduces}: {METHODS[self.method]}; a match needs IoU "
            f"{'>' if self.iou_strict else '>='} threshold, a width is {width}; difficult objects "
            f"are neither missed nor false positives; it {rounding} before ranking, equal scores "
            f"rank {ties}; classes without an object {absent} the mean; ap is the mean of this AP "
            "over IoU 0.50:0.05:0.95, not COCO's AP"
        )


_ALL = (
    VocProtocol(
        "voc2007_devkit", "as defined by VOCevaldet.m of the VOC 2007 development kit", "11point"
    ),
    VocProtocol(
        "area", "as defined by VOCevaldet.m of the development kits since VOC 2010", "area"
    ),
    VocProtocol(
        "detectron2", "equal to detectron2's pascal_voc_evaluation for VOC 2007", "11point_float",
        iou_strict=True, min_offset=1, pixel_offset=1, round_scores=3, round_boxes=1,
        stable_ties=False, absent_as_zero=True,
    ),
)  # fmt: skip
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


class ClassResults(NamedTuple):
    """Results of every class.

    ap (K, T), nan for an absent class; npos (K,) the objects that are not difficult; curves
    (K, 101) the interpolated precision at the first IoU threshold and CURVE_RECALLS.
    """

    ap: NDArray[np.float64]
    npos: NDArray[np.int64]
    curves: NDArray[np.float64]


def voc_ap(
    detections: Detections,
    ground_truth: GroundTruth,
    class_names: Sequence[str],
    protocol: VocProtocol,
    iou_thresholds: Sequence[float],
) -> ClassResults:
    """Return the average precision of every class at every IoU threshold."""
    K = len(class_names)
    npos = count_objects(detections, ground_truth, K)
    outcome, order = match(detections, ground_truth, protocol, iou_thresholds)
    starts = np.searchsorted(detections.labels[order], np.arange(K + 1))
    ap = np.full((K, len(iou_thresholds)), np.nan)
    curves = np.zeros((K, len(CURVE_RECALLS)))
    for k in np.flatnonzero(npos).tolist():
        for t, row in enumerate(outcome[:, starts[k] : starts[k + 1]]):
            hits = np.cumsum(row[row != IGNORED], dtype=np.int64)
            recall, precision = hits / npos[k], hits / np.arange(1, len(hits) + 1)
            ap[k, t] = average_precision(recall, precision, protocol.method)
            if t == 0:
                curves[k] = interpolated_precision(recall, precision, CURVE_RECALLS)
    return ClassResults(ap, npos, curves)


def count_objects(detections: Detections, ground_truth: GroundTruth, num_classes: int) -> Ints:
    """Return (K,) the number of objects of each class that are not difficult, and check labels."""
    for kind, labels in (("detections", detections.labels), ("objects", ground_truth.labels)):
        if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
            raise ValueError(
                f"Labels of {kind} must be in 0..{num_classes - 1}, got {labels.min()}.."
                f"{labels.max()}. Shift the labels of a detector that has a background class."
            )
    counts = np.bincount(ground_truth.labels[~ground_truth.difficult], minlength=num_classes)
    if not counts.any():
        raise ValueError(
            f"AP needs an object that is not difficult; all {len(ground_truth.labels)} objects are "
            "difficult. Check the annotations of the evaluated split."
        )
    return counts


def average_precision(recall: Floats, precision: Floats, method: Method) -> float:
    """Return the average of `interpolated_precision` over recall by one of METHODS."""
    if method == "area":
        best = interpolated_precision(recall, precision, recall)
        return float((np.diff(recall, prepend=0.0) * best).sum())
    return float(interpolated_precision(recall, precision, _RECALLS[method]).sum() / 11)


def interpolated_precision(recall: Floats, precision: Floats, at: Floats) -> NDArray[np.float64]:
    """Return the best precision at any recall >= r for each r of `at`, 0 if there is none.

    `recall` (n,), non-decreasing, and `precision` (n,) are the values after each detection that
    counts, best score first.
    """
    best = np.maximum.accumulate(precision[::-1])[::-1]
    reached: NDArray[np.float64] = np.append(best, 0.0)[np.searchsorted(recall, at)]
    return reached


def match(
    detections: Detections,
    ground_truth: GroundTruth,
    protocol: VocProtocol,
    iou_thresholds: Sequence[float],
) -> tuple[NDArray[np.int8], NDArray[np.intp]]:
    """Rank the detections and decide which are TRUE_POSITIVE, FALSE_POSITIVE or IGNORED.

    A detection belongs to the object of its image and class with which it overlaps most (the first
    of equals), difficult or not. If the overlap is too small, it is false; if the object is
    difficult, it is ignored. Of the others of an object, the one with the best score is true.

    Returns:
        outcome (T, N), best first within each label, and order (N,), the detections' indices.
    """
    detections, ground_truth = _convert(detections, ground_truth, protocol)
    order = ranking(detections, protocol.stable_ties)
    iou, owner = best_overlaps(detections, ground_truth, protocol.pixel_offset)
    iou, owner = iou[order], owner[order]
    difficult = np.append(ground_truth.difficult, False)[owner]  # owner -1 reads the False
    outcome = np.full((len(iou_thresholds), len(order)), FALSE_POSITIVE, np.int8)
    for row, threshold in zip(outcome, iou_thresholds, strict=True):
        enough = (iou > threshold) if protocol.iou_strict else (iou >= threshold)
        enough &= owner >= 0
        row[enough & difficult] = IGNORED
        candidates = np.flatnonzero(enough & ~difficult)
        _, first = np.unique(owner[candidates], return_index=True)
        row[candidates[first]] = TRUE_POSITIVE
    return outcome, order


def _convert(
    detections: Detections, ground_truth: GroundTruth, protocol: VocProtocol
) -> tuple[Detections, GroundTruth]:
    """Return the rows in the protocol's coordinates and precision."""
    boxes, scores = detections.boxes_xyxy, detections.scores
    if protocol.round_boxes is not None:
        boxes = boxes.astype(np.float32)  # detectron2 adds 1 in float32 before it writes the text
    offset = np.array([protocol.min_offset] * 2 + [0] * 2, boxes.dtype)
    boxes = (boxes + offset).astype(np.float64)
    if protocol.round_boxes is not None:
        boxes = boxes.round(protocol.round_boxes)
    if protocol.round_scores is not None:
        scores = scores.astype(np.float64).round(protocol.round_scores)
    return (
        detections._replace(boxes_xyxy=boxes, scores=scores),
        ground_truth._replace(boxes_xyxy=ground_truth.boxes_xyxy.astype(np.float64) + offset),
    )


def ranking(detections: Detections, stable: bool) -> NDArray[np.intp]:
    """Return (N,) the order by label, then best score, then image id, then order in the image.

    Without `stable`, NumPy's default argsort decides the order of a label's equal scores.
    """
    ids, labels, scores = detections.image_ids, detections.labels, detections.scores
    if stable:
        return np.lexsort((ids, -scores, labels))
    order = np.lexsort((ids, labels))
    for part in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        part[:] = part[np.argsort(-scores[part])]  # a view: this sorts `order`
    return order


def best_overlaps(
    detections: Detections, ground_truth: GroundTruth, pixel_offset: int
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return (N,) the highest IoU with an object of the same image and class, and its index.

    The first of equals wins; without such an object both are -1.
    """
    N = len(detections.labels)
    ids = np.concatenate([detections.image_ids, ground_truth.image_ids])
    labels = np.concatenate([detections.labels, ground_truth.labels])
    _, image = np.unique(ids, return_inverse=True)  # small numbers, so that keys cannot overflow
    keys = image.reshape(-1) * (int(labels.max(initial=0)) + 1) + labels
    by_key = np.argsort(keys[N:], kind="stable")
    # The objects of detection i's image and class are by_key[first[i] : first[i] + count[i]].
    first = np.searchsorted(keys[N:], keys[:N], side="left", sorter=by_key)
    count = np.searchsorted(keys[N:], keys[:N], side="right", sorter=by_key) - first
    iou, owner = np.full(N, -1.0), np.full(N, -1, np.intp)
    rows = np.flatnonzero(count)
    block_numbers = np.cumsum(count[rows]) // _MAX_PAIRS  # bounds memory
    for block in np.split(rows, np.flatnonzero(np.diff(block_numbers)) + 1):
        repeats = count[block]
        offsets, pairs = np.cumsum(repeats) - repeats, np.arange(repeats.sum())
        objects = by_key[np.repeat(first[block] - offsets, repeats) + pairs]
        pair_iou = paired_iou(
            detections.boxes_xyxy[np.repeat(block, repeats)],
            ground_truth.boxes_xyxy[objects],
            pixel_offset,
        )
        iou[block] = np.maximum.reduceat(pair_iou, offsets)
        is_best = pair_iou == np.repeat(iou[block], repeats)
        winner = np.minimum.reduceat(np.where(is_best, pairs, len(pairs)), offsets)
        owner[block] = objects[winner]
    return iou, owner


def paired_iou(a_xyxy: Floats, b_xyxy: Floats, pixel_offset: int) -> NDArray[np.float64]:
    """Return (P,) the IoU of (P, 4) boxes with (P, 4) boxes, 0 where both are empty."""
    a, b = a_xyxy.astype(np.float64), b_xyxy.astype(np.float64)
    corners = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    common = box_areas(np.hstack(corners), pixel_offset)
    union = box_areas(a, pixel_offset) + box_areas(b, pixel_offset) - common
    return np.divide(common, union, out=np.zeros(len(a)), where=union > 0)


def box_areas(boxes_xyxy: NDArray[np.float64], pixel_offset: int = 0) -> NDArray[np.float64]:
    """Return (P,) the areas of (P, 4) boxes, 0 where a side is negative."""
    sides = np.maximum(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] + pixel_offset, 0)
    area: NDArray[np.float64] = sides[:, 0] * sides[:, 1]
    return area
