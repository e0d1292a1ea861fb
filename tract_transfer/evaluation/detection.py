"""Evaluators of detections: they collect rows and hand them to the metrics (voc.py, coco.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tract_transfer.evaluation.classification import all_rows
from tract_transfer.evaluation.voc import (
    COCO_IOUS,
    PROTOCOLS,
    Detections,
    GroundTruth,
    VocProtocol,
    VocResult,
    box_areas,
    count_objects,
    voc_ap,
)
from tract_transfer.registry import did_you_mean

# --- COCO's detection metrics, by faster-coco-eval: pycocotools' numbers, matched in C++.

COCO_SENTENCE = (
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


Rows = TypeVar("Rows", Detections, GroundTruth)
CURVE_RECALLS = np.arange(101) / 100


class DetectionRows:
    """The detections and objects of all images, once each; memory grows with their number alone."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, Detections, GroundTruth]] = []

    def add(
        self, predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Any]]
    ) -> None:
        """Add images; see `VocEvaluator.update`."""
        if len(predictions) != len(targets):
            raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets.")
        for found, truth in zip(predictions, targets, strict=True):
            image_id = int(truth["image_id"])
            boxes, labels = _numpy(found["boxes"], np.float64), _numpy(found["labels"], np.int64)
            ids = np.full(len(boxes), image_id, np.int64)
            detections = Detections(ids, labels, boxes, _numpy(found["scores"], np.float64))
            boxes, labels = _numpy(truth["boxes"], np.float64), _numpy(truth["labels"], np.int64)
            ids = np.full(len(boxes), image_id, np.int64)
            areas = _numpy(truth["area"], np.float64) if "area" in truth else box_areas(boxes)
            difficult = _numpy(truth["difficult"], np.bool_)
            objects = GroundTruth(ids, labels, boxes, difficult, areas)
            self._rows.append((image_id, detections, objects))

    def joined(self) -> tuple[Detections, GroundTruth, dict[str, int]]:
        """Return the rows of all processes, and how many images and rows these are.

        Raises:
            ValueError: no image, or an image given twice.
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
        counts = {
            "num_images": len(rows),
            "num_detections": len(detections.scores),
            "num_difficult": int(objects.difficult.sum()),
        }
        return detections, objects, counts


class VocEvaluator:
    """VOC's AP over a detection set; `result` holds the arrays of the last `compute`.

    Args:
        protocol: one of PROTOCOLS by name, or one of your own.
    """

    def __init__(
        self, class_names: Sequence[str], protocol: str | VocProtocol = "voc2007_devkit"
    ) -> None:
        if isinstance(protocol, str) and protocol not in PROTOCOLS:
            hint = did_you_mean(protocol, PROTOCOLS)
            raise ValueError(f"{protocol!r} is not a VOC protocol.{hint} known={list(PROTOCOLS)}")
        self.class_names = list(class_names)
        self.protocol = PROTOCOLS[protocol] if isinstance(protocol, str) else protocol
        self.result: VocResult | None = None
        self._rows = DetectionRows()
        self._counts: dict[str, int] = {}

    def update(
        self, predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Any]]
    ) -> None:
        """Add images.

        Args:
            predictions: for each image boxes (n, 4) xyxy, scores (n,), labels (n,).
            targets: for each image boxes (m, 4) xyxy, labels (m,), difficult (m,), image_id, and
                area (m,) where it is not the box's.

        Raises:
            ValueError: as many predictions as targets are needed; nan or inf in boxes or scores.
        """
        self._rows.add(predictions, targets)

    def compute(self) -> dict[str, float]:
        """Return `ap50`, `ap75` and `ap` (the mean over IoU 0.50:0.05:0.95), means over classes.

        Raises:
            ValueError: no image, an image given twice, a label that is no class, or no object.
        """
        detections, objects, self._counts = self._rows.joined()
        self.result = voc_ap(detections, objects, self.class_names, self.protocol, COCO_IOUS)
        mean = self.result.mean_ap(self.protocol.absent_as_zero)
        at = {"ap50": mean[COCO_IOUS.index(0.5)], "ap75": mean[COCO_IOUS.index(0.75)]}
        return {name: float(value) for name, value in (at | {"ap": mean.mean()}).items()}

    def details(self) -> dict[str, Any]:
        """Return the protocol, counts, and by class AP50, AP and the precision-recall curve.

        `per_class`, `per_class_ap` and `pr_curves` leave out the `absent_classes`. A curve is the
        interpolated precision at IoU 0.5 and recalls 0, 0.01, ..., 1.

        Raises:
            RuntimeError: `compute` was not called.
        """
        if self.result is None:
            raise RuntimeError("details() describes what compute() found: call compute() first.")
        curves = {name: curve.at(CURVE_RECALLS) for name, curve in self.result.curves.items()}
        by_class = _by_class(self.class_names, self.result.npos, self.result.ap, curves)
        return {"protocol": self.protocol.sentence, **self._counts, **by_class}


class CocoEvaluator:
    """COCO's metrics over a detection set, difficult objects as crowds; see COCO_SENTENCE."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self.result: CocoResult | None = None
        self._rows = DetectionRows()
        self._counts: dict[str, int] = {}

    def update(
        self, predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Any]]
    ) -> None:
        """Add images; see `VocEvaluator.update`."""
        self._rows.add(predictions, targets)

    def compute(self) -> dict[str, float]:
        """Return ap, ap50, ap75, ar1, ar10, ar, and ap and ar of _small, _medium and _large.

        A size that no object has is left out.

        Raises:
            ValueError: no image, an image given twice, a label that is no class, or no object.
        """
        detections, objects, self._counts = self._rows.joined()
        self.result = coco_metrics(detections, objects, len(self.class_names))
        return dict(self.result.metrics)

    def details(self) -> dict[str, Any]:
        """Return what `VocEvaluator.details` does.

        Raises:
            RuntimeError: `compute` was not called.
        """
        if self.result is None:
            raise RuntimeError("details() describes what compute() found: call compute() first.")
        precision = self.result.precision[0]
        curves = {name: precision[:, k] for k, name in enumerate(self.class_names)}
        by_class = _by_class(self.class_names, self.result.npos, self.result.ap, curves)
        return {"protocol": COCO_SENTENCE, **self._counts, **by_class}


def _by_class(
    class_names: Sequence[str],
    npos: NDArray[np.int64],
    ap: NDArray[np.float64],
    curves: dict[str, NDArray[np.float64]],
) -> dict[str, Any]:
    """Return npos (K,), ap (K, T) and curves (R,) as JSON-able dicts by class name."""
    found = list(zip(class_names, npos.tolist(), ap, strict=True))
    return {
        "class_names": list(class_names),
        "per_class": {name: float(ap[0]) for name, count, ap in found if count},
        "per_class_ap": {name: float(ap.mean()) for name, count, ap in found if count},
        "objects": {name: count for name, count, _ in found},
        "absent_classes": [name for name, count, _ in found if not count],
        "pr_curves": {name: curves[name].round(4).tolist() for name, count, _ in found if count},
    }


def _join(parts: Sequence[Rows]) -> Rows:
    kind = type(parts[0])
    names = [field.name for field in fields(kind)]
    return kind(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _numpy(tensor: Tensor, dtype: type[np.generic]) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16; every narrower float is exact in double.
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy().astype(dtype)
