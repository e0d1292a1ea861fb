import numpy as np

from tract_transfer.evaluation.voc import paired_iou


def test_exclusive_ends_are_the_kits_inclusive_pixels():
    corners = np.random.default_rng(0).integers(0, 20, (2, 500, 2))
    sides = np.random.default_rng(1).integers(1, 20, (2, 500, 2))
    a, b = np.concatenate([corners, corners + sides], axis=2)
    inclusive = [0, 0, -1, -1]
    np.testing.assert_array_equal(paired_iou(a, b, 0), paired_iou(a + inclusive, b + inclusive, 1))


def test_empty_boxes_overlap_nothing():
    a = np.array([[0, 0, 0, 0], [5, 5, 2, 2], [0, 0, 4, 4]])
    assert paired_iou(a, np.array([[0, 0, 0, 0]] * 3), 0).tolist() == [0, 0, 0]
