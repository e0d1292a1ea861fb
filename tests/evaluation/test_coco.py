"""COCO's metrics are pycocotools', whatever computes them."""

import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest
from random_detections import images, rows

from tract_transfer.evaluation.detection import coco_metrics
from tract_transfer.evaluation.voc import Detections, GroundTruth

STATS = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip


def pycocotools_stats(detections, objects, num_classes):
    """What its users would do: COCO json in, twelve numbers out; -1 where nothing is."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")

    def annotations(rows, more):
        for i, (x1, y1, x2, y2) in enumerate(rows.boxes_xyxy.tolist()):
            yield {
                "id": i + 1,
                "image_id": int(rows.image_ids[i]),
                "category_id": int(rows.labels[i]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                **{key: values[i].item() for key, values in more.items()},
            }

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        ids = {*objects.image_ids.tolist(), *detections.image_ids.tolist()}
        truth.dataset = {
            "images": [{"id": i} for i in ids],
            "annotations": list(
                annotations(objects, {"iscrowd": objects.difficult, "area": objects.areas})
            ),
            "categories": [{"id": k} for k in range(num_classes)],
        }
        truth.createIndex()
        found = truth.loadRes(list(annotations(detections, {"score": detections.scores})))
        evaluation = cocoeval.COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STATS, evaluation.stats.tolist(), strict=True))


@pytest.mark.parametrize(("seed", "scale"), [(0, 1), (1, 7), (2, 20), (3, 20)])
def test_metrics_are_pycocotools(seed, scale):
    """Scaled, so that small, medium and large objects all come, or only small ones."""
    detections, objects = rows(images(60, seed=seed))
    detections = replace(detections, boxes_xyxy=detections.boxes_xyxy * scale)
    masks = np.random.default_rng(seed).uniform(0.5, 1, len(objects.areas))
    objects = replace(
        objects, boxes_xyxy=objects.boxes_xyxy * scale, areas=objects.areas * scale**2 * masks
    )
    expected = pycocotools_stats(detections, objects, 4)
    found = coco_metrics(detections, objects, 4)
    assert found.metrics == pytest.approx({k: v for k, v in expected.items() if v > -1}, abs=1e-12)
    assert ("ap_large" in found.metrics) == (scale == 20)
    assert found.ap[:3].mean() == pytest.approx(found.metrics["ap"])
    assert np.isnan(found.ap[3]).all()


def test_a_crowd_is_neither_missed_nor_false():
    """One crowd over the image: every detection in it leaves the numbers as they are."""
    box = [[0, 0, 10, 10]]
    truth = GroundTruth(
        np.zeros(2, int), np.zeros(2, int), np.array([*box, [50, 0, 100, 50]]),
        np.array([False, True]), np.array([100, 2500]),
    )  # fmt: skip
    inside = [[60 + i, 10, 70 + i, 20] for i in range(5)]
    found = Detections(
        np.zeros(6, int), np.zeros(6, int), np.array([*inside, *box]), np.linspace(1, 0.1, 6)
    )
    assert coco_metrics(found, truth, 1).metrics["ap"] == 1
