"""The second stage: torchvision's where their options meet, and each option's law."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align, roi_pool
from torchvision.ops.poolers import LevelMapper

from tract_transfer.models.detection.options import BoxOptions
from tract_transfer.models.detection.roi_heads import BoxHeads, RoiPooler
from tract_transfer.models.detection.rpn import Objects

SIZES = [(64, 96), (50, 70)]
MANY = 10**6
NONE = torch.empty(0, 4)
OBJECTS = [
    Objects(torch.tensor([[5.0, 5, 40, 50], [50, 10, 90, 60]]), torch.tensor([0, 2]), NONE),
    Objects(torch.tensor([[1.0, 2, 30, 48]]), torch.tensor([1]), NONE),
]


def some_maps() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 64 // s, 96 // s, generator=generator) for s in (4, 8)]


def some_proposals(count: int = 40) -> list[torch.Tensor]:
    """Boxes everywhere, some near the objects."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for own, (height, width) in zip(OBJECTS, SIZES, strict=True):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width - 9, height - 9])
        side = 3 + torch.rand(count, 2, generator=generator) * 30
        near = own.boxes.repeat(5, 1) + torch.randn(5 * len(own.boxes), 4, generator=generator) * 3
        boxes = torch.cat([torch.cat([corner, corner + side], 1), near])
        limit = torch.tensor([width, height, width, height])
        found.append(torch.minimum(boxes.clamp(min=0), limit))
    return found


def heads(num_classes: int = 3, **options) -> BoxHeads:
    torch.manual_seed(0)
    chosen = BoxOptions(**{"pool_size": 3, **options})
    box_head = nn.Sequential(nn.Flatten(), nn.Linear(3 * chosen.pool_size**2, 8), nn.Tanh())
    model = BoxHeads([4, 8], box_head, 8, num_classes, chosen)
    nn.init.normal_(model.box_predictor.cls_score.weight)
    nn.init.normal_(model.box_predictor.bbox_pred.weight, std=0.5)
    return model


class BackgroundFirst(nn.Module):
    """Our predictor as torchvision orders classes."""

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, features):
        logits, codes = self.predictor(features)
        return logits.roll(1, 1), torch.cat([torch.zeros(len(codes), 4), codes.flatten(1)], 1)


class Pooled(nn.Module):
    def __init__(self, pooler: nn.Module) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, features, proposals, _sizes):
        return self.pooler(list(features.values()), proposals)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_torchvision_s(training):
    ours = heads(rois_per_image=MANY, positive_fraction=1.0, score_threshold=0.2).train(training)
    theirs = RoIHeads(
        Pooled(ours.pooler),
        ours.box_head,
        BackgroundFirst(ours.box_predictor),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=MANY,
        positive_fraction=1.0,
        bbox_reg_weights=None,
        score_thresh=0.2,
        nms_thresh=0.5,
        detections_per_img=100,
    ).train(training)
    maps = some_maps()
    targets = [{"boxes": each.boxes, "labels": each.labels + 1} for each in OBJECTS]
    expected, expected_losses = theirs(dict(enumerate(maps)), some_proposals(), SIZES, targets)
    found, losses = ours(maps, some_proposals(), SIZES, OBJECTS if training else None)
    if training:
        torch.testing.assert_close(losses["loss_cls"], expected_losses["loss_classifier"])
        torch.testing.assert_close(losses["loss_box"], expected_losses["loss_box_reg"])
        assert losses["loss_box"] > 0
        return
    for mine, other in zip(found, expected, strict=True):
        assert len(mine["boxes"]) > 10
        torch.testing.assert_close(mine["boxes"], other["boxes"], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(mine["scores"], other["scores"])
        assert torch.equal(mine["labels"], other["labels"] - 1)


# ------------------------------------------------------------------------------ detections


@torch.no_grad()
def detections(count: int = 40, **options) -> list[dict[str, torch.Tensor]]:
    return heads(**options).eval()(some_maps(), some_proposals(count), SIZES)[0]


def test_the_threshold_the_nms_and_the_number_decide_what_remains():
    every = detections(score_threshold=0.0, nms_iou=1.0, max_detections=MANY)
    for found, proposals in zip(every, some_proposals(), strict=True):
        assert 2 * len(proposals) < len(found["boxes"]) <= 3 * len(proposals)
    some = detections(score_threshold=0.4, nms_iou=1.0, max_detections=MANY)
    few = detections(score_threshold=0.0, nms_iou=1.0, max_detections=7)
    for all_found, above, best in zip(every, some, few, strict=True):
        assert torch.equal(above["scores"], all_found["scores"][all_found["scores"] > 0.4])
        assert torch.equal(best["scores"], all_found["scores"][:7])
    for found in detections(score_threshold=0.0, nms_iou=0.3, max_detections=MANY):
        same = found["labels"][:, None] == found["labels"]
        iou = box_iou(found["boxes"], found["boxes"]).fill_diagonal_(0)
        assert iou[same].max() <= 0.3 < iou.max()


def test_one_box_for_all_classes_or_one_for_each():
    for agnostic, outputs in ((True, 4), (False, 12)):
        options = {"class_agnostic": agnostic, "score_threshold": 0.0, "nms_iou": 1.0}
        assert heads(**options).box_predictor.bbox_pred.out_features == outputs
        (found, _) = detections(**options, max_detections=MANY)
        boxes = {label: found["boxes"][found["labels"] == label] for label in (0, 1, 2)}
        same = all(
            any(torch.equal(box, other) for other in boxes[label])
            for box in boxes[0]
            for label in (1, 2)
        )
        assert same == agnostic
        losses = heads(**options).train()(some_maps(), some_proposals(), SIZES, OBJECTS)[1]
        assert losses["loss_box"] > 0


def test_codes_are_in_units_of_their_standard_deviation():
    proposal = torch.tensor([[20.0, 20, 40, 30]])
    for std in ([0.1, 0.1, 0.2, 0.2], [1.0, 0.5, 0.3, 0.7]):
        model = heads(1, box_std=std, score_threshold=0.0).eval()
        nn.init.zeros_(model.box_predictor.bbox_pred.weight)
        codes = torch.tensor([0.3, -0.2, 0.4, 0.1])
        model.box_predictor.bbox_pred.bias.data.copy_(codes)
        (found,), _ = model([m[:1] for m in some_maps()], [proposal], SIZES[:1])
        x1, y1, x2, y2 = found["boxes"][0].tolist()
        dx, dy, dw, dh = (codes * torch.tensor(std)).tolist()
        assert (x1 + x2) / 2 == pytest.approx(30 + dx * 20, abs=1e-3)
        assert (y1 + y2) / 2 == pytest.approx(25 + dy * 10, abs=1e-3)
        assert x2 - x1 == pytest.approx(20 * torch.tensor(dw).exp().item(), abs=1e-3)
        assert y2 - y1 == pytest.approx(10 * torch.tensor(dh).exp().item(), abs=1e-3)


def test_nothing_proposed_is_nothing_found():
    (one, two), _ = heads().eval()(some_maps(), [NONE, NONE], SIZES)
    assert len(one["boxes"]) == len(two["scores"]) == 0


# ---------------------------------------------------------------------------------- losses


def trained_on(objects=OBJECTS, **options) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The proposals that went into the pooler, and the losses."""
    model = heads(**options).train()
    seen = []
    model.pooler.register_forward_pre_hook(lambda _module, inputs: seen.extend(inputs[1]))
    torch.manual_seed(0)
    _, losses = model(some_maps(), some_proposals(), SIZES, objects)
    return seen, losses


@pytest.mark.parametrize("count, fraction", [(16, 0.25), (8, 0.5), (12, 0.0)])
def test_so_many_proposals_are_trained_on(count, fraction):
    seen, losses = trained_on(rois_per_image=count, positive_fraction=fraction)
    for boxes, own in zip(seen, OBJECTS, strict=True):
        assert len(boxes) == count
        positives = (box_iou(own.boxes, boxes).amax(0) >= 0.5).sum()
        assert positives == int(count * fraction)
    assert (losses["loss_box"] > 0) == (fraction > 0)


@pytest.mark.parametrize("fg_iou, bg_iou", [(0.5, [0.1, 0.5]), (0.7, [0.0, 0.2])])
def test_ious_decide_what_a_proposal_is(fg_iou, bg_iou):
    seen, _ = trained_on(rois_per_image=MANY, positive_fraction=1.0, fg_iou=fg_iou, bg_iou=bg_iou)
    for boxes, own, proposals in zip(seen, OBJECTS, some_proposals(), strict=True):
        candidates = torch.cat([proposals, own.boxes])  # the objects themselves are there
        iou = box_iou(own.boxes, candidates).amax(0)
        chosen = (iou >= fg_iou) | ((iou >= bg_iou[0]) & (iou < bg_iou[1]))
        assert chosen.sum() < len(candidates)
        assert {tuple(box) for box in boxes.tolist()} == {
            tuple(box) for box in candidates[chosen].tolist()
        }


def test_ignored_regions_are_no_background():
    every = {"rois_per_image": MANY, "positive_fraction": 1.0}
    region = torch.tensor([[0.0, 0, 96, 64]])
    seen, _ = trained_on([own._replace(ignored=region) for own in OBJECTS], **every)
    for boxes, own in zip(seen, OBJECTS, strict=True):
        assert len(boxes) >= len(own.boxes)
        assert box_iou(own.boxes, boxes).amax(0).min() >= 0.5


def test_the_box_loss_is_quadratic_below_beta():
    every = {"rois_per_image": MANY, "positive_fraction": 1.0}
    one, two = (trained_on(**every, smooth_l1_beta=beta)[1] for beta in (100.0, 200.0))
    torch.testing.assert_close(one["loss_box"], 2 * two["loss_box"])
    absolute, nearly = (trained_on(**every, smooth_l1_beta=beta)[1] for beta in (0.0, 1e-6))
    torch.testing.assert_close(absolute["loss_box"], nearly["loss_box"])


def test_no_proposal_left_is_no_loss():
    nothing = [Objects(NONE, torch.empty(0).long(), NONE)] * 2
    _, losses = heads().train()(some_maps(), [NONE, NONE], SIZES, nothing)
    assert losses["loss_cls"] == losses["loss_box"] == 0


# ----------------------------------------------------------------------------------- pooler


def with_image(proposals: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(
        [torch.cat([torch.full((len(b), 1), i), b], 1) for i, b in enumerate(proposals)]
    )


@pytest.mark.parametrize("size, ratio", [(7, 0), (7, 2), (3, 1)])
def test_one_map_is_pooled_as_torchvision_pools(size, ratio):
    fine, proposals = some_maps()[0], some_proposals()
    aligned = RoiPooler([4], BoxOptions(pool_size=size, sampling_ratio=ratio))([fine], proposals)
    assert torch.equal(
        aligned, roi_align(fine, with_image(proposals), size, 1 / 4, ratio, aligned=True)
    )
    largest = RoiPooler([4], BoxOptions(pool_size=size, pooler="roi_pool"))([fine], proposals)
    assert torch.equal(largest, roi_pool(fine, with_image(proposals), size, 1 / 4))


def test_a_box_is_pooled_from_the_map_its_size_suits():
    sides = torch.tensor([1.0, 20, 50, 111, 113, 200, 223, 225, 447, 449, 900, 4000])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], 1)
    pooler = RoiPooler([4, 8, 16, 32], BoxOptions())
    expected = LevelMapper(2, 5)([boxes])
    assert pooler._level_of(boxes).tolist() == expected.tolist()
    assert expected.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_several_maps_are_pooled_as_torchvision_pools():
    """But for half a cell: torchvision's pooler is not aligned."""
    maps = [torch.randn(1, 3, 256 // s, 256 // s) for s in (8, 16)]
    proposals = [torch.tensor([[10.0, 20, 100, 90], [5, 5, 250, 240], [30, 30, 200, 180]])]
    theirs = MultiScaleRoIAlign(["0", "1"], 7, 2)
    ours = RoiPooler([8, 16], BoxOptions(sampling_ratio=2))
    level = ours._level_of(proposals[0])
    assert level.tolist() == [0, 1, 0]
    half = torch.tensor([8.0, 16.0])[level][:, None] / 2
    expected = theirs({"0": maps[0], "1": maps[1]}, proposals, [(256, 256)])
    torch.testing.assert_close(ours(maps, [proposals[0] + half]), expected)
    assert ours(maps, [NONE]).shape == (0, 3, 7, 7)


def test_maps_of_16_bits_are_pooled_in_float32():
    """A coordinate of 16 bits has 8 of precision: boxes would move."""
    maps = [each.bfloat16() for each in some_maps()]
    pooler = RoiPooler([4, 8], BoxOptions())
    expected = pooler([each.float() for each in maps], some_proposals())
    assert torch.equal(pooler(maps, some_proposals()), expected)
