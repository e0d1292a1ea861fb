import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_detections import NAMES, images, rows

from tract_transfer.evaluation import EVALUATORS, PROTOCOLS, VocEvaluator
from tract_transfer.evaluation.voc import COCO_IOUS, voc_ap

AREA = PROTOCOLS["area"]
EVERY_PROTOCOL = [name for name, _ in EVALUATORS]


def evaluate(made, protocol="voc2007_devkit", names=NAMES):
    evaluator = EVALUATORS.get(protocol)(names)
    evaluator.update([pair[0] for pair in made], [pair[1] for pair in made])
    return evaluator.compute(), evaluator


@pytest.mark.parametrize("protocol", EVERY_PROTOCOL)
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


@pytest.mark.parametrize("protocol", EVERY_PROTOCOL)
def test_the_order_of_images_changes_nothing(protocol):
    made = images(seed=3)
    assert evaluate(made[::-1], protocol)[0] == evaluate(made, protocol)[0]


def test_the_scale_of_boxes_changes_nothing():
    made = images(seed=3)
    scaled = [(d | {"boxes": d["boxes"] * 4}, t | {"boxes": t["boxes"] * 4}) for d, t in made]
    assert evaluate(scaled)[0] == evaluate(made)[0]


def test_false_positives_below_a_full_recall_leave_the_area():
    def found(truth, noise):
        far = truth["boxes"] + 50
        scores = [torch.full((len(far),), 0.9), torch.full((len(far),), 0.1)]
        return {
            "boxes": torch.cat([truth["boxes"], far][: 1 + noise]),
            "labels": truth["labels"].repeat(1 + noise),
            "scores": torch.cat(scores[: 1 + noise]),
        }

    for noise in (False, True):
        metrics, _ = evaluate([(found(t, noise), t) for _, t in images(seed=4)], "area")
        assert metrics == pytest.approx({"ap50": 1, "ap75": 1, "ap": 1})


@pytest.mark.parametrize("protocol", ["voc2007_devkit", "area", "coco"])
def test_absent_classes_are_named_and_left_out(protocol):
    made = images()
    metrics, evaluator = evaluate(made, protocol)
    details = evaluator.details()
    assert details["absent_classes"] == ["emu"]
    for key in ("per_class", "per_class_ap", "pr_curves"):
        assert set(details[key]) == {"cat", "dog", "cow"}
    assert all(len(curve) == 101 for curve in details["pr_curves"].values())
    assert metrics["ap50"] == pytest.approx(np.mean(list(details["per_class"].values())))
    assert metrics["ap"] == pytest.approx(np.mean(list(details["per_class_ap"].values())))
    assert metrics == pytest.approx(evaluate(made, protocol, NAMES[:3])[0])
    assert np.isnan(evaluator.result.ap[3]).all()
    assert json.loads(json.dumps(details, allow_nan=False)) == details
    assert f"({protocol})" in details["protocol"]
    assert details["num_detections"] == sum(len(d["scores"]) for d, _ in made)


def test_metrics_are_the_means_over_classes_and_thresholds():
    made = images(seed=5)
    metrics, _ = evaluate(made, "area")
    ap = voc_ap(*rows(made), NAMES, AREA, COCO_IOUS).ap[:3]
    assert (metrics["ap50"], metrics["ap75"]) == (ap[:, 0].mean(), ap[:, 5].mean())
    assert metrics["ap"] == pytest.approx(ap.mean())
    assert 0 < metrics["ap75"] < metrics["ap50"] < 1


@pytest.mark.parametrize("protocol", EVERY_PROTOCOL)
def test_what_cannot_be_scored_is_an_error(protocol):
    made = images()
    evaluator = EVALUATORS.get(protocol)(NAMES)
    with pytest.raises(RuntimeError, match="compute"):
        evaluator.details()
    with pytest.raises(ValueError, match="No image"):
        evaluator.compute()
    for key in ("scores", "boxes"):
        found = {k: v.clone() for k, v in made[0][0].items()}
        found[key][0] = float("nan")
        with pytest.raises(ValueError, match=f"image_id {made[0][1]['image_id']}"):
            evaluator.update([found], [made[0][1]])
    with pytest.raises(ValueError, match="2 predictions for 1"):
        evaluator.update([made[0][0]] * 2, [made[0][1]])
    with pytest.raises(ValueError, match=r"once: 1 came more often"):
        evaluate([*made, made[2]], protocol)
    with pytest.raises(ValueError, match=r"0\.\.1, got 0\.\.2.*background"):
        evaluate(made, protocol, NAMES[:2])
    with pytest.raises(ValueError, match="not difficult"):
        hard = [(d, t | {"difficult": torch.ones_like(t["difficult"])}) for d, t in made]
        evaluate(hard, protocol)


def test_a_protocol_is_found_by_name_or_is_ones_own():
    with pytest.raises(ValueError, match="Did you mean 'voc2007_devkit'"):
        VocEvaluator(NAMES, "voc2007")
    made = images()
    evaluator = VocEvaluator(NAMES, replace(AREA, name="mine", iou_strict=True))
    evaluator.update([d for d, _ in made], [t for _, t in made])
    assert evaluator.compute()["ap50"] < evaluate(made, "area")[0]["ap50"]
    assert "(mine)" in evaluator.details()["protocol"]
    assert "IoU > threshold" in evaluator.details()["protocol"]


def test_detectron2s_absent_classes_count_as_zero_and_are_named():
    metrics, evaluator = evaluate(images(), "detectron2")
    details = evaluator.details()
    assert metrics["ap50"] == pytest.approx(sum(details["per_class"].values()) / 4)
    assert details["absent_classes"] == ["emu"]


def test_bfloat16_predictions_are_welcome():
    made = images()
    half = [({k: v.bfloat16() if k != "labels" else v for k, v in d.items()}, t) for d, t in made]
    assert evaluate(half)[0] == evaluate(made)[0]  # small integers and eighths are exact


def test_memory_grows_with_the_detections_and_not_with_the_images():
    made = images(200)
    large = [(d | {"boxes": d["boxes"] * 100}, t | {"boxes": t["boxes"] * 100}) for d, t in made]
    twice = made + [(d, t | {"image_id": t["image_id"] + 10_000}) for d, t in made]
    peaks = []
    for part in (made, large, twice):
        tracemalloc.start()
        evaluate(part)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[2] < 2.2 * peaks[0]


def test_an_objects_own_area_decides_its_size():
    made = images()
    boxes = {"small": 1.0, "large": 1e5}
    for size, area in boxes.items():
        sized = [(d, t | {"area": torch.full((len(t["labels"]),), area)}) for d, t in made]
        metrics, _ = evaluate(sized, "coco")
        assert {name for name in metrics if "_" in name} == {f"ap_{size}", f"ar_{size}"}
