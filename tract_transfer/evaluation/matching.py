"""Rows of boxes, and which object each detection overlaps most, without a loop over images."""

# N detections, M ground-truth objects, P pairs of a detection and an object of its image and class

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
