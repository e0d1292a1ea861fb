"""The four kinds of Faster R-CNN: what they share, and feature pyramids."""

import copy

import pytest
import torch
from small_detectors import KINDS, TARGETS, detector, losses_of, picture, target

from tract_transfer.models import build_backbone
from tract_transfer.models.detection.two_stage import TwoStageDetector


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def eager(kind) -> TwoStageDetector:
    """A detector that finds something everywhere."""
    return detector(kind, box={"score_threshold": 0.0, "max_detections": 20}).eval()


def test_training_gives_four_finite_losses_that_reach_the_first_layer(kind):
    model = detector(kind)
    losses = losses_of(model)
    assert sorted(losses) == ["loss_box", "loss_cls", "loss_rpn_box", "loss_rpn_cls"]
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    gradient = model.get_submodule(f"backbone.{model.backbone.first_layers[0]}").weight.grad
    assert gradient.isfinite().all()
    assert gradient.any()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {n for n in unused if n.startswith("backbone.model.norm.")}  # a ViT's last


def test_images_without_boxes_are_background(kind):
    model = detector(kind)
    losses = losses_of(model, [target([], []), target([], [])])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_rpn_box"] == losses["loss_box"] == 0
    mixed = losses_of(model, [TARGETS[0], target([], [])])
    assert all(loss.isfinite() for loss in mixed.values())


@torch.no_grad()
def test_detections_are_in_the_pixels_of_each_image(eager):
    images = [picture(300, 400), picture(30, 20), picture(64, 96), picture(200, 70)]
    found = eager.eval()(images)
    assert len(found) == len(images)
    for image, each in zip(images, found, strict=True):
        height, width = image.shape[-2:]
        boxes, scores, labels = each["boxes"], each["scores"], each["labels"]
        assert boxes.dtype == scores.dtype == torch.float32
        assert 0 < len(boxes) == len(scores) == len(labels) <= 20
        assert boxes.min() >= 0
        assert boxes[:, [0, 2]].max() <= width * (1 + 1e-6)
        assert boxes[:, [1, 3]].max() <= height * (1 + 1e-6)
        assert boxes[:, 2].max() > width / 2  # and not in those of the resized image
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert set(labels.tolist()) <= {0, 1, 2}
        assert torch.equal(scores, scores.sort(descending=True).values)


@torch.no_grad()
def test_company_of_no_larger_images_changes_nothing(eager):
    """An image that sets the padded size is seen as when it is alone."""
    image = picture(64, 96)
    (alone,) = eager.eval()([image])
    for company in (picture(64, 96, 1), picture(64, 64, 2)):
        for together in (eager([image, company])[0], eager([company, image])[1]):
            for key in alone:
                torch.testing.assert_close(together[key], alone[key], rtol=1e-3, atol=1e-3)


def test_autocast_trains_and_finds_boxes_in_float32(eager):
    seen = []

    def watch(_module, inputs):
        seen.extend(box for boxes in inputs[1] for box in boxes.flatten().tolist())
        assert all(boxes.dtype == torch.float32 for boxes in inputs[1])

    eager = copy.deepcopy(eager)
    eager.roi_heads.pooler.register_forward_pre_hook(watch)
    truth = {"boxes": torch.tensor([[3.4, 5.0, 61.3, 57.7]]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", torch.bfloat16):
        losses = eager.train()([picture(64, 96)], [truth])
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        assert set(truth["boxes"].flatten().tolist()) <= set(seen)
        with torch.no_grad():
            (found,) = eager.eval()([picture(64, 96)])
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_a_difficult_object_kept_is_another_and_dropped_is_not_there():
    hard = [target([[5, 5, 40, 50], [50, 10, 90, 60]], [0, 2], [False, True]), TARGETS[1]]
    easy_alone = [target([[5, 5, 40, 50]], [0]), TARGETS[1]]
    kept, dropped, ignored = (
        losses_of(detector(difficult_in_training=policy), hard)
        for policy in ("keep", "drop", "ignore")
    )
    assert kept == losses_of(detector(), TARGETS)
    assert dropped == losses_of(detector(), easy_alone)
    assert ignored["loss_rpn_cls"] not in (kept["loss_rpn_cls"], dropped["loss_rpn_cls"])


def test_the_number_of_classes_leaves_room_for_the_background(kind):
    predictor = detector(kind).roi_heads.box_predictor
    assert (predictor.cls_score.out_features, predictor.bbox_pred.out_features) == (4, 12)


@pytest.mark.parametrize("group", ["rpn", "box"])
def test_an_unknown_option_names_the_nearest(kind, group):
    with pytest.raises(ValueError, match=rf"^{group}\.nms_io: unknown\. Did you mean 'nms_iou'"):
        detector(kind, **{group: {"nms_io": 0.5}})


def test_options_reach_both_stages(kind):
    model = detector(kind, rpn={"nms_iou": 0.61}, box={"nms_iou": 0.37})
    assert (model.rpn.options.nms_iou, model.roi_heads.options.nms_iou) == (0.61, 0.37)


def test_a_copy_trains_on_its_own_weights(kind):
    """The average of the weights is a copy: its box head must not read the original's layers."""
    model = detector(kind)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert losses_of(other) == losses_of(detector(kind)) != losses_of(model)


# ------------------------------------------------------------------------- feature pyramids


@pytest.mark.parametrize("num_levels", [2, 3, 4])
def test_the_pyramid_stands_on_the_last_strides(num_levels):
    model = detector(num_levels=num_levels)
    strides = [info.stride for info in model.backbone.pyramid().values()]
    assert strides == [2, 4, 8, 16, 32]
    assert list(model.backbone.pyramid())[-num_levels:] == model.map_names
    assert model.size_divisor == 32
    assert model.rpn.strides == [*strides[-num_levels:], 64]
    assert model.roi_heads.pooler.strides == strides[-num_levels:]
    assert all(loss.isfinite() for loss in losses_of(model).values())


@pytest.mark.parametrize("num_levels", [1, 6])
def test_a_backbone_with_too_few_strides_is_refused(num_levels):
    with pytest.raises(ValueError, match=rf"num_levels = {num_levels}.*\[2, 4, 8, 16, 32\]"):
        detector(num_levels=num_levels)
    plain = build_backbone("timm/vit_tiny_patch16_224", args={"depth": 1, "dynamic_img_size": True})
    with pytest.raises(ValueError, match=r"this backbone has \[16\]"):
        detector(backbone=plain)


def test_a_backbone_of_one_size_is_refused():
    with pytest.raises(ValueError, match="takes 32 px alone"):
        detector(backbone=build_backbone("cifar/vit", args={"depth": 1}))
