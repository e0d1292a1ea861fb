import pytest
import torch

from tract_transfer.models.detection.rpn import NEGATIVE, NEITHER, POSITIVE, Objects, assign, sample

# Beside an object of 0..10, boxes shifted by d have IoU (10 - d) / (10 + d).
OBJECT = [0.0, 0.0, 10.0, 10.0]
IOUS = {0: 1.0, 1: 9 / 11, 2: 8 / 12, 5: 1 / 3, 8: 2 / 18, 20: 0.0}
CANDIDATES = torch.tensor([[d, 0.0, d + 10, 10.0] for d in IOUS])


def objects(boxes, ignored=()) -> Objects:
    boxes = torch.tensor(boxes).view(-1, 4)
    return Objects(boxes, torch.arange(len(boxes)), torch.tensor(ignored).view(-1, 4))


@pytest.mark.parametrize("fg_iou", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("bg_iou", [(0.0, 0.3), (0.1, 0.3), (0.2, 0.25)])
def test_the_iou_decides(fg_iou, bg_iou):
    status, matched = assign(CANDIDATES, objects([OBJECT]), fg_iou=fg_iou, bg_iou=bg_iou)
    low, high = bg_iou
    assert status.tolist() == [
        POSITIVE if iou >= fg_iou else NEGATIVE if low <= iou < high else NEITHER
        for iou in IOUS.values()
    ]
    assert not matched.any()


def test_a_candidate_is_the_object_it_overlaps_most():
    both = objects([[20.0, 0.0, 30.0, 10.0], OBJECT])
    _, matched = assign(CANDIDATES, both, fg_iou=0.5, bg_iou=(0.0, 0.5))
    assert matched.tolist() == [1, 1, 1, 1, 1, 0]


def test_the_best_of_an_object_is_positive_however_little_it_overlaps():
    far = objects([[1.5, 8.0, 11.5, 40.0]])  # it shares as much with the box at 1 as with that at 2
    plain, _ = assign(CANDIDATES, far, fg_iou=0.7, bg_iou=(0.0, 0.3))
    best, _ = assign(CANDIDATES, far, fg_iou=0.7, bg_iou=(0.0, 0.3), best_is_positive=True)
    assert plain.tolist() == [NEGATIVE] * 6
    assert best.tolist() == [NEGATIVE, POSITIVE, POSITIVE, NEGATIVE, NEGATIVE, NEGATIVE]
    nowhere = objects([[100.0, 100.0, 110.0, 110.0]])
    best, _ = assign(CANDIDATES, nowhere, fg_iou=0.7, bg_iou=(0.0, 0.3), best_is_positive=True)
    assert best.tolist() == [NEGATIVE] * 6


def test_without_objects_or_candidates_there_is_background_or_nothing():
    status, matched = assign(CANDIDATES, objects([]), fg_iou=0.5, bg_iou=(0.0, 0.5))
    assert status.tolist() == [NEGATIVE] * 6
    assert matched.tolist() == [0] * 6
    hard, _ = assign(CANDIDATES, objects([]), fg_iou=0.5, bg_iou=(0.1, 0.5))
    assert hard.tolist() == [NEITHER] * 6
    for own in (objects([]), objects([OBJECT])):
        status, _ = assign(
            CANDIDATES[:0], own, fg_iou=0.5, bg_iou=(0.0, 0.5), best_is_positive=True
        )
        assert len(status) == 0


def test_half_of_it_in_an_ignored_box_is_no_background_and_objects_stay_objects():
    ignored = [[4.9, 0.0, 40.0, 10.0]]
    own = objects([OBJECT], ignored)
    status, _ = assign(CANDIDATES, own, fg_iou=0.5, bg_iou=(0.0, 0.5))
    shares = [(d + 10 - max(d, 4.9)) / 10 for d in IOUS]
    assert status.tolist() == [
        POSITIVE if iou >= 0.5 else NEITHER if share >= 0.5 else NEGATIVE
        for iou, share in zip(IOUS.values(), shares, strict=True)
    ]
    assert NEITHER in status
    alone, _ = assign(CANDIDATES, objects([], ignored), fg_iou=0.5, bg_iou=(0.0, 0.5))
    assert alone.tolist() == [NEITHER if share >= 0.5 else NEGATIVE for share in shares]


@pytest.mark.parametrize(
    "num_positive, num_negative, expected",
    [(50, 100, (8, 24)), (3, 100, (3, 29)), (50, 5, (8, 5)), (0, 0, (0, 0)), (2, 3, (2, 3))],
)
def test_negatives_fill_what_positives_leave(num_positive, num_negative, expected):
    status = torch.tensor([POSITIVE] * num_positive + [NEITHER] * 7 + [NEGATIVE] * num_negative)
    positive, negative = sample(status, 32, 0.25)
    assert (len(positive), len(negative)) == expected
    assert (status[positive] == POSITIVE).all()
    assert (status[negative] == NEGATIVE).all()
    assert len(set(positive.tolist())) == len(positive)
    assert len(set(negative.tolist())) == len(negative)


def test_every_candidate_is_as_likely_as_another():
    torch.manual_seed(0)
    status = torch.tensor([POSITIVE] * 4 + [NEGATIVE] * 4)
    drawn = torch.zeros(8)
    for _ in range(2000):
        for part in sample(status, 4, 0.5):
            drawn[part] += 1
    torch.testing.assert_close(drawn / 2000, torch.full((8,), 0.5), rtol=0, atol=0.05)
