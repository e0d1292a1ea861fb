"""The region proposal network: torchvision's where their options meet, and each option's law."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from tract_transfer.models.detection.options import RpnOptions
from tract_transfer.models.detection.rpn import Objects, RegionProposals, anchor_grid

SIZES = [(64, 96), (50, 70)]
SCALES = [1.0, 1.0]
MANY = 10**6
NONE = torch.empty(0, 4)
OBJECTS = [
    Objects(torch.tensor([[5.0, 5, 40, 50], [50, 10, 90, 60]]), torch.tensor([0, 2]), NONE),
    Objects(torch.tensor([[1.0, 2, 30, 48]]), torch.tensor([1]), NONE),
]


def some_maps(channels: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, 64 // s, 96 // s, generator=generator) for s in (4, 8)]


def network(**options) -> RegionProposals:
    torch.manual_seed(0)
    network = RegionProposals(4, [4, 8], RpnOptions(**{"anchor_scales": [4.0], **options}))
    nn.init.normal_(network.head.cls_logits.weight, std=0.3)
    nn.init.normal_(network.head.bbox_pred.weight, std=0.1)
    return network


@pytest.mark.parametrize("training", [True, False])
def test_it_is_torchvision_s(training):
    """With square anchors, which torchvision does not round, and every anchor sampled."""
    options = RpnOptions(
        anchor_scales=[4.0, 8.0],
        anchor_ratios=[1.0],
        samples_per_image=MANY,
        positive_fraction=1.0,
        pre_nms_train=200,
        pre_nms_test=100,
        post_nms_train=60,
        post_nms_test=30,
    )
    torch.manual_seed(0)
    ours = RegionProposals(4, [4, 8], options).train(training)
    nn.init.normal_(ours.head.cls_logits.weight, std=0.3)
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
    maps = some_maps()
    images = ImageList(torch.zeros(2, 3, 64, 96), SIZES)
    targets = [{"boxes": each.boxes} for each in OBJECTS]
    expected, expected_losses = theirs(images, dict(enumerate(maps)), targets)
    found, losses = ours(maps, SIZES, SCALES, OBJECTS if training else None)
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-3)
    if training:
        torch.testing.assert_close(losses["loss_rpn_cls"], expected_losses["loss_objectness"])
        torch.testing.assert_close(losses["loss_rpn_box"], expected_losses["loss_rpn_box_reg"])
    else:
        assert losses == {}


# -------------------------------------------------------------------------------- anchors


def test_anchors_have_the_sides_and_ratios_told():
    options = RpnOptions(anchor_scales=[2.0, 8.0], anchor_ratios=[0.5, 1.0, 2.0])
    anchors = anchor_grid(3, 5, 16, options)
    assert anchors.shape == (3 * 5 * 6, 4)
    widths, heights = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
    sides = (widths * heights).sqrt().view(15, 6)
    ratios = (heights / widths).view(15, 6)
    assert sorted(set(sides.round().flatten().tolist())) == [32, 128]
    torch.testing.assert_close(
        ratios.sort(1).values, torch.tensor([0.5, 0.5, 1, 1, 2, 2]).expand(15, 6)
    )
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).view(3, 5, 6, 2)
    y, x = torch.meshgrid(torch.arange(3) * 16.0, torch.arange(5) * 16.0, indexing="ij")
    torch.testing.assert_close(centres, torch.stack([x, y], -1)[:, :, None].expand(3, 5, 6, 2))


def test_the_offset_moves_anchors_by_a_share_of_the_stride():
    corner = anchor_grid(3, 4, 16, RpnOptions())
    middle = anchor_grid(3, 4, 16, RpnOptions(anchor_offset=0.5))
    torch.testing.assert_close(middle, corner + 8)


# ------------------------------------------------------------------------------ proposals


def proposals(scales=SCALES, **options) -> list[torch.Tensor]:
    return network(**options).eval()(some_maps(), SIZES, scales)[0]


def test_proposals_lie_in_their_images():
    for boxes, (height, width) in zip(proposals(), SIZES, strict=True):
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= width
        assert boxes[:, 3].max() <= height


@pytest.mark.parametrize("nms_iou", [0.3, 0.7])
def test_no_two_proposals_of_a_map_overlap_by_more(nms_iou):
    one = RegionProposals(4, [4], RpnOptions(nms_iou=nms_iou, anchor_scales=[4.0])).eval()
    (boxes, _), _ = one(some_maps()[:1], SIZES, SCALES)
    iou = box_iou(boxes, boxes).fill_diagonal_(0)
    assert iou.max() <= nms_iou
    assert iou.max() > nms_iou - 0.2  # and it is no stricter than that


def test_numbers_before_and_after_the_nms():
    every = {"nms_iou": 1.0, "pre_nms_test": 40, "pre_nms_train": 50}
    full, _ = proposals(**every, post_nms_test=MANY)  # the other image ends before its maps do
    best, _ = proposals(**every, post_nms_test=17)
    assert (len(full), len(best)) == (2 * 40, 17)  # of two maps
    assert torch.equal(best, full[:17])
    for after, expected in ((MANY, 2 * 50), (90, 90)):
        training = network(**every, post_nms_train=after).train()
        (found, _), _ = training(some_maps(), SIZES, SCALES, OBJECTS)
        assert len(found) == expected


def test_the_smallest_proposal_grows_with_the_image():
    every = proposals(nms_iou=1.0, post_nms_test=MANY)
    large = proposals([1.0, 2.0], nms_iou=1.0, post_nms_test=MANY, min_size_px=12.0)
    for all_boxes, boxes, least in zip(every, large, (12, 24), strict=True):
        sides = all_boxes[:, 2:] - all_boxes[:, :2]
        expected = all_boxes[(sides >= least).all(1)]
        assert sorted(boxes.tolist()) == sorted(expected.tolist())
        assert 0 < len(expected) < len(all_boxes)


# ---------------------------------------------------------------------------------- losses


class Given(nn.Module):
    """A head that says what it is told, whatever it sees: gradients show what was trained on."""

    def __init__(self, anchors_of_a_cell: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.logits, self.codes = (
            nn.ParameterList(
                torch.randn(2, per * anchors_of_a_cell, 64 // s, 96 // s, generator=generator)
                for s in (4, 8)
            )
            for per in (1, 4)
        )

    def forward(self, _maps):
        return list(self.logits), list(self.codes)

    def trained(self) -> torch.Tensor:
        """(B, all anchors) bool: those whose score the loss moved, in the order of anchor_grid."""
        gradients = [each.grad.permute(0, 2, 3, 1).flatten(1) for each in self.logits]
        return torch.cat(gradients, 1) != 0


def trained_on(objects=OBJECTS, **options) -> tuple[dict[str, torch.Tensor], torch.Tensor, Given]:
    rpn = network(**options).train()
    rpn.head = Given(3)
    torch.manual_seed(0)
    _, losses = rpn(some_maps(), SIZES, SCALES, objects)
    sum(losses.values()).backward()
    return losses, rpn.head.trained(), rpn.head


def all_anchors() -> torch.Tensor:
    options = RpnOptions(anchor_scales=[4.0])
    return torch.cat([anchor_grid(64 // s, 96 // s, s, options) for s in (4, 8)])


def test_anchors_that_leave_the_image_can_be_left_out():
    every = {"samples_per_image": MANY, "positive_fraction": 1.0}
    _, with_them, _ = trained_on(**every)
    _, without, _ = trained_on(**every, drop_cross_boundary=True)
    anchors = all_anchors()
    for row, (height, width) in enumerate(SIZES):
        inside = (anchors >= 0).all(1) & (anchors[:, 2] <= width) & (anchors[:, 3] <= height)
        assert inside.any()
        assert without[row].any()
        assert with_them[row][~inside].any()
        assert not without[row][~inside].any()


def test_an_object_s_best_anchor_is_sought_among_those_left():
    """An object at the border keeps a positive, though its best anchor leaves the image."""
    border = [Objects(torch.tensor([[0.0, 20, 9, 50]]), torch.tensor([0]), NONE)] * 2
    losses, _, head = trained_on(border, drop_cross_boundary=True)
    assert losses["loss_rpn_box"] > 0
    moved = torch.cat([each.grad.abs().amax(1).flatten(1) for each in head.codes], 1)
    assert (moved > 0).any(1).all()


@pytest.mark.parametrize("count, fraction", [(64, 0.5), (20, 0.1), (10, 1.0)])
def test_so_many_anchors_are_trained_on(count, fraction):
    _, trained, head = trained_on(samples_per_image=count, positive_fraction=fraction)
    assert trained.sum(1).tolist() == [count, count]
    codes = torch.cat([e.grad.view(2, 3, 4, -1).abs().amax(2).flatten(1) for e in head.codes], 1)
    assert 0 < (codes > 0).sum(1).max() <= count * fraction


def test_ious_decide_what_an_anchor_is():
    every = {"samples_per_image": MANY, "positive_fraction": 1.0}
    _, trained, _ = trained_on(**every, fg_iou=0.6, bg_iou=0.2)
    anchors = all_anchors()
    for row, own in enumerate(OBJECTS):
        iou = box_iou(own.boxes, anchors)
        best = (iou == iou.amax(1, keepdim=True)).any(0)
        between = (iou.amax(0) >= 0.2) & (iou.amax(0) < 0.6) & ~best
        assert between.any()
        assert torch.equal(trained[row], ~between)


def test_ignored_regions_are_no_background():
    every = {"samples_per_image": MANY, "positive_fraction": 1.0}
    region = torch.tensor([[0.0, 0, 96, 64]])
    _, trained, _ = trained_on([own._replace(ignored=region) for own in OBJECTS], **every)
    _, plain, _ = trained_on(**every)
    assert 0 < trained.sum() < plain.sum()
    assert not (trained & ~plain).any()


@pytest.mark.parametrize("beta", [100.0, 1000.0])
def test_the_box_loss_is_quadratic_below_beta(beta):
    every = {"samples_per_image": MANY, "positive_fraction": 1.0}
    losses, _, _ = trained_on(**every, smooth_l1_beta=beta)
    twice, _, _ = trained_on(**every, smooth_l1_beta=2 * beta)
    torch.testing.assert_close(losses["loss_rpn_box"], 2 * twice["loss_rpn_box"])
    torch.testing.assert_close(losses["loss_rpn_cls"], twice["loss_rpn_cls"])


def test_a_beta_of_0_is_the_l1_loss():
    every = {"samples_per_image": MANY, "positive_fraction": 1.0}
    _, trained, head = trained_on(**every, smooth_l1_beta=0.0)
    moved = torch.cat([each.grad.flatten() for each in head.codes])
    torch.testing.assert_close(
        moved[moved != 0].abs(), torch.full_like(moved[moved != 0], 1 / int(trained.sum()))
    )


def test_images_without_objects_have_no_box_loss():
    nothing = [Objects(NONE, torch.empty(0).long(), NONE)] * 2
    losses, trained, _ = trained_on(nothing)
    assert losses["loss_rpn_box"] == 0
    assert trained.sum(1).tolist() == [256, 256]
