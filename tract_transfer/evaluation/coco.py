"""COCO's detection metrics, by faster-coco-eval: pycocotools' numbers, matched in C++."""

# N detections, M ground-truth objects, K classes, T 10 IoU thresholds, R 101 recalls

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tract_transfer.evaluation.matching import Detections, GroundTruth
from tract_transfer.evaluation.voc import count_objects

SENTENCE = (
    "COCO AP (coco), equal to pycocotools': the mean interpolated precision at recalls 0, 0.01, "
    "..., 1, over IoU 0.50:0.05:0.95 and the classes that have an object; a match has IoU >= "
    "threshold, a width is x2 - x1, x2 exclusive; the 100 best detections of an image and class "
    "count; difficult objects are crowds (iscrowd: 1); small, medium and large are areas below "
    "32^2, below 96^2 and from there on; ar is the mean recall at 100 detections"
)
# Where in pycocotools' arrays, whose axes are [IoU, recall, class, area, detections].
_AREAS = {"": 0, "_small": 1, "_medium": 2, "_large": 3}
_MAX_DETECTIONS = {"ar1": 0, "ar10": 1, "ar": 2}


@dataclass(frozen=True, eq=False)
class CocoResult:
    """What pycocotools accumulates; -1 stands where there is no object.

    precision (T, R, K) at all sizes; npos (K,) objects that are no crowd; `metrics` by name, those
    that no object defines left out.
    """

    precision: NDArray[np.float64]
    npos: NDArray[np.int64]
    metrics: dict[str, float]

    @property
    def ap(self) -> NDArray[np.float64]:
        """(K, T), nan for an absent class."""
        ap: NDArray[np.float64] = self.precision.mean(axis=1).T
        return np.where((self.npos > 0)[:, None], ap, np.nan)


def coco_metrics(detections: Detections, ground_truth: GroundTruth, num_classes: int) -> CocoResult:
    """Return COCO's metrics.

    Raises:
        ValueError: a label is not in 0..K-1, or no object counts.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    npos = count_objects(detections, ground_truth, num_classes)
    ids = np.union1d(detections.image_ids, ground_truth.image_ids).tolist()
    truth = COCO(
        {
            "images": [{"id": image_id} for image_id in ids],
            "categories": [{"id": label, "name": str(label)} for label in range(num_classes)],
            "annotations": _annotations(ground_truth),
        }
    )
    boxes = _xywh(detections.boxes_xyxy)
    columns = (detections.image_ids[:, None], boxes, detections.scores[:, None])
    found = np.concatenate([*columns, detections.labels[:, None]], axis=1, dtype=np.float64)
    evaluation = COCOeval_faster(truth, truth.loadRes(found), "bbox", print_function=_silent)
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    of_size = {suffix: precision[:, :, :, area, 2] for suffix, area in _AREAS.items()}
    defined = {
        **{f"ap{suffix}": values for suffix, values in of_size.items()},
        "ap50": of_size[""][0],
        "ap75": of_size[""][5],
        **{name: recall[:, :, 0, count] for name, count in _MAX_DETECTIONS.items()},
        **{f"ar{suffix}": recall[:, :, area, 2] for suffix, area in _AREAS.items() if suffix},
    }
    metrics = {
        name: float(values[values > -1].mean())
        for name, values in defined.items()
        if (values > -1).any()
    }
    return CocoResult(of_size[""], npos, metrics)


def _annotations(ground_truth: GroundTruth) -> list[dict[str, Any]]:
    rows = zip(
        ground_truth.image_ids.tolist(),
        ground_truth.labels.tolist(),
        _xywh(ground_truth.boxes_xyxy).tolist(),
        ground_truth.areas.tolist(),
        ground_truth.difficult.tolist(),
        strict=True,
    )
    return [
        {
            "id": row,  # from 1: pycocotools takes 0 for no match
            "image_id": image_id,
            "category_id": label,
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        for row, (image_id, label, box, area, crowd) in enumerate(rows, 1)
    ]


def _xywh(boxes_xyxy: NDArray[Any]) -> NDArray[np.float64]:
    boxes = boxes_xyxy.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _silent(*_words: object) -> None:
    """Print nothing, in place of the library's progress."""
