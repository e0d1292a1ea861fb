"""PASCAL VOC average precision, for all images, classes and IoU thresholds at once.

Follows VOCevaldet.m and VOCap.m of the VOC development kit; where others depart from it, the
protocol says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

# --- Rows of boxes, and which object each detection overlaps most, without a loop over images.

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

# Pairs expanded at once, at about 200 bytes each.
_MAX_PAIRS = 2**20


@dataclass(frozen=True, eq=False)
class Detections:
    """image_ids (N,) int, labels (N,) in 0..K-1, boxes_xyxy (N, 4) pixels, scores (N,)."""

    image_ids: Ints
    labels: Ints
    boxes_xyxy: Floats
    scores: Floats

    def __post_init__(self) -> None:
        _check_rows("detection", self.image_ids, self.boxes_xyxy, self.labels, self.scores)


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """image_ids (M,) int, labels (M,) in 0..K-1, boxes_xyxy (M, 4) pixels, difficult (M,) bool.

    areas (M,), square pixels, are those of the objects, which a mask may tell better than the box.
    """

    image_ids: Ints
    labels: Ints
    boxes_xyxy: Floats
    difficult: NDArray[np.bool_]
    areas: Floats

    def __post_init__(self) -> None:
        _check_rows("object", self.image_ids, self.boxes_xyxy, self.labels, self.difficult)
        assert self.areas.shape == self.labels.shape


def ranking(detections: Detections, stable: bool = True) -> NDArray[np.intp]:
    """Return (N,) the order by label, then best score, then image id, then order in the image.

    Without `stable`, equal scores of a label stand as NumPy's default argsort leaves them.
    """
    ids, labels, scores = detections.image_ids, detections.labels, detections.scores
    if stable:
        return np.lexsort((ids, -scores, labels))
    order = np.lexsort((ids, labels))
    ends = np.flatnonzero(np.diff(labels[order])) + 1
    for part in np.split(order, ends):  # views: each label is ranked in its place
        part[:] = part[np.argsort(-scores[part])]
    return order


def best_overlaps(
    detections: Detections, ground_truth: GroundTruth, pixel_offset: int
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return (N,) the highest IoU with an object of the same image and class, and its row.

    The first of equals wins. Where there is no such object both are -1. Memory is bounded: pairs
    are expanded a block at a time.
    """
    first, count, by_group = _candidates(detections, ground_truth)
    iou, owner = np.full(len(first), -1.0), np.full(len(first), -1, np.intp)
    rows = np.flatnonzero(count)
    ends = np.append(0, np.cumsum(count[rows]))  # pair numbers, over the rows that have any
    start = 0
    while start < len(rows):
        stop = int(np.searchsorted(ends, ends[start] + _MAX_PAIRS, side="right")) - 1
        stop = max(stop, start + 1)
        block, offsets = rows[start:stop], ends[start:stop] - ends[start]
        repeats, pairs = count[block], np.arange(ends[stop] - ends[start])
        objects = by_group[np.repeat(first[block] - offsets, repeats) + pairs]
        pair_iou = paired_iou(
            detections.boxes_xyxy[np.repeat(block, repeats)],
            ground_truth.boxes_xyxy[objects],
            pixel_offset,
        )
        iou[block] = np.maximum.reduceat(pair_iou, offsets)
        is_best = pair_iou == np.repeat(iou[block], repeats)
        winner = np.minimum.reduceat(np.where(is_best, pairs, len(pairs)), offsets)
        owner[block] = objects[winner]
        start = stop
    return iou, owner


def paired_iou(a_xyxy: Floats, b_xyxy: Floats, pixel_offset: int) -> NDArray[np.float64]:
    """Return (P,) the IoU of (P, 4) boxes with (P, 4) boxes, 0 where both are empty."""
    a, b = a_xyxy.astype(np.float64), b_xyxy.astype(np.float64)
    corners = np.concatenate(
        [np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])], axis=1
    )
    common = box_areas(corners, pixel_offset)
    union = box_areas(a, pixel_offset) + box_areas(b, pixel_offset) - common
    return np.divide(common, union, out=np.zeros(len(a)), where=union > 0)


def box_areas(boxes_xyxy: NDArray[np.float64], pixel_offset: int = 0) -> NDArray[np.float64]:
    """Return (P,) the areas of (P, 4) boxes, 0 where a side is negative."""
    sides = np.maximum(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] + pixel_offset, 0)
    area: NDArray[np.float64] = sides[:, 0] * sides[:, 1]
    return area


def _candidates(
    detections: Detections, ground_truth: GroundTruth
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Return first (N,), count (N,) and by_group (M,).

    Detection i competes for the objects by_group[first[i] : first[i] + count[i]].
    """
    N = len(detections.image_ids)
    pairs = np.stack(
        [
            np.concatenate([detections.image_ids, ground_truth.image_ids]),
            np.concatenate([detections.labels, ground_truth.labels]),
        ]
    )
    _, image = np.unique(pairs[0], return_inverse=True)  # small numbers: a key cannot overflow
    key = image.reshape(-1) * (int(pairs[1].max(initial=0)) + 1) + pairs[1]
    by_group = np.argsort(key[N:], kind="stable")
    groups = key[N:][by_group]
    first = np.searchsorted(groups, key[:N], side="left")
    return first, np.searchsorted(groups, key[:N], side="right") - first, by_group


def _check_rows(
    what: str, image_ids: Ints, boxes: Floats, labels: Ints, last: NDArray[Any]
) -> None:
    n = len(image_ids)
    if boxes.shape != (n, 4) or labels.shape != (n,) or last.shape != (n,):
        raise ValueError(
            f"Every {what} needs a box (4 numbers), a label and a third value: {n} image ids, "
            f"boxes {boxes.shape}, labels {labels.shape}, {last.shape}."
        )
    broken = ~(np.isfinite(boxes).all(axis=1) & np.isfinite(last))
    if broken.any():
        raise ValueError(
            f"Boxes and scores must be finite: {int(broken.sum())} of {n} {what} rows hold nan or "
            f"inf, first in image_id {image_ids[broken][0]}."
        )


# --- What a VOC average precision depends on, and the named protocols.

Method = Literal["11point", "11point_float", "area"]
METHODS: dict[Method, str] = {
    "11point": "the mean interpolated precision at recalls 0, 0.1, ..., 1",
    "11point_float": "the mean interpolated precision at 11 multiples of the float 0.1 (a recall "
    "of exactly 0.3, 0.6 or 0.7 falls short of its point)",
    "area": "the area under the interpolated precision-recall curve",
}


@dataclass(frozen=True)
class VocProtocol:
    """How boxes are read, ranked, matched and averaged.

    Boxes come 0-based with exclusive ends. VOC's own are 1-based with inclusive ends: 1 is added to
    x1 and y1 (`min_offset`), x2 and y2 stay, and a width is x2 - x1 + 1 (`pixel_offset`). Both
    give the same overlaps, but for what rounding does to them.

    Attributes:
        name: what a config and a report call it.
        reproduces: whose number it is, the first half of its sentence.
        method: how precision and recall become one number; see METHODS.
        iou_strict: a match needs IoU > threshold, not >=.
        min_offset: added to x1 and y1 before all else, 0 or 1.
        pixel_offset: added to x2 - x1, 0 or 1.
        round_scores: decimals that scores are rounded to before they are ranked; None leaves them.
        round_boxes: the same of the coordinates of detections, which are then taken as float32.
        stable_ties: equal scores rank by image id, then order in the image; False leaves them as
            NumPy's default argsort does, which differs from machine to machine.
        absent_as_zero: a class without an object that counts has AP 0 in the mean; False leaves it
            out. Either way it is reported as absent.
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

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {list(METHODS)}, got {self.method!r}.")
        if not {self.min_offset, self.pixel_offset} <= {0, 1}:
            raise ValueError(f"min_offset and pixel_offset must be 0 or 1, got {self}.")

    @property
    def sentence(self) -> str:
        """The protocol in words, to print beside the number."""
        width = "x2 - x1, x2 exclusive"
        if self.pixel_offset:
            width = f"x2 - x1 + 1{' after 1 was added to x1 and y1' if self.min_offset else ''}"
        rounding = [
            f"{what} rounded to {decimals} decimal{'s' if decimals > 1 else ''}"
            for what, decimals in (("scores", self.round_scores), ("boxes", self.round_boxes))
            if decimals is not None
        ]
        ties = (
            "in the order of the images" if self.stable_ties else "as NumPy's argsort leaves them"
        )
        absent = "count as 0 in the mean" if self.absent_as_zero else "are left out of the mean"
        return (
            f"VOC AP ({self.name}), {self.reproduces}: {METHODS[self.method]}; a match has IoU "
            f"{'>' if self.iou_strict else '>='} threshold, a width is {width}; difficult objects "
            f"are neither missed nor false; {' and '.join(rounding) or 'nothing rounded'} before "
            f"ranking, equal scores {ties}; classes without an object {absent}; ap is the mean of "
            "this AP over IoU 0.50:0.05:0.95, not COCO's AP"
        )


_KIT = VocProtocol(
    "voc2007_devkit",
    "as VOCevaldet.m of the VOC 2007 development kit defines it",
    "11point",
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _KIT,
        replace(
            _KIT,
            name="area",
            reproduces="as VOCevaldet.m of the kits since VOC 2010 defines it",
            method="area",
        ),
        VocProtocol(
            "detectron2",
            "equal to detectron2's pascal_voc_evaluation for VOC 2007",
            "11point_float",
            iou_strict=True,
            min_offset=1,
            pixel_offset=1,
            round_scores=3,
            round_boxes=1,
            stable_ties=False,
            absent_as_zero=True,
        ),
    )
}


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
