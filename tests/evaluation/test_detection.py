"""Evaluators of detections: invariances of every protocol, and COCO's metrics by pycocotools."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_detections import NAMES, images, rows

from tract_transfer.evaluation import EVALUATORS, PROTOCOLS, VocEvaluator, protocols_of
from tract_transfer.evaluation.detection import coco_metrics

AREA = PROTOCOLS["area"]
every_protocol = pytest.mark.parametrize("protocol", protocols_of("detection"))


def evaluate(made, protocol="voc2007_devkit", names=NAMES):
    evaluator = EVALUATORS.get(protocol)(names)
    evaluator.update([pair[0] for pair in made], [pair[1] for pair in made])
    return evaluator.compute(), evaluator


@every_protocol
def test_perfect_detections_score_one_and_none_score_zero(protocol):
    made = images()
    perfect = [
        ({"boxes": t["boxes"], "labels": t["labels"], "scores": torch.rand(len(t["labels"]))}, t)
        for _, t in made
    ]
    metrics, _ = evaluate(perfect, protocol, NAMES[:3])
    assert set(metrics) >= {"ap50", "ap75", "ap"}
    assert {v for name, v in metrics.items() if name not in ("ar1", "ar10")} == {1.0}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    metrics, _ = evaluate([(empty, t) for _, t in made], protocol)
    assert set(metrics.values()) == {0.0}


@every_protocol
def test_the_order_of_images_and_the_scale_of_boxes_change_nothing(protocol):
    made = images(seed=3)
    assert evaluate(made[::-1], protocol)[0] == evaluate(made, protocol)[0]
    scaled = [(d | {"boxes": d["boxes"] * 4}, t | {"boxes": t["boxes"] * 4}) for d, t in made]
    assert evaluate(scaled)[0] == evaluate(made)[0]


@pytest.mark.parametrize("protocol", ["voc2007_devkit", "area", "coco"])
def test_absent_classes_are_named_and_excluded(protocol):
    made = images()
    metrics, evaluator = evaluate(made, protocol)
    details = evaluator.details()
    assert details["absent_classes"] == ["emu"]
    for key in ("per_class", "per_class_ap", "pr_curves"):
        assert set(details[key]) == {"cat", "dog", "cow"}
    assert all(len(curve) == 101 for curve in details["pr_curves"].values())
    assert metrics["ap50"] == pytest.approx(np.mean(list(details["per_class"].values())))
    assert metrics["ap"] == pytest.approx(np.mean(list(details["per_class_ap"].values())))
    assert 0 < metrics["ap75"] < metrics["ap50"] < 1
    assert metrics == pytest.approx(evaluate(made, protocol, NAMES[:3])[0])
    assert np.isnan(evaluator.result.ap[3]).all()
    assert json.loads(json.dumps(details, allow_nan=False)) == details
    assert f"({protocol})" in details["protocol"]
    assert details["num_detections"] == sum(len(d["scores"]) for d, _ in made)
    metrics, evaluator = evaluate(made, "detectron2")  # where they count as 0
    assert metrics["ap50"] == pytest.approx(sum(evaluator.details()["per_class"].values()) / 4)


def test_a_protocol_can_be_defined_by_the_user():
    made = images()
    evaluator = VocEvaluator(NAMES, replace(AREA, name="mine", iou_strict=True))
    evaluator.update([d for d, _ in made], [t for _, t in made])
    assert evaluator.compute()["ap50"] < evaluate(made, "area")[0]["ap50"]
    assert "(mine)" in evaluator.details()["protocol"]
    assert "IoU > threshold" in evaluator.details()["protocol"]


def test_bfloat16_predictions_are_accepted():
    made = images()
    half = [({k: v.bfloat16() if k != "labels" else v for k, v in d.items()}, t) for d, t in made]
    assert evaluate(half)[0] == evaluate(made)[0]  # small integers and eighths are exact


def test_memory_grows_linearly_with_the_detections():
    made = images(200)
    twice = made + [(d, t | {"image_id": t["image_id"] + 10_000}) for d, t in made]
    peaks = []
    for part in (made, twice):
        tracemalloc.start()
        evaluate(part)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2.2 * peaks[0]


# ------------------------------------------------------------------------------------- COCO

STATS = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip


def pycocotools_stats(detections, objects, num_classes):
    """COCO json in, twelve numbers out; -1 if undefined."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")

    def xywh(rows):
        return np.c_[rows.boxes_xyxy[:, :2], rows.boxes_xyxy[:, 2:] - rows.boxes_xyxy[:, :2]]

    columns = {
        "image_id": objects.image_ids,
        "category_id": objects.labels,
        "bbox": xywh(objects),
        "iscrowd": objects.difficult,
        "area": objects.areas,
    }
    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": i} for i in {*objects.image_ids, *detections.image_ids}],
        "annotations": [
            {"id": i + 1, **{key: values[i].tolist() for key, values in columns.items()}}
            for i in range(len(objects.labels))
        ],
        "categories": [{"id": k} for k in range(num_classes)],
    }
    truth.createIndex()
    results = truth.loadRes(
        np.c_[detections.image_ids, xywh(detections), detections.scores, detections.labels]
    )
    evaluation = cocoeval.COCOeval(truth, results, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(STATS, evaluation.stats.tolist(), strict=True))


# Scaled so that small, medium and large objects occur, or only small ones.
@pytest.mark.parametrize(("seed", "scale"), [(0, 1), (1, 7), (2, 20), (3, 20)])
def test_coco_metrics_are_pycocotools(seed, scale):
    detections, objects = rows(images(60, seed=seed))
    detections = detections._replace(boxes_xyxy=detections.boxes_xyxy * scale)
    masks = np.random.default_rng(seed).uniform(0.5, 1, len(objects.areas))
    objects = objects._replace(
        boxes_xyxy=objects.boxes_xyxy * scale, areas=objects.areas * scale**2 * masks
    )
    expected = pycocotools_stats(detections, objects, 4)
    metrics, result = coco_metrics(detections, objects, NAMES)
    assert metrics == pytest.approx({k: v for k, v in expected.items() if v > -1}, abs=1e-12)
    assert ("ap_large" in metrics) == (scale == 20)
    assert result.ap[:3].mean() == pytest.approx(metrics["ap"])


@pytest.mark.parametrize(("size", "area"), [("small", 1.0), ("large", 1e5)])
def test_the_area_of_the_object_decides_its_size(size, area):
    sized = [(d, t | {"area": torch.full((len(t["labels"]),), area)}) for d, t in images()]
    metrics, _ = evaluate(sized, "coco")
    assert {name for name in metrics if "_" in name} == {f"ap_{size}", f"ar_{size}"}
