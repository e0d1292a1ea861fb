"""VOC's average precision is the definition by loops, in every protocol."""

from dataclasses import replace

import numpy as np
import pytest
from random_detections import NAMES, images, loop_ap, rows

from tract_transfer.evaluation import PROTOCOLS, VocProtocol, voc
from tract_transfer.evaluation.voc import (
    FALSE_POSITIVE,
    IGNORED,
    TRUE_POSITIVE,
    Detections,
    GroundTruth,
    average_precision,
    interpolated_precision,
    match,
    paired_iou,
    ranking,
    voc_ap,
)

KIT, AREA = PROTOCOLS["voc2007_devkit"], PROTOCOLS["area"]
EVERY_PROTOCOL = [
    VocProtocol("x", "a test's", method, strict, pixel_offset=offset)
    for method in ("11point", "area")
    for strict in (False, True)
    for offset in (0, 1)
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_pairs", [1, 7, 2**20])
def test_ap_is_the_definition(monkeypatch, seed, max_pairs):
    monkeypatch.setattr(voc, "_MAX_PAIRS", max_pairs)
    made = images(seed=seed)
    detections, objects = rows(made)
    thresholds = (0.5, 0.6, 0.75)
    for protocol in EVERY_PROTOCOL if max_pairs == 7 else EVERY_PROTOCOL[:1]:
        result = voc_ap(detections, objects, NAMES, protocol, thresholds)
        outcome, order = match(detections, objects, protocol, thresholds)
        for label in range(3):
            has_label = detections.labels[order] == label
            for t, threshold in enumerate(thresholds):
                ap, npos, outcomes = loop_ap(made, label, protocol, threshold)
                assert outcome[t, has_label].tolist() == outcomes
                assert result.ap[label, t] == pytest.approx(ap, abs=1e-12)
                assert result.npos[label] == npos
    counted = [outcome[0] == kind for kind in (TRUE_POSITIVE, FALSE_POSITIVE, IGNORED)]
    assert all(kind.any() for kind in counted)  # the data reach every branch


def test_eleven_points_reach_a_recall_of_exactly_a_tenth():
    for n in range(1, 11):
        recall, precision = np.arange(1, n + 1) / 10, np.ones(n)
        assert average_precision(recall, precision, "11point") == pytest.approx((n + 1) / 11)
        assert average_precision(recall, precision, "area") == pytest.approx(n / 10)
        misses = int(n in (3, 6, 7))  # the float points 3 * 0.1, 6 * 0.1 and 7 * 0.1
        ap = average_precision(recall, precision, "11point_float")
        assert ap == pytest.approx((n + 1 - misses) / 11)
    assert average_precision(np.array([]), np.array([]), "11point") == 0
    assert average_precision(np.array([]), np.array([]), "area") == 0
    recall, precision = np.array([0.25, 0.25, 0.5, 0.75]), np.array([1, 0.5, 0.2, 0.6])
    assert average_precision(recall, precision, "area") == pytest.approx(0.25 + 0.5 * 0.6)
    assert average_precision(recall, precision, "11point") == pytest.approx((3 + 5 * 0.6) / 11)


def one_image(boxes, scores, difficult=(False,), truth=((0, 0, 10, 10),)):
    n, m = len(boxes), len(truth)
    return (
        Detections(np.zeros(n, int), np.zeros(n, int), np.array(boxes, float), np.array(scores)),
        GroundTruth(
            np.zeros(m, int), np.zeros(m, int), np.array(truth), np.array(difficult), np.ones(m)
        ),
    )


def outcomes(one, protocol=KIT, thresholds=(0.5,)):
    """The outcomes in the order of the detections."""
    outcome, order = match(*one, protocol, thresholds)
    return outcome[:, np.argsort(order)].tolist()


def test_duplicates_are_false_positives_and_difficult_objects_ignore_detections():
    box = (0, 0, 10, 10)
    plain = one_image([box, box, box], [0.1, 0.9, 0.9])
    assert outcomes(plain) == [[FALSE_POSITIVE, TRUE_POSITIVE, FALSE_POSITIVE]]
    hard = one_image([box, box], [0.9, 0.8], difficult=[True])
    assert outcomes(hard) == [[IGNORED, IGNORED]]
    # The kit considers only the best object: a free second-best one does not count.
    both = one_image([box, box], [0.9, 0.8], [False, False], [box, (0, 0, 10, 9)])
    assert outcomes(both) == [[TRUE_POSITIVE, FALSE_POSITIVE]]


def test_an_iou_of_half_matches_unless_strict_and_pixel_offset_raises_it():
    empty = np.array([[0, 0, 0, 0], [5, 5, 2, 2], [0, 0, 4, 4]])
    assert paired_iou(empty, np.zeros((3, 4)), 0).tolist() == [0, 0, 0]
    half = one_image([(0, 0, 10, 5)], [0.9])
    assert outcomes(half, KIT, [0.5, 0.55]) == [[1], [0]]
    assert outcomes(half, replace(KIT, iou_strict=True)) == [[0]]
    assert outcomes(half, replace(KIT, pixel_offset=1), [0.54]) == [[1]]  # 66 / 121


@pytest.mark.parametrize("method", ["11point", "area"])
def test_coordinates_of_voc_give_the_same(method):
    """Adding 1 to x1 and y1 and to the width cancels, as the ends are exclusive here."""
    for seed in range(3):
        sets = rows(images(seed=seed))
        ours = replace(KIT, method=method)
        vocs = replace(ours, min_offset=1, pixel_offset=1)
        ap = [voc_ap(*sets, NAMES, protocol, (0.5, 0.75)).ap for protocol in (ours, vocs)]
        np.testing.assert_array_equal(*ap)


def test_scores_and_boxes_are_rounded_before_ranking_and_matching():
    close = one_image([(50, 50, 60, 60), (0, 0, 10, 10)], [0.90001, 0.90002])
    for decimals, ap in ((None, 1), (5, 1), (4, 0.5), (3, 0.5)):
        protocol = replace(AREA, round_scores=decimals)
        assert voc_ap(*close, NAMES, protocol, [0.5]).ap[0, 0] == ap
    near = one_image([(0, 0, 10, 4.96)], [0.9])
    for decimals, ap in ((None, 0), (2, 0), (1, 1)):
        protocol = replace(AREA, round_boxes=decimals)
        assert voc_ap(*near, NAMES, protocol, [0.5]).ap[0, 0] == ap


def test_interpolated_precision_is_the_best_at_that_recall_or_more():
    curve = np.array([0.25, 0.25, 0.5, 0.75]), np.array([1, 0.5, 0.2, 0.6])
    recalls = np.array([0, 0.25, 0.26, 0.75, 0.76])
    assert interpolated_precision(*curve, recalls).tolist() == [1, 1, 0.6, 0.6, 0]
    empty = np.array([])
    assert interpolated_precision(*curve, empty).tolist() == []
    assert interpolated_precision(empty, empty, np.array([0, 1])).tolist() == [0, 0]


def test_unstable_ties_of_a_class_are_in_the_order_of_numpys_argsort():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, 400)
    detections = Detections(
        rng.permutation(400), rng.integers(0, 3, 400), np.ones((400, 4)), scores
    )
    order = ranking(detections, stable=False)
    for label in range(3):
        of_label = np.flatnonzero(detections.labels == label)
        of_label = of_label[np.argsort(detections.image_ids[of_label])]
        expected = of_label[np.argsort(-scores[of_label])]
        np.testing.assert_array_equal(order[detections.labels[order] == label], expected)
    assert (np.diff(detections.labels[order]) >= 0).all()
