"""Evaluators of detections: they collect rows and hand them to the metrics (voc.py, coco.py)."""

# N detections, M ground-truth objects, K classes, T IoU thresholds, R 101 recalls

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tract_transfer.evaluation import coco
from tract_transfer.evaluation.gather import all_rows
from tract_transfer.evaluation.matching import Detections, GroundTruth, box_areas
from tract_transfer.evaluation.protocol import PROTOCOLS, VocProtocol
from tract_transfer.evaluation.voc import COCO_IOUS, VocResult, voc_ap
from tract_transfer.registry import did_you_mean

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
    """COCO's metrics over a detection set, difficult objects as crowds; see coco.SENTENCE."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self.result: coco.CocoResult | None = None
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
        self.result = coco.coco_metrics(detections, objects, len(self.class_names))
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
        return {"protocol": coco.SENTENCE, **self._counts, **by_class}


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
