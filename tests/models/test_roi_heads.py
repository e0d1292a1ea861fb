"""The second stage: torchvision's where the options are the same, and each option."""

import pytest
import torch
from small_detectors import MANY, NO_BOXES, NO_OBJECTS, OBJECTS, SIZES, some_maps
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align, roi_pool
from torchvision.ops.poolers import LevelMapper

from tract_transfer.models.detection.roi_heads import BoxHeads, BoxOptions, RoiPooler

ALL = {"rois_per_image": MANY, "positive_fraction": 1.0}
UNFILTERED = {"score_threshold": 0.0, "nms_iou": 1.0, "max_detections": MANY}


def some_proposals(count: int = 40) -> list[torch.Tensor]:
    """Boxes everywhere, some near the objects."""
    generator = torch.Generator().manual_seed(1)
    proposals = []
    for image, (height, width) in zip(OBJECTS, SIZES, strict=True):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width - 9, height - 9])
        side = 3 + torch.rand(count, 2, generator=generator) * 30
        near = image.boxes.repeat(5, 1)
        near = near + torch.randn(near.shape, generator=generator) * 3
        boxes = torch.cat([torch.cat([corner, corner + side], 1), near])
        limit = torch.tensor([width, height, width, height])
        proposals.append(torch.minimum(boxes.clamp(min=0), limit))
    return proposals


def heads(num_classes: int = 3, **options) -> BoxHeads:
    torch.manual_seed(0)
    box_options = BoxOptions(**{"pool_size": 3, **options})
    box_head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 3**2, 8), nn.Tanh())
    model = BoxHeads([4, 8], box_head, 8, num_classes, box_options)
    nn.init.normal_(model.box_predictor.cls_score.weight)
    nn.init.normal_(model.box_predictor.bbox_pred.weight, std=0.5)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_heads_are_those_of_torchvision(training):
    ours = heads(**ALL, score_threshold=0.2).train(training)

    def background_first(features):
        logits, codes = ours.box_predictor(features)
        return logits.roll(1, 1), torch.cat([torch.zeros(len(codes), 4), codes.flatten(1)], 1)

    theirs = RoIHeads(
        lambda features, proposals, _sizes: ours.pooler(list(features.values()), proposals),
        ours.box_head,
        background_first,
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
    targets = [{"boxes": image.boxes, "labels": image.labels + 1} for image in OBJECTS]
    expected, expected_losses = theirs(dict(enumerate(maps)), some_proposals(), SIZES, targets)
    images, losses = ours(maps, some_proposals(), SIZES, OBJECTS if training else None)
    if training:
        torch.testing.assert_close(losses["loss_cls"], expected_losses["loss_classifier"])
        torch.testing.assert_close(losses["loss_box"], expected_losses["loss_box_reg"])
        assert losses["loss_box"] > 0
        return
    for ours_in_image, theirs_in_image in zip(images, expected, strict=True):
        assert len(ours_in_image["boxes"]) > 10
        theirs_in_image["labels"] = theirs_in_image["labels"] - 1
        torch.testing.assert_close(ours_in_image, theirs_in_image, rtol=1e-5, atol=1e-3)


# Detections


@torch.no_grad()
def detect(**options) -> list[dict[str, torch.Tensor]]:
    return heads(**options).eval()(some_maps(), some_proposals(), SIZES)[0]


def test_options_decide_which_detections_remain():
    every = detect(**UNFILTERED)
    above = detect(**{**UNFILTERED, "score_threshold": 0.4})
    best = detect(**{**UNFILTERED, "max_detections": 7})
    for row, proposals in enumerate(some_proposals()):
        scores = every[row]["scores"]
        assert 2 * len(proposals) < len(scores) <= 3 * len(proposals)
        assert torch.equal(above[row]["scores"], scores[scores > 0.4])
        assert torch.equal(best[row]["scores"], scores[:7])
    for detections in detect(**{**UNFILTERED, "nms_iou": 0.3}):
        same_class = detections["labels"][:, None] == detections["labels"]
        iou = box_iou(detections["boxes"], detections["boxes"]).fill_diagonal_(0)
        assert iou[same_class].max() <= 0.3 < iou.max()


@pytest.mark.parametrize("agnostic, outputs", [(True, 4), (False, 12)])
def test_boxes_are_per_class_or_shared(agnostic, outputs):
    options = {"class_agnostic": agnostic, **UNFILTERED}
    assert heads(**options).box_predictor.bbox_pred.out_features == outputs
    detections, _ = detect(**options)
    first, *others = (
        {tuple(box) for box in detections["boxes"][detections["labels"] == label].tolist()}
        for label in (0, 1, 2)
    )
    assert all((first <= boxes) == agnostic for boxes in others)
    losses = heads(**options).train()(some_maps(), some_proposals(), SIZES, OBJECTS)[1]
    assert losses["loss_box"] > 0


@pytest.mark.parametrize("std", [[0.1, 0.1, 0.2, 0.2], [1.0, 0.5, 0.3, 0.7]])
def test_codes_are_in_units_of_their_standard_deviation(std):
    proposal = torch.tensor([[20.0, 20, 40, 30]])
    model = heads(1, box_std=std, score_threshold=0.0).eval()
    nn.init.zeros_(model.box_predictor.bbox_pred.weight)
    codes = torch.tensor([0.3, -0.2, 0.4, 0.1])
    model.box_predictor.bbox_pred.bias.data.copy_(codes)
    (detections,), _ = model([m[:1] for m in some_maps()], [proposal], SIZES[:1])
    dx, dy, dw, dh = codes * torch.tensor(std)
    center = torch.stack([30 + dx * 20, 25 + dy * 10])
    half = torch.stack([20 * dw.exp(), 10 * dh.exp()]) / 2
    expected = torch.cat([center - half, center + half])
    torch.testing.assert_close(detections["boxes"][0], expected, rtol=0, atol=1e-3)


def test_without_proposals_there_are_no_detections_and_no_losses():
    detections, _ = heads().eval()(some_maps(), [NO_BOXES, NO_BOXES], SIZES)
    assert [len(image["boxes"]) for image in detections] == [0, 0]
    _, losses = heads().train()(some_maps(), [NO_BOXES, NO_BOXES], SIZES, NO_OBJECTS)
    assert losses["loss_cls"] == losses["loss_box"] == 0


# Losses


def train(objects=OBJECTS, **options) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return the sampled proposals of each image, and the losses."""
    model, sampled = heads(**options).train(), []
    model.pooler.register_forward_pre_hook(lambda _module, args: sampled.extend(args[1]))
    torch.manual_seed(0)
    _, losses = model(some_maps(), some_proposals(), SIZES, objects)
    return sampled, losses


@pytest.mark.parametrize("count, fraction", [(16, 0.25), (8, 0.5), (12, 0.0)])
def test_options_set_the_number_of_sampled_proposals(count, fraction):
    sampled, losses = train(rois_per_image=count, positive_fraction=fraction)
    for boxes, image in zip(sampled, OBJECTS, strict=True):
        assert len(boxes) == count
        positives = (box_iou(image.boxes, boxes).amax(0) >= 0.5).sum()
        assert positives == int(count * fraction)
    assert (losses["loss_box"] > 0) == (fraction > 0)


@pytest.mark.parametrize("fg_iou, bg_iou", [(0.5, [0.1, 0.5]), (0.7, [0.0, 0.2])])
def test_ious_decide_which_proposals_are_sampled(fg_iou, bg_iou):
    sampled, _ = train(**ALL, fg_iou=fg_iou, bg_iou=bg_iou)
    for boxes, image, proposals in zip(sampled, OBJECTS, some_proposals(), strict=True):
        candidates = torch.cat([proposals, image.boxes])  # the objects themselves are candidates
        iou = box_iou(image.boxes, candidates).amax(0)
        expected = (iou >= fg_iou) | ((iou >= bg_iou[0]) & (iou < bg_iou[1]))
        assert expected.sum() < len(candidates)
        assert set(map(tuple, boxes.tolist())) == set(map(tuple, candidates[expected].tolist()))


@pytest.mark.parametrize("beta, other, factor", [(100.0, 200.0, 2), (0.0, 1e-6, 1)])
def test_box_loss_is_quadratic_below_beta_and_l1_at_0(beta, other, factor):
    first, second = (train(**ALL, smooth_l1_beta=b)[1]["loss_box"] for b in (beta, other))
    torch.testing.assert_close(first, factor * second)


# Pooling


@pytest.mark.parametrize("size, ratio", [(7, 0), (7, 2), (3, 1)])
def test_one_map_is_pooled_as_by_torchvision(size, ratio):
    features, proposals = some_maps()[0], some_proposals()
    image = torch.cat([boxes.new_full((len(boxes), 1), i) for i, boxes in enumerate(proposals)])
    rois = torch.cat([image, torch.cat(proposals)], 1)
    for options, expected in (
        ({"sampling_ratio": ratio}, roi_align(features, rois, size, 1 / 4, ratio, aligned=True)),
        ({"pooler": "roi_pool"}, roi_pool(features, rois, size, 1 / 4)),
    ):
        pooler = RoiPooler([4], BoxOptions(pool_size=size, **options))
        assert torch.equal(pooler([features], proposals), expected)


def test_level_of_a_box_is_that_of_torchvision():
    sides = torch.tensor([1.0, 20, 50, 111, 113, 200, 223, 225, 447, 449, 900, 4000])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], 1)
    levels = RoiPooler([4, 8, 16, 32], BoxOptions())._level_of(boxes).tolist()
    assert levels == LevelMapper(2, 5)([boxes]).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_several_maps_are_pooled_as_by_torchvision():
    """Except for half a cell: torchvision's pooler is not aligned."""
    maps = [torch.randn(1, 3, 256 // s, 256 // s) for s in (8, 16)]
    proposals = torch.tensor([[10.0, 20, 100, 90], [5, 5, 250, 240], [30, 30, 200, 180]])
    ours = RoiPooler([8, 16], BoxOptions(sampling_ratio=2))
    half_cells = torch.tensor([4.0, 8.0])[ours._level_of(proposals)][:, None]
    theirs = MultiScaleRoIAlign(["0", "1"], 7, 2)
    expected = theirs({"0": maps[0], "1": maps[1]}, [proposals], [(256, 256)])
    torch.testing.assert_close(ours(maps, [proposals + half_cells]), expected)
    assert ours(maps, [NO_BOXES]).shape == (0, 3, 7, 7)


def test_bfloat16_maps_are_pooled_in_float32():
    maps = [features.bfloat16() for features in some_maps()]
    pooler = RoiPooler([4, 8], BoxOptions())
    expected = pooler([features.float() for features in maps], some_proposals())
    assert torch.equal(pooler(maps, some_proposals()), expected)
