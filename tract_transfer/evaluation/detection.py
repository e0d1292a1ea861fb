"""Evaluators of object detection: VOC's average precision and COCO's metrics."""

# n detections and m objects of an image; N, M, K, T as in voc.py

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tract_transfer.evaluation.classification import all_rows
from tract_transfer.evaluation.voc import (
    COCO_IOUS,
    PROTOCOLS,
    ClassResults,
    Detections,
    GroundTruth,
    VocProtocol,
    box_areas,
    count_objects,
    voc_ap,
)

COCO_SENTENCE = (
    "COCO AP (coco), equal to pycocotools': the mean interpolated precision at recalls 0, 0.01, "
    "..., 1, over IoU 0.50:0.05:0.95 and the classes with an object; a match needs IoU >= "
    "threshold, a width is x2 - x1, x2 exclusive; the 100 best detections of each image and class "
    "count; difficult objects are crowds (iscrowd: 1); areas below 32^2 are small, below 96^2 "
    "medium, others large; ar is the mean recall at 100 detections"
)
Measured = tuple[dict[str, float], ClassResults]
Measure = Callable[[Detections, GroundTruth, Sequence[str]], Measured]
# In the order of pycocotools' stats.
COCO_METRICS = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip


class DetectionEvaluator:
    """Collects boxes and applies the pure function `measure`; `protocol` describes it in words.

    Memory grows with the number of boxes only. `result` holds the arrays of the last `compute`.
    """

    task = "detection"
    metrics = ("ap50", "ap75", "ap")

    def __init__(self, class_names: Sequence[str], measure: Measure, protocol: str) -> None:
        self.class_names = list(class_names)
        self._measure = measure
        self._protocol = protocol
        self.result: ClassResults | None = None
        self._images: list[tuple[int, Detections, GroundTruth]] = []
        self._counts: dict[str, int] = {}

    def update(
        self, predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Any]]
    ) -> None:
        """Add images.

        Args:
            predictions: for each image boxes (n, 4) xyxy, scores (n,), labels (n,).
            targets: for each image boxes (m, 4) xyxy, labels (m,), difficult (m,), image_id, and
                optionally area (m,), which defaults to the box's.
        """
        if len(predictions) != len(targets):
            raise ValueError(f"Got {len(predictions)} predictions for {len(targets)} targets.")
        for prediction, target in zip(predictions, targets, strict=True):
            image_id = int(target["image_id"])
            detections = Detections(*_columns("detection", image_id, prediction, "scores"))
            ids, labels, boxes, difficult = _columns("object", image_id, target, "difficult")
            areas = _numpy(target["area"]) if "area" in target else box_areas(boxes)
            objects = GroundTruth(ids, labels, boxes, difficult.astype(bool), areas)
            self._images.append((image_id, detections, objects))

    def compute(self) -> dict[str, float]:
        """Return the metrics over the images of all processes."""
        images = all_rows(self._images)
        if not images:
            raise ValueError("No image was evaluated. Check that the evaluated split has rows.")
        ids, times = np.unique([image_id for image_id, _, _ in images], return_counts=True)
        if (times > 1).any():
            raise ValueError(
                f"Each image must be evaluated once: {int((times > 1).sum())} were repeated, first "
                f"image_id {ids[times > 1][0]}. Use a sampler that does not pad with duplicates."
            )
        _, of_images, objects_of_images = zip(*images, strict=True)
        detections = Detections(*map(np.concatenate, zip(*of_images, strict=True)))
        objects = GroundTruth(*map(np.concatenate, zip(*objects_of_images, strict=True)))
        self._counts = {
            "num_images": len(images),
            "num_detections": len(detections.scores),
            "num_difficult": int(objects.difficult.sum()),
        }
        metrics, self.result = self._measure(detections, objects, self.class_names)
        return metrics

    def details(self) -> dict[str, Any]:
        """Return the protocol, counts, and by class AP50, AP and the precision-recall curve.

        `per_class`, `per_class_ap` and `pr_curves` exclude the `absent_classes`. A curve is the
        interpolated precision at IoU 0.5 and recalls 0, 0.01, ..., 1.
        """
        assert self.result is not None, "call compute() first"
        objects = dict(zip(self.class_names, self.result.npos.tolist(), strict=True))
        of_classes = zip(self.class_names, self.result.ap, self.result.curves, strict=True)
        present = [(name, ap, curve) for name, ap, curve in of_classes if objects[name]]
        return {
            "protocol": self._protocol,
            **self._counts,
            "class_names": self.class_names,
            "per_class": {name: float(ap[0]) for name, ap, _ in present},
            "per_class_ap": {name: float(ap.mean()) for name, ap, _ in present},
            "objects": objects,
            "absent_classes": [name for name, count in objects.items() if not count],
            "pr_curves": {name: curve.round(4).tolist() for name, _, curve in present},
        }


class VocEvaluator(DetectionEvaluator):
    """Computes `voc_metrics`; `protocol` is a name in PROTOCOLS or your own VocProtocol."""

    def __init__(
        self, class_names: Sequence[str], protocol: str | VocProtocol = "voc2007_devkit"
    ) -> None:
        protocol = PROTOCOLS[protocol] if isinstance(protocol, str) else protocol
        super().__init__(class_names, partial(voc_metrics, protocol=protocol), protocol.sentence)


class CocoEvaluator(DetectionEvaluator):
    """Computes `coco_metrics`, with difficult objects as crowds; see COCO_SENTENCE."""

    def __init__(self, class_names: Sequence[str]) -> None:
        super().__init__(class_names, coco_metrics, COCO_SENTENCE)


def voc_metrics(
    detections: Detections,
    ground_truth: GroundTruth,
    class_names: Sequence[str],
    protocol: VocProtocol,
) -> Measured:
    """Return `ap50`, `ap75` and `ap` (mean over IoU 0.50:0.05:0.95), means over classes."""
    result = voc_ap(detections, ground_truth, class_names, protocol, COCO_IOUS)
    as_zero = protocol.absent_as_zero
    mean = (np.nan_to_num(result.ap) if as_zero else result.ap[result.npos > 0]).mean(axis=0)
    ap50, ap75 = mean[COCO_IOUS.index(0.5)], mean[COCO_IOUS.index(0.75)]
    return {"ap50": float(ap50), "ap75": float(ap75), "ap": float(mean.mean())}, result


def coco_metrics(
    detections: Detections, ground_truth: GroundTruth, class_names: Sequence[str]
) -> Measured:
    """Return pycocotools' numbers, computed in C++ by faster-coco-eval.

    These are the COCO_METRICS; those of a size need an object of that size.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    npos = count_objects(detections, ground_truth, len(class_names))
    image_ids = np.union1d(detections.image_ids, ground_truth.image_ids).tolist()
    categories = [{"id": k, "name": name} for k, name in enumerate(class_names)]
    images, annotations = [{"id": i} for i in image_ids], _coco_annotations(ground_truth)
    truth = COCO({"images": images, "categories": categories, "annotations": annotations})
    boxes_xywh = _xywh(detections.boxes_xyxy)
    rows = np.c_[detections.image_ids, boxes_xywh, detections.scores, detections.labels]
    results = truth.loadRes(rows)
    evaluation = COCOeval_faster(truth, results, "bbox", print_function=lambda *_: None)
    evaluation.run()
    stats = zip(COCO_METRICS, evaluation.stats.tolist(), strict=True)
    metrics = {name: value for name, value in stats if value > -1}  # -1: no object of that size
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # of all sizes, 100 detections
    ap = np.where((npos > 0)[:, None], precision.mean(axis=1).T, np.nan)
    return metrics, ClassResults(ap, npos, precision[0].T)


def _coco_annotations(ground_truth: GroundTruth) -> list[dict[str, Any]]:
    columns = {
        "image_id": ground_truth.image_ids,
        "category_id": ground_truth.labels,
        "bbox": _xywh(ground_truth.boxes_xyxy),
        "area": ground_truth.areas,
        "iscrowd": ground_truth.difficult.astype(int),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    # Ids start from 1: pycocotools takes 0 for no match.
    return [{"id": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows, 1)]


def _xywh(boxes_xyxy: NDArray[Any]) -> NDArray[np.float64]:
    boxes = boxes_xyxy.astype(np.float64)
    return np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])


def _columns(
    kind: str, image_id: int, rows: dict[str, Any], last: str
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return image ids, labels, boxes and the column `last` of an image's rows, checked."""
    boxes, labels, values = _numpy(rows["boxes"]), _numpy(rows["labels"]), _numpy(rows[last])
    n = len(boxes)
    if boxes.shape != (n, 4) or labels.shape != (n,) or values.shape != (n,):
        raise ValueError(
            f"image_id {image_id}: each {kind} needs 4 box coordinates, a label and a value of "
            f"{last}; got shapes {boxes.shape}, {labels.shape} and {values.shape}."
        )
    invalid = int((~(np.isfinite(boxes).all(axis=1) & np.isfinite(values))).sum())
    if invalid:
        raise ValueError(
            f"Boxes and scores must be finite: {invalid} of {n} {kind} rows of image_id {image_id} "
            "contain nan or inf."
        )
    return np.full(n, image_id, np.int64), labels.astype(np.int64), boxes, values


def _numpy(tensor: Tensor) -> NDArray[np.float64]:
    # NumPy has no bfloat16; every narrower float and every label is exact in double.
    return tensor.detach().cpu().double().numpy()
