from dataclasses import replace

import numpy as np
import pytest
from random_detections import NAMES, images, loop_ap, rows

from tract_transfer.evaluation import PROTOCOLS, VocProtocol
from tract_transfer.evaluation import voc as matching
from tract_transfer.evaluation.voc import (
    FALSE_POSITIVE,
    IGNORED,
    TRUE_POSITIVE,
    Curve,
    Detections,
    GroundTruth,
    average_precision,
    match,
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
    monkeypatch.setattr(matching, "_MAX_PAIRS", max_pairs)
    made = images(seed=seed)
    detections, objects = rows(made)
    thresholds = (0.5, 0.6, 0.75)
    for protocol in EVERY_PROTOCOL if max_pairs == 7 else EVERY_PROTOCOL[:1]:
        result = voc_ap(detections, objects, NAMES, protocol, thresholds)
        order = matching.ranking(detections)
        outcome = match(detections, objects, protocol, thresholds).outcome[:, order]
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


def one_image(boxes, scores, difficult=(False,), truth=((0, 0, 10, 10),)):
    n, m = len(boxes), len(truth)
    return (
        Detections(np.zeros(n, int), np.zeros(n, int), np.array(boxes, float), np.array(scores)),
        GroundTruth(
            np.zeros(m, int), np.zeros(m, int), np.array(truth), np.array(difficult), np.ones(m)
        ),
    )


def test_a_duplicate_is_false_and_on_a_difficult_object_ignored():
    box = (0, 0, 10, 10)
    plain = one_image([box, box, box], [0.1, 0.9, 0.9])
    assert match(*plain, KIT, [0.5]).outcome.tolist() == [[FALSE_POSITIVE, 1, FALSE_POSITIVE]]
    hard = one_image([box, box], [0.9, 0.8], difficult=[True])
    assert match(*hard, KIT, [0.5]).outcome.tolist() == [[IGNORED, IGNORED]]
    # The kit looks at the best object alone: a free second-best one is not offered.
    both = one_image([box, box], [0.9, 0.8], [False, False], [box, (0, 0, 10, 9)])
    assert match(*both, KIT, [0.5]).outcome.tolist() == [[TRUE_POSITIVE, FALSE_POSITIVE]]


def test_half_an_overlap_matches_unless_strict_and_offset_shifts_it():
    half = one_image([(0, 0, 10, 5)], [0.9])
    assert match(*half, KIT, [0.5, 0.55]).outcome.tolist() == [[1], [0]]
    assert match(*half, replace(KIT, iou_strict=True), [0.5]).outcome.tolist() == [[0]]
    # +1 areas of exclusive boxes: 66 / 121 > 0.54
    assert match(*half, replace(KIT, pixel_offset=1), [0.54]).outcome.tolist() == [[1]]


@pytest.mark.parametrize("method", ["11point", "area"])
def test_vocs_own_coordinates_give_the_same(method):
    """1 added to the mins and to the width cancel: the ends are exclusive here."""
    for seed in range(3):
        sets = rows(images(seed=seed))
        ours = replace(KIT, method=method)
        vocs = replace(ours, min_offset=1, pixel_offset=1)
        ap = [voc_ap(*sets, NAMES, protocol, (0.5, 0.75)).ap for protocol in (ours, vocs)]
        np.testing.assert_array_equal(*ap)


def test_scores_are_ranked_as_rounded():
    close = one_image([(50, 50, 60, 60), (0, 0, 10, 10)], [0.90001, 0.90002])
    for decimals, ap in ((None, 1), (5, 1), (4, 0.5), (3, 0.5)):
        protocol = replace(AREA, round_scores=decimals)
        assert voc_ap(*close, NAMES, protocol, [0.5]).ap[0, 0] == ap


def test_boxes_match_as_rounded():
    near = one_image([(0, 0, 10, 4.96)], [0.9])
    for decimals, ap in ((None, 0), (2, 0), (1, 1)):
        protocol = replace(AREA, round_boxes=decimals)
        assert voc_ap(*near, NAMES, protocol, [0.5]).ap[0, 0] == ap


def test_a_recall_of_three_tenths_misses_the_float_point():
    curve = Curve(np.arange(1, 11) / 10, np.ones(10))
    assert average_precision(curve.recall[:3], curve.precision[:3], "11point") == 4 / 11
    assert average_precision(curve.recall[:3], curve.precision[:3], "11point_float") == 3 / 11
    assert average_precision(curve.recall, curve.precision, "11point_float") == 1


def test_a_curve_is_the_best_precision_from_there_on():
    curve = Curve(np.array([0.25, 0.25, 0.5, 0.75]), np.array([1, 0.5, 0.2, 0.6]))
    assert curve.at(np.array([0, 0.25, 0.26, 0.75, 0.76])).tolist() == [1, 1, 0.6, 0.6, 0]
    assert curve.at(np.array([])).tolist() == []
    assert Curve(np.array([]), np.array([])).at(np.array([0, 1])).tolist() == [0, 0]


def test_unstable_ties_are_numpys_class_by_class():
    rng = np.random.default_rng(0)
    found = Detections(
        rng.permutation(400), rng.integers(0, 3, 400), np.ones((400, 4)), rng.integers(0, 5, 400)
    )
    order = matching.ranking(found, stable=False)
    for label in range(3):
        own = np.flatnonzero(found.labels == label)
        own = own[np.argsort(found.image_ids[own])]
        expected = own[np.argsort(-found.scores[own])]
        np.testing.assert_array_equal(order[found.labels[order] == label], expected)
    assert (np.diff(found.labels[order]) >= 0).all()


def test_a_protocol_that_makes_no_sense_is_an_error():
    with pytest.raises(ValueError, match="pixel_offset"):
        replace(KIT, pixel_offset=2)
    with pytest.raises(ValueError, match="method must be one of"):
        replace(KIT, method="12point")


def test_absent_classes_count_as_zero_where_the_protocol_says_so():
    result = voc_ap(*rows(images()), NAMES, KIT, (0.5, 0.75))
    left_out, as_zero = result.mean_ap(False), result.mean_ap(True)
    np.testing.assert_allclose(as_zero, left_out * 3 / 4)
