import json

import numpy as np
import pytest
import torch

from tract_transfer.evaluation import EVALUATORS, matching
from tract_transfer.evaluation.detection import (
    COCO_IOUS,
    FALSE_POSITIVE,
    IGNORED,
    PROTOCOLS,
    TRUE_POSITIVE,
    Detections,
    GroundTruth,
    VocEvaluator,
    VocProtocol,
    average_precision,
    match,
    voc_ap,
)

NAMES = ["cat", "dog", "cow", "emu"]
VOC2007, AREA = PROTOCOLS["voc2007"], PROTOCOLS["area"]
EVERY_PROTOCOL = [
    VocProtocol("x", method, strict, offset)
    for method in ("11point", "area")
    for strict in (False, True)
    for offset in (0, 1)
]


def images(n=25, seed=0, num_classes=3):
    """Small integer boxes and coarse scores: equal IoUs, exact thresholds and ties abound."""
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner = rng.integers(0, 12, (count, 2))
        return np.concatenate([corner, corner + rng.integers(1, 9, (count, 2))], 1)

    made = []
    for image_id in rng.permutation(n) * 7:
        objects, found = rng.integers(0, 5), rng.integers(0, 14)
        truth, truth_labels = boxes(objects), rng.integers(0, num_classes, objects)
        guess, labels = boxes(found), rng.integers(0, num_classes, found)
        if objects:
            of = rng.integers(0, objects, found)
            near = rng.random(found) < 0.7
            shift = rng.integers(-1, 2, (found, 4)) * (rng.random((found, 1)) < 0.6)
            guess = np.where(near[:, None], truth[of] + shift, guess)
            labels = np.where(near, truth_labels[of], labels)
            guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        made.append(
            (
                {
                    "boxes": torch.tensor(guess).float(),
                    "scores": torch.tensor(rng.integers(0, 8, found) / 8).float(),
                    "labels": torch.tensor(labels),
                },
                {
                    "boxes": torch.tensor(truth).float(),
                    "labels": torch.tensor(truth_labels),
                    "difficult": torch.tensor(rng.random(objects) < 0.25),
                    "image_id": int(image_id),
                },
            )
        )
    return made


def rows(made):
    def column(side, key):
        return np.concatenate([pair[side][key].numpy() for pair in made])

    def ids(side):
        return np.concatenate([np.full(len(p[side]["boxes"]), p[1]["image_id"]) for p in made])

    return (
        Detections(ids(0), column(0, "labels"), column(0, "boxes"), column(0, "scores")),
        GroundTruth(ids(1), column(1, "labels"), column(1, "boxes"), column(1, "difficult")),
    )


def evaluate(made, protocol="voc2007", names=NAMES):
    evaluator = VocEvaluator(names, protocol)
    evaluator.update([pair[0] for pair in made], [pair[1] for pair in made])
    return evaluator.compute(), evaluator


def loop_ap(made, label, protocol, threshold):
    """VOC's definition, one box at a time: (AP or None, npos, outcomes best score first)."""
    ranked, npos, taken, outcomes = [], 0, set(), []
    for found, truth in made:
        npos += sum(
            int(c) == label and not d
            for c, d in zip(truth["labels"], truth["difficult"], strict=True)
        )
        for i, score in enumerate(found["scores"].tolist()):
            if found["labels"][i] == label:
                ranked.append((-score, truth["image_id"], i, found["boxes"][i].tolist(), truth))
    for _, image_id, _, box, truth in sorted(ranked, key=lambda r: r[:3]):
        best, owner = -1.0, -1
        for j, other in enumerate(truth["boxes"].tolist()):
            iou = loop_iou(box, other, protocol.pixel_offset)
            if truth["labels"][j] == label and iou > best:
                best, owner = iou, j
        enough = best > threshold if protocol.iou_strict else best >= threshold
        if owner >= 0 and enough and truth["difficult"][owner]:
            outcomes.append(IGNORED)
        elif owner >= 0 and enough and (image_id, owner) not in taken:
            taken.add((image_id, owner))
            outcomes.append(TRUE_POSITIVE)
        else:
            outcomes.append(FALSE_POSITIVE)
    if npos == 0:
        return None, 0, outcomes
    points, tp, fp = [], 0, 0
    for outcome in outcomes:
        tp, fp = tp + (outcome == TRUE_POSITIVE), fp + (outcome == FALSE_POSITIVE)
        if outcome != IGNORED:
            points.append((tp, tp / (tp + fp)))  # recall in objects
    if protocol.method == "11point":
        best_at = [max([p for n, p in points if 10 * n >= t * npos], default=0) for t in range(11)]
        return sum(best_at) / 11, npos, outcomes
    best_at = [max([p for n, p in points if n >= t], default=0) for t in range(1, npos + 1)]
    return sum(best_at) / npos, npos, outcomes


def loop_iou(a, b, offset):
    def area(x1, y1, x2, y2):
        return max(x2 - x1 + offset, 0) * max(y2 - y1 + offset, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return common / (area(*a) + area(*b) - common)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_pairs", [1, 7, 2**20])
def test_ap_is_the_definition(monkeypatch, seed, max_pairs):
    monkeypatch.setattr(matching, "_MAX_PAIRS", max_pairs)
    made = images(seed=seed)
    detections, objects = rows(made)
    thresholds = (0.5, 0.6, 0.75)
    for protocol in EVERY_PROTOCOL if max_pairs == 7 else EVERY_PROTOCOL[:1]:
        result = voc_ap(detections, objects, NAMES, protocol, thresholds)
        order = matching.ranking(detections)
        outcome = match(detections, objects, protocol, thresholds)[:, order]
        for label in range(3):
            mine = detections.labels[order] == label
            for t, threshold in enumerate(thresholds):
                ap, npos, outcomes = loop_ap(made, label, protocol, threshold)
                assert outcome[t, mine].tolist() == outcomes
                assert result.ap[label, t] == pytest.approx(ap, abs=1e-12)
                assert result.npos[label] == npos
    counted = [outcome[0] == kind for kind in (TRUE_POSITIVE, FALSE_POSITIVE, IGNORED)]
    assert all(kind.any() for kind in counted)  # the data reach every branch


def test_eleven_points_reach_a_recall_of_exactly_a_tenth():
    for n in range(1, 11):
        recall, precision = np.arange(1, n + 1) / 10, np.ones(n)
        assert average_precision(recall, precision, "11point") == pytest.approx((n + 1) / 11)
        assert average_precision(recall, precision, "area") == pytest.approx(n / 10)
    assert average_precision(np.array([]), np.array([]), "11point") == 0
    assert average_precision(np.array([]), np.array([]), "area") == 0
    recall, precision = np.array([0.25, 0.25, 0.5, 0.75]), np.array([1, 0.5, 0.2, 0.6])
    assert average_precision(recall, precision, "area") == pytest.approx(0.25 + 0.5 * 0.6)
    assert average_precision(recall, precision, "11point") == pytest.approx((3 + 5 * 0.6) / 11)
    with pytest.raises(ValueError, match="decrease"):
        average_precision(recall[::-1], precision, "area")
    with pytest.raises(ValueError, match="method"):
        average_precision(recall, precision, "coco")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_perfect_detections_score_one_and_none_score_zero(protocol):
    made = images()
    perfect = [
        ({"boxes": t["boxes"], "labels": t["labels"], "scores": torch.rand(len(t["labels"]))}, t)
        for _, t in made
    ]
    metrics, _ = evaluate(perfect, protocol)
    assert metrics == {"ap50": 1.0, "ap75": 1.0, "ap": 1.0}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    metrics, _ = evaluate([(empty, t) for _, t in made], protocol)
    assert metrics == {"ap50": 0.0, "ap75": 0.0, "ap": 0.0}


def test_the_order_of_images_changes_nothing():
    made = images(seed=3)
    assert evaluate(made[::-1])[0] == evaluate(made)[0]


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


def one_image(boxes, scores, difficult=(False,), truth=((0, 0, 10, 10),)):
    n, m = len(boxes), len(truth)
    return (
        Detections(np.zeros(n, int), np.zeros(n, int), np.array(boxes, float), np.array(scores)),
        GroundTruth(np.zeros(m, int), np.zeros(m, int), np.array(truth), np.array(difficult)),
    )


def test_a_duplicate_is_false_and_on_a_difficult_object_ignored():
    box = (0, 0, 10, 10)
    plain = one_image([box, box, box], [0.1, 0.9, 0.9])
    assert match(*plain, VOC2007, [0.5]).tolist() == [[FALSE_POSITIVE, 1, FALSE_POSITIVE]]
    hard = one_image([box, box], [0.9, 0.8], difficult=[True])
    assert match(*hard, VOC2007, [0.5]).tolist() == [[IGNORED, IGNORED]]
    # The kit looks at the best object alone: a free second-best one is not offered.
    both = one_image([box, box], [0.9, 0.8], [False, False], [box, (0, 0, 10, 9)])
    assert match(*both, VOC2007, [0.5]).tolist() == [[TRUE_POSITIVE, FALSE_POSITIVE]]


def test_half_an_overlap_matches_unless_strict_and_offset_shifts_it():
    half = one_image([(0, 0, 10, 5)], [0.9])
    assert match(*half, VOC2007, [0.5, 0.55]).tolist() == [[1], [0]]
    assert match(*half, VocProtocol("x", "area", iou_strict=True), [0.5]).tolist() == [[0]]
    # +1 areas of exclusive boxes: 66 / 121 > 0.54
    assert match(*half, VocProtocol("x", "area", pixel_offset=1), [0.54]).tolist() == [[1]]


def test_absent_classes_are_named_and_left_out():
    made = images()
    metrics, evaluator = evaluate(made)
    details = evaluator.details()
    assert details["absent_classes"] == ["emu"]
    assert set(details["per_class"]) == {"cat", "dog", "cow"} == set(evaluator.result.curves)
    assert metrics["ap50"] == pytest.approx(np.mean(list(details["per_class"].values())))
    assert metrics["ap"] == pytest.approx(np.mean(list(details["per_class_ap"].values())))
    assert metrics == pytest.approx(evaluate(made, names=NAMES[:3])[0])
    assert np.isnan(evaluator.result.ap[3]).all()
    assert json.loads(json.dumps(details, allow_nan=False)) == details
    assert "11-point" in details["protocol"]
    assert details["num_detections"] == sum(len(d["scores"]) for d, _ in made)


def test_metrics_are_the_means_over_classes_and_thresholds():
    made = images(seed=5)
    metrics, _ = evaluate(made, "area")
    ap = voc_ap(*rows(made), NAMES, AREA, COCO_IOUS).ap[:3]
    assert (metrics["ap50"], metrics["ap75"]) == (ap[:, 0].mean(), ap[:, 5].mean())
    assert metrics["ap"] == pytest.approx(ap.mean())
    assert 0 < metrics["ap75"] < metrics["ap50"] < 1


def test_scores_are_ranked_unrounded():
    close = one_image([(50, 50, 60, 60), (0, 0, 10, 10)], [0.90001, 0.90002])
    assert voc_ap(*close, NAMES, AREA, [0.5]).ap[0, 0] == 1


def test_what_cannot_be_scored_is_an_error():
    made = images()
    evaluator = EVALUATORS.get("voc")(NAMES)
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
        evaluate([*made, made[2]])
    with pytest.raises(ValueError, match=r"0\.\.1, got 0\.\.2.*background"):
        evaluate(made, names=NAMES[:2])
    with pytest.raises(ValueError, match="not difficult"):
        evaluate([(d, t | {"difficult": torch.ones_like(t["difficult"])}) for d, t in made])
    with pytest.raises(ValueError, match="Did you mean 'voc2007'"):
        VocEvaluator(NAMES, "voc2012")
    with pytest.raises(ValueError, match="pixel_offset"):
        VocProtocol("x", "area", pixel_offset=2)


def test_bfloat16_predictions_are_welcome():
    made = images()
    half = [({k: v.bfloat16() if k != "labels" else v for k, v in d.items()}, t) for d, t in made]
    assert evaluate(half)[0] == evaluate(made)[0]  # small integers and eighths are exact
