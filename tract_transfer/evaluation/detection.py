"""PASCAL VOC average precision, for all images, classes and IoU thresholds at once.

Follows VOCevaldet.m and VOCap.m of the VOC development kit. Boxes here end exclusively, so x2 - x1
is the kit's xmax - xmin + 1 and the areas are the kit's without a further pixel.
"""

# N detections, M ground-truth objects, K classes, T IoU thresholds

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tract_transfer.evaluation.gather import all_rows
from tract_transfer.evaluation.matching import (
    Detections,
    Floats,
    GroundTruth,
    best_overlaps,
    ranking,
)
from tract_transfer.registry import did_you_mean

Rows = TypeVar("Rows", Detections, GroundTruth)
Method = Literal["11point", "area"]

# Decimal fractions, not multiples of a float step: an IoU of 11/20 must reach 0.55.
COCO_IOUS = tuple(percent / 100 for percent in range(50, 100, 5))
TRUE_POSITIVE, FALSE_POSITIVE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class VocProtocol:
    """What a VOC average precision depends on.

    Attributes:
        name: what reports call it.
        method: "11point" (VOC 2007) or "area" (VOC 2010 and later).
        iou_strict: a match needs IoU > threshold (py-faster-rcnn, detectron2), not >= (the kit).
        pixel_offset: added to x2 - x1; 0 for exclusive ends, 1 for inclusive ones.
    """

    name: str
    method: Method
    iou_strict: bool = False
    pixel_offset: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("11point", "area") or self.pixel_offset not in (0, 1):
            raise ValueError(f"method is 11point or area, pixel_offset 0 or 1; got {self}.")

    @property
    def sentence(self) -> str:
        """The protocol in one sentence, to print beside the number."""
        method = "11-point" if self.method == "11point" else "area under the curve"
        return (
            f"VOC AP ({self.name}): {method}; a match has IoU {'>' if self.iou_strict else '>='} "
            f"threshold, width = x2 - x1{' + 1' if self.pixel_offset else ''} with x2 "
            f"{'inclusive' if self.pixel_offset else 'exclusive'}; difficult objects are neither "
            "missed nor false; classes without an object are left out of the mean; scores are "
            "ranked unrounded; ap is the mean of this AP over IoU 0.50:0.05:0.95, not COCO's AP."
        )


PROTOCOLS = {
    "voc2007": VocProtocol("voc2007", "11point"),
    "area": VocProtocol("area", "area"),
}


@dataclass(frozen=True, eq=False)
class Curve:
    """Recall, precision and score (each (n,)) after every counted detection, best first."""

    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    scores: Floats


@dataclass(frozen=True, eq=False)
class VocResult:
    """ap (K, T), nan for an absent class; npos (K,) objects not difficult; curves of 1st IoU."""

    ap: NDArray[np.float64]
    npos: NDArray[np.int64]
    curves: dict[str, Curve]

    @property
    def mean_ap(self) -> NDArray[np.float64]:
        """(T,) the mean over the classes present."""
        mean: NDArray[np.float64] = self.ap[self.npos > 0].mean(axis=0)
        return mean


def average_precision(recall: Floats, precision: Floats, method: Method) -> float:
    """Return the area under the curve whose precision at r is the best at any recall >= r.

    Args:
        recall: (n,) non-decreasing, in [0, 1].
        precision: (n,).
        method: "11point" means the interpolated precision at 0, 0.1, ..., 1 (VOC 2007);
            "area" integrates it exactly (VOC 2010 and later).

    Raises:
        ValueError: an unknown method or a recall that decreases.
    """
    if (np.diff(recall) < 0).any():
        raise ValueError("recall must not decrease: rank the detections by score.")
    best = np.maximum.accumulate(precision[::-1])[::-1]
    if method == "11point":
        # i / 10 and tp / npos round alike when equal; 3 * 0.1 would miss a recall of 3/10.
        reached = np.searchsorted(recall, np.arange(11) / 10)
        return float(np.append(best, 0.0)[reached].sum() / 11)
    if method == "area":
        return float((np.diff(recall, prepend=0.0) * best).sum())
    raise ValueError(f"method must be 11point or area, got {method!r}.")


def match(
    detections: Detections,
    ground_truth: GroundTruth,
    protocol: VocProtocol,
    iou_thresholds: Sequence[float],
) -> NDArray[np.int8]:
    """Return (T, N) TRUE_POSITIVE, FALSE_POSITIVE or IGNORED, in the order of `detections`.

    A detection belongs to the object of its image and class that it overlaps most (the first of
    equals), difficult or not. Too little overlap makes it false, enough with a difficult object
    ignored. Of those enough on any other object the best-scored is true, the rest are false. Equal
    scores rank by image id, then by order in the image, so the order of the images is free.
    """
    order = ranking(detections)
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
    return outcome


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
    for what, labels in (("detections", detections.labels), ("objects", ground_truth.labels)):
        if labels.size and (labels.min() < 0 or labels.max() >= K):
            raise ValueError(
                f"Labels of {what} must be in 0..{K - 1}, got {labels.min()}..{labels.max()}. "
                "A detector that counts the background as a class must be shifted."
            )
    npos = np.bincount(ground_truth.labels[~ground_truth.difficult], minlength=K)
    if not npos.any() or not iou_thresholds:
        raise ValueError("AP needs an IoU threshold and an object that is not difficult.")
    order = ranking(detections)
    outcome = match(detections, ground_truth, protocol, iou_thresholds)[:, order]
    labels, scores = detections.labels[order], detections.scores[order]
    starts = np.searchsorted(labels, np.arange(K + 1))
    ap = np.full((K, len(iou_thresholds)), np.nan)
    curves: dict[str, Curve] = {}
    for k in np.flatnonzero(npos).tolist():
        part = slice(starts[k], starts[k + 1])
        for t, row in enumerate(outcome[:, part]):
            counted = row != IGNORED
            hits = np.cumsum(row[counted], dtype=np.int64)
            recall, precision = hits / npos[k], hits / np.arange(1, len(hits) + 1)
            ap[k, t] = average_precision(recall, precision, protocol.method)
            if t == 0:
                curves[class_names[k]] = Curve(recall, precision, scores[part][counted])
    return VocResult(ap, npos, curves)


class VocEvaluator:
    """AP over a detection set; `result` holds the arrays of the last `compute`."""

    def __init__(self, class_names: Sequence[str], protocol: str = "voc2007") -> None:
        if protocol not in PROTOCOLS:
            hint = did_you_mean(protocol, PROTOCOLS)
            raise ValueError(f"{protocol!r} is not a VOC protocol.{hint} known={list(PROTOCOLS)}")
        self.class_names = list(class_names)
        self.protocol = PROTOCOLS[protocol]
        self.result: VocResult | None = None
        self._rows: list[tuple[int, Detections, GroundTruth]] = []
        self._counts = {"num_images": 0, "num_detections": 0, "num_difficult": 0}

    def update(
        self, predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Any]]
    ) -> None:
        """Add images.

        Args:
            predictions: for each image boxes (n, 4) xyxy, scores (n,), labels (n,).
            targets: for each image boxes (m, 4) xyxy, labels (m,), difficult (m,), image_id.

        Raises:
            ValueError: as many predictions as targets are needed; nan or inf in boxes or scores.
        """
        if len(predictions) != len(targets):
            raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets.")
        for found, truth in zip(predictions, targets, strict=True):
            image_id = int(truth["image_id"])
            boxes, labels = _numpy(found["boxes"], np.float64), _numpy(found["labels"], np.int64)
            ids = np.full(len(boxes), image_id, np.int64)
            detections = Detections(ids, labels, boxes, _numpy(found["scores"], np.float64))
            boxes, labels = _numpy(truth["boxes"], np.float64), _numpy(truth["labels"], np.int64)
            ids = np.full(len(boxes), image_id, np.int64)
            objects = GroundTruth(ids, labels, boxes, _numpy(truth["difficult"], np.bool_))
            self._rows.append((image_id, detections, objects))

    def compute(self) -> dict[str, float]:
        """Return `ap50`, `ap75` and `ap` (the mean over IoU 0.50:0.05:0.95), means over classes.

        Raises:
            ValueError: no image, an image given twice, a label that is no class, or no object.
        """
        rows = all_rows(self._rows)
        if not rows:
            raise ValueError("No image was evaluated. Check that the evaluated split has rows.")
        ids, times = np.unique([row[0] for row in rows], return_counts=True)
        if (times > 1).any():
            raise ValueError(
                f"Every image must be evaluated once: {int((times > 1).sum())} came more often, "
                f"as image_id {ids[times > 1][0]}. Use a sampler that does not pad with duplicates."
            )
        detections, objects = _join([row[1] for row in rows]), _join([row[2] for row in rows])
        self.result = voc_ap(detections, objects, self.class_names, self.protocol, COCO_IOUS)
        self._counts = {
            "num_images": len(rows),
            "num_detections": len(detections.scores),
            "num_difficult": int(objects.difficult.sum()),
        }
        mean = self.result.mean_ap
        at = {"ap50": mean[COCO_IOUS.index(0.5)], "ap75": mean[COCO_IOUS.index(0.75)]}
        return {name: float(value) for name, value in (at | {"ap": mean.mean()}).items()}

    def details(self) -> dict[str, Any]:
        """Return the protocol, counts, AP50 (`per_class`) and AP a class, and the absent classes.

        Raises:
            RuntimeError: `compute` was not called.
        """
        if self.result is None:
            raise RuntimeError("details() describes what compute() found: call compute() first.")
        found = list(zip(self.class_names, self.result.npos, self.result.ap, strict=True))
        return {
            "protocol": self.protocol.sentence,
            **self._counts,
            "class_names": self.class_names,
            "per_class": {name: float(ap[0]) for name, npos, ap in found if npos},
            "per_class_ap": {name: float(ap.mean()) for name, npos, ap in found if npos},
            "objects": {name: int(npos) for name, npos, _ in found},
            "absent_classes": [name for name, npos, _ in found if not npos],
        }


def _join(parts: Sequence[Rows]) -> Rows:
    kind = type(parts[0])
    names = [field.name for field in fields(kind)]
    return kind(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _numpy(tensor: Tensor, dtype: type[np.generic]) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16; every narrower float is exact in double.
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy().astype(dtype)
