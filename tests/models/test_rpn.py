"""The region proposal network: torchvision's where the options are the same, and each option."""

import pytest
import torch
from small_detectors import IN_IGNORED, MANY, NO_BOXES, OBJECTS, SIZES, some_maps
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from tract_transfer.models.detection.rpn import (
    NEGATIVE,
    NEITHER,
    POSITIVE,
    Objects,
    RegionProposals,
    RpnOptions,
    anchor_grid,
    assign,
    sample,
)

SCALES = [1.0, 1.0]
ALL = {"samples_per_image": MANY, "positive_fraction": 1.0}
ONE_SCALE = RpnOptions(anchor_scales=[4.0])


def network(**options) -> RegionProposals:
    torch.manual_seed(0)
    network = RegionProposals(4, [4, 8], RpnOptions(**{"anchor_scales": [4.0], **options}))
    nn.init.normal_(network.head.cls_logits.weight, std=0.3)
    nn.init.normal_(network.head.bbox_pred.weight, std=0.1)
    return network


@pytest.mark.parametrize("training", [True, False])
def test_rpn_is_that_of_torchvision(training):
    """With square anchors, which torchvision does not round, and every anchor sampled."""
    options = {"anchor_scales": [4.0, 8.0], "anchor_ratios": [1.0], **ALL}
    options |= {"pre_nms_train": 200, "pre_nms_test": 100}
    options |= {"post_nms_train": 60, "post_nms_test": 30}
    ours = network(**options).train(training)
    theirs = RegionProposalNetwork(
        AnchorGenerator(((16, 32), (32, 64)), ((1.0,), (1.0,))),
        ours.head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=MANY,
        positive_fraction=1.0,
        pre_nms_top_n={"training": 200, "testing": 100},
        post_nms_top_n={"training": 60, "testing": 30},
        nms_thresh=0.7,
    ).train(training)
    images = ImageList(torch.zeros(2, 3, 64, 96), SIZES)
    targets = [{"boxes": image.boxes} for image in OBJECTS]
    expected, expected_losses = theirs(images, dict(enumerate(some_maps())), targets)
    proposals, losses = ours(some_maps(), SIZES, SCALES, OBJECTS if training else None)
    for boxes, expected_boxes in zip(proposals, expected, strict=True):
        torch.testing.assert_close(boxes, expected_boxes, rtol=1e-5, atol=1e-3)
    names = {"loss_rpn_cls": "loss_objectness", "loss_rpn_box": "loss_rpn_box_reg"}
    assert losses.keys() == (names.keys() if training else set())
    for name in losses:
        torch.testing.assert_close(losses[name], expected_losses[names[name]])


def test_anchors_have_the_sides_ratios_and_offset_of_the_options():
    options = RpnOptions(anchor_scales=[2.0, 8.0], anchor_ratios=[0.5, 1.0, 2.0])
    anchors = anchor_grid((3, 5), 16, options)
    assert anchors.shape == (3 * 5 * 6, 4)
    widths, heights = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
    sides = (widths * heights).sqrt()
    assert sorted(set(sides.round().tolist())) == [32, 128]
    ratios = (heights / widths).view(15, 6).sort(1).values
    torch.testing.assert_close(ratios, torch.tensor([0.5, 0.5, 1, 1, 2, 2]).expand(15, 6))
    centers = ((anchors[:, :2] + anchors[:, 2:]) / 2).view(3, 5, 6, 2)
    y, x = torch.meshgrid(torch.arange(3) * 16.0, torch.arange(5) * 16.0, indexing="ij")
    torch.testing.assert_close(centers, torch.stack([x, y], -1)[:, :, None].expand(3, 5, 6, 2))
    middle = anchor_grid((3, 4), 16, RpnOptions(anchor_offset=0.5))
    torch.testing.assert_close(middle, anchor_grid((3, 4), 16, RpnOptions()) + 8)


# Proposals


def proposals(scales=SCALES, **options) -> list[torch.Tensor]:
    return network(**options).eval()(some_maps(), SIZES, scales)[0]


@pytest.mark.parametrize("nms_iou", [0.3, 0.7])
def test_proposals_of_a_map_overlap_by_at_most_the_nms_threshold(nms_iou):
    rpn = RegionProposals(4, [4], RpnOptions(nms_iou=nms_iou, anchor_scales=[4.0])).eval()
    (boxes, _), _ = rpn(some_maps()[:1], SIZES, SCALES)
    iou = box_iou(boxes, boxes).fill_diagonal_(0)
    assert nms_iou - 0.2 < iou.max() <= nms_iou


def test_options_limit_the_boxes_before_and_after_the_nms():
    options = {"nms_iou": 1.0, "pre_nms_test": 40, "pre_nms_train": 50}
    full, _ = proposals(**options, post_nms_test=MANY)  # the other image is smaller than its maps
    best, _ = proposals(**options, post_nms_test=17)
    assert (len(full), len(best)) == (2 * 40, 17)  # of two maps
    assert torch.equal(best, full[:17])
    for after, expected in ((MANY, 2 * 50), (90, 90)):
        training = network(**options, post_nms_train=after).train()
        (boxes, _), _ = training(some_maps(), SIZES, SCALES, OBJECTS)
        assert len(boxes) == expected


def test_minimum_size_is_in_pixels_before_resizing():
    options = {"nms_iou": 1.0, "post_nms_test": MANY}
    large = proposals([1.0, 2.0], **options, min_size_px=12.0)
    for all_boxes, boxes, minimum in zip(proposals(**options), large, (12, 24), strict=True):
        expected = all_boxes[((all_boxes[:, 2:] - all_boxes[:, :2]) >= minimum).all(1)]
        assert sorted(boxes.tolist()) == sorted(expected.tolist())
        assert 0 < len(expected) < len(all_boxes)


# Losses


class FixedHead(nn.Module):
    """A head with outputs as parameters: their gradients show which anchors were trained."""

    def __init__(self, anchors_per_cell: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.logits, self.codes = (
            nn.ParameterList(
                torch.randn(2, values * anchors_per_cell, 64 // s, 96 // s, generator=generator)
                for s in (4, 8)
            )
            for values in (1, 4)
        )

    def forward(self, _maps):
        return list(self.logits), list(self.codes)

    def trained(self, values: int) -> torch.Tensor:
        """(B, A) bool: which scores (1 value) or boxes (4) have a gradient, as in anchor_grid."""
        outputs = self.logits if values == 1 else self.codes
        levels = [p.grad.permute(0, 2, 3, 1).reshape(2, -1, values) for p in outputs]
        return torch.cat(levels, 1).ne(0).any(-1)


def train(objects=OBJECTS, **options) -> tuple[dict[str, torch.Tensor], FixedHead]:
    rpn = network(**options).train()
    rpn.head = FixedHead(3)
    torch.manual_seed(0)
    _, losses = rpn(some_maps(), SIZES, SCALES, objects)
    sum(losses.values()).backward()
    return losses, rpn.head


def all_anchors() -> torch.Tensor:
    return torch.cat([anchor_grid((64 // s, 96 // s), s, ONE_SCALE) for s in (4, 8)])


def test_anchors_that_leave_the_image_can_be_dropped():
    _, with_them = train(**ALL)
    _, without = train(**ALL, drop_cross_boundary=True)
    anchors = all_anchors()
    for row, (height, width) in enumerate(SIZES):
        inside = (anchors >= 0).all(1) & (anchors[:, 2] <= width) & (anchors[:, 3] <= height)
        assert with_them.trained(1)[row][~inside].any()
        assert without.trained(1)[row].any()
        assert not without.trained(1)[row][~inside].any()


def test_best_anchor_of_an_object_is_one_of_the_remaining_anchors():
    """An object at the border has a positive, though its best anchor leaves the image."""
    border = [Objects(torch.tensor([[0.0, 20, 9, 50]]), torch.tensor([0]), NO_BOXES)] * 2
    losses, head = train(border, drop_cross_boundary=True)
    assert losses["loss_rpn_box"] > 0
    assert head.trained(4).any(1).all()


@pytest.mark.parametrize("count, fraction", [(64, 0.5), (20, 0.1), (10, 1.0)])
def test_options_set_the_number_of_trained_anchors(count, fraction):
    _, head = train(samples_per_image=count, positive_fraction=fraction)
    assert head.trained(1).sum(1).tolist() == [count, count]
    assert (head.trained(4).sum(1) <= int(count * fraction)).all()
    assert head.trained(4).any(1).all()


def test_ignored_regions_are_not_background():
    ignored, plain = (train(objects, **ALL)[1].trained(1) for objects in (IN_IGNORED, OBJECTS))
    assert 0 < ignored.sum() < plain.sum()
    assert not (ignored & ~plain).any()


def test_box_loss_with_beta_0_is_l1():
    _, head = train(**ALL, smooth_l1_beta=0.0)
    gradients = torch.cat([p.grad.flatten() for p in head.codes])
    gradients = gradients[gradients != 0].abs()
    expected = torch.full_like(gradients, 1 / int(head.trained(1).sum()))
    torch.testing.assert_close(gradients, expected)


# Assignment. Boxes shifted by d from an object of 0..10 have the IoU (10 - d) / (10 + d).

OBJECT = [0.0, 0.0, 10.0, 10.0]
IOUS = {0: 1.0, 1: 9 / 11, 2: 8 / 12, 5: 1 / 3, 8: 2 / 18, 20: 0.0}
CANDIDATES = torch.tensor([[d, 0.0, d + 10, 10.0] for d in IOUS])


def assigned(boxes, ignored=(), candidates=CANDIDATES, **options) -> tuple[list[int], list[int]]:
    boxes = torch.tensor(boxes).view(-1, 4)
    objects = Objects(boxes, torch.arange(len(boxes)), torch.tensor(ignored).view(-1, 4))
    options = {"fg_iou": 0.5, "bg_iou": (0.0, 0.5), **options}
    status, matched = assign(candidates, objects, **options)
    return status.tolist(), matched.tolist()


@pytest.mark.parametrize("fg_iou", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("bg_iou", [(0.0, 0.3), (0.1, 0.3), (0.2, 0.25)])
def test_iou_decides_the_status(fg_iou, bg_iou):
    low, high = bg_iou
    expected = [
        POSITIVE if iou >= fg_iou else NEGATIVE if low <= iou < high else NEITHER
        for iou in IOUS.values()
    ]
    assert assigned([OBJECT], fg_iou=fg_iou, bg_iou=bg_iou) == (expected, [0] * 6)


@pytest.mark.parametrize(
    "box, best_is_positive, positives",
    [
        ([1.5, 8.0, 11.5, 40.0], False, []),
        ([1.5, 8.0, 11.5, 40.0], True, [1, 2]),  # it overlaps those shifted by 1 and 2 equally
        ([100.0, 100.0, 110.0, 110.0], True, []),
    ],
)
def test_best_candidates_of_an_object_can_be_positive_at_any_iou(box, best_is_positive, positives):
    options = {"fg_iou": 0.7, "bg_iou": (0.0, 0.3), "best_is_positive": best_is_positive}
    status, _ = assigned([box], **options)
    assert status == [POSITIVE if i in positives else NEGATIVE for i in range(6)]


def test_without_objects_all_candidates_are_background():
    assert assigned([]) == ([NEGATIVE] * 6, [0] * 6)
    assert assigned([], bg_iou=(0.1, 0.5))[0] == [NEITHER] * 6
    for boxes in ([], [OBJECT]):
        assert assigned(boxes, candidates=CANDIDATES[:0], best_is_positive=True) == ([], [])


@pytest.mark.parametrize("boxes", [[], [OBJECT]])
def test_candidate_half_in_an_ignored_box_is_not_background(boxes):
    status, _ = assigned(boxes, [[4.9, 0.0, 40.0, 10.0]])
    shares = [(d + 10 - max(d, 4.9)) / 10 for d in IOUS]
    assert NEITHER in status
    assert status == [
        POSITIVE if boxes and iou >= 0.5 else NEITHER if share >= 0.5 else NEGATIVE
        for iou, share in zip(IOUS.values(), shares, strict=True)
    ]


@pytest.mark.parametrize(
    "num_positive, num_negative, expected",
    [(50, 100, (8, 24)), (3, 100, (3, 29)), (50, 5, (8, 5)), (0, 0, (0, 0)), (2, 3, (2, 3))],
)
def test_negatives_fill_the_sample(num_positive, num_negative, expected):
    status = torch.tensor([POSITIVE] * num_positive + [NEITHER] * 7 + [NEGATIVE] * num_negative)
    drawn = sample(status, 32, 0.25)
    assert tuple(map(len, drawn)) == expected
    for indices, value in zip(drawn, (POSITIVE, NEGATIVE), strict=True):
        assert (status[indices] == value).all()
        assert len(set(indices.tolist())) == len(indices)


def test_every_candidate_is_equally_likely_to_be_sampled():
    torch.manual_seed(0)
    status = torch.tensor([POSITIVE] * 4 + [NEGATIVE] * 4)
    counts = torch.zeros(8)
    for _ in range(2000):
        for indices in sample(status, 4, 0.5):
            counts[indices] += 1
    torch.testing.assert_close(counts / 2000, torch.full((8,), 0.5), rtol=0, atol=0.05)
