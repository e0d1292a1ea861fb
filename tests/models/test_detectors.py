"""The four kinds of Faster R-CNN: what they have in common, their pyramids and box heads."""

import copy

import pytest
import torch
from small_detectors import KINDS, TARGETS, detector, losses_of, picture, target
from torch import nn

from tract_transfer.models import build_backbone
from tract_transfer.models.detection.detectors import accept_any_size
from tract_transfer.models.detection.two_stage import TwoStageDetector
from tract_transfer.models.freeze import set_norm


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def eager(kind) -> TwoStageDetector:
    """A detector that finds something everywhere."""
    return detector(kind, box={"score_threshold": 0.0, "max_detections": 20}).eval()


def test_four_finite_losses_reach_the_first_layer(kind):
    model = detector(kind)
    losses = losses_of(model)
    assert sorted(losses) == ["loss_box", "loss_cls", "loss_rpn_box", "loss_rpn_cls"]
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    gradient = model.get_submodule(f"backbone.{model.backbone.first_layers[0]}").weight.grad
    assert gradient.isfinite().all()
    assert gradient.any()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert all(name.startswith("backbone.model.norm.") for name in unused)  # the last of a ViT
    background = losses_of(model, [target([], []), target([], [])])
    assert background["loss_rpn_box"] == background["loss_box"] == 0
    for losses in (background, losses_of(model, [TARGETS[0], target([], [])])):
        assert all(loss.isfinite() for loss in losses.values())


@torch.no_grad()
def test_detections_are_in_the_pixels_of_each_image(eager):
    images = [picture(300, 400), picture(30, 20), picture(64, 96), picture(200, 70)]
    detections = eager.eval()(images)
    assert len(detections) == len(images)
    for image, detected in zip(images, detections, strict=True):
        boxes, scores, labels = detected["boxes"], detected["scores"], detected["labels"]
        size = torch.tensor(image.shape[:0:-1])
        assert 0 < len(boxes) == len(scores) == len(labels) <= 20
        assert (boxes >= 0).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert (boxes[:, 2:] <= size * (1 + 1e-6)).all()
        assert boxes[:, 2].max() > size[0] / 2  # and not in pixels of the resized image
        assert set(labels.tolist()) <= {0, 1, 2}
        assert torch.equal(scores, scores.sort(descending=True).values)


@torch.no_grad()
def test_detections_do_not_depend_on_other_images_of_the_batch(eager):
    """For an image that sets the padded size."""
    image = picture(64, 96)
    (alone,) = eager.eval()([image])
    for other in (picture(64, 96, 1), picture(64, 64, 2)):
        for detected in (eager([image, other])[0], eager([other, image])[1]):
            torch.testing.assert_close(detected, alone, rtol=1e-3, atol=1e-3)


def test_autocast_computes_boxes_in_float32(eager):
    pooled = []

    def watch(_module, args):
        assert all(boxes.dtype == torch.float32 for boxes in args[1])
        pooled.extend(value for boxes in args[1] for value in boxes.flatten().tolist())

    model = copy.deepcopy(eager)
    model.roi_heads.pooler.register_forward_pre_hook(watch)
    truth = {"boxes": torch.tensor([[3.4, 5.0, 61.3, 57.7]]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()([picture(64, 96)], [truth])
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        assert set(truth["boxes"].flatten().tolist()) <= set(pooled)
        with torch.no_grad():
            (detections,) = model.eval()([picture(64, 96)])
    assert detections["boxes"].dtype == detections["scores"].dtype == torch.float32


def test_options_and_classes_reach_both_stages(kind):
    model = detector(kind, rpn={"nms_iou": 0.61}, box={"nms_iou": 0.37})
    assert (model.rpn.options.nms_iou, model.roi_heads.options.nms_iou) == (0.61, 0.37)
    predictor = model.roi_heads.box_predictor
    assert (predictor.cls_score.out_features, predictor.bbox_pred.out_features) == (4, 12)


def test_a_copy_trains_its_own_weights(kind):
    """The average of the weights is a copy: its box head must not read the original's layers."""
    model = detector(kind)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert losses_of(other) == losses_of(detector(kind)) != losses_of(model)


# Pyramids


@pytest.mark.parametrize("num_levels", [2, 3, 4])
def test_fpn_uses_the_last_strides(num_levels):
    model = detector(num_levels=num_levels)
    strides = [info.stride for info in model.backbone.pyramid().values()]
    assert strides == [2, 4, 8, 16, 32]
    assert model.rpn.strides == [*strides[-num_levels:], 64]
    assert model.roi_heads.pooler.strides == strides[-num_levels:]
    assert all(loss.isfinite() for loss in losses_of(model).values())


@pytest.mark.parametrize(
    "name, args, strides",
    [
        ("timm/test_vit", {}, [4, 8, 16, 32, 64]),
        ("cifar/vit", {"depth": 1, "width": 48}, [1, 2, 4, 8, 16]),
        ("timm/vit_tiny_patch16_224", {"depth": 1, "dynamic_img_size": True}, [4, 8, 16, 32, 64]),
    ],
)
def test_vitdet_has_a_pyramid_around_the_patch_size(name, args, strides):
    backbone = build_backbone(name, args=args)
    names = list(backbone.state_dict())
    model = detector("torchvision_vitdet", backbone=backbone)
    assert model.rpn.strides == strides
    assert list(backbone.state_dict()) == names
    shapes = []
    model.rpn.head.register_forward_pre_hook(
        lambda _module, args: shapes.extend(tuple(features.shape[2:]) for features in args[0])
    )
    losses_of(model)
    # Images of 64x96 and 80x64, padded to a multiple of the second-coarsest stride.
    height, width = (-(-side // strides[-2]) * strides[-2] for side in (80, 96))
    assert shapes == [(-(-height // stride), -(-width // stride)) for stride in strides]


def test_vit_of_any_size_is_the_same_at_its_own_size():
    backbone = build_backbone("cifar/vit", args={"depth": 2, "width": 48}).eval()
    images = torch.rand(1, 3, backbone.image_size_px, backbone.image_size_px)
    (name,) = backbone.pyramid()
    features, pooled = backbone.maps(images, [name]), backbone.pooled(images)
    accept_any_size(backbone)
    assert backbone.image_size_px is None
    torch.testing.assert_close(backbone.maps(images, [name]), features)
    torch.testing.assert_close(backbone.pooled(images), pooled)


# Box heads that are the backbone's own layers


@pytest.mark.parametrize(
    "kind, last", [("torchvision_c4", "layer4."), ("torchvision_c5", "pre_logits.")]
)
def test_box_head_remains_part_of_the_backbone(kind, last):
    plain, model = build_backbone(KINDS[kind][0], args=KINDS[kind][1]), detector(kind)
    assert list(model.backbone.state_dict()) == list(plain.state_dict())
    assert not any(last in name for name in model.roi_heads.state_dict())
    sum(losses_of(model).values()).backward()
    assert all(p.grad is not None for n, p in model.backbone.named_parameters() if last in n)


@pytest.mark.parametrize(
    "name, args", [("cifar/resnet18", {"width": 8}), ("torchvision/resnet18", {})]
)
def test_last_stage_of_c4_sees_only_proposals(name, args):
    """Its BatchNorms would mix the statistics of complete images into those of proposals."""
    model = detector("torchvision_c4", backbone=build_backbone(name, args=args))
    shapes = []
    model.backbone.model.layer4.register_forward_pre_hook(
        lambda _module, args: shapes.append(args[0].shape)
    )
    losses_of(model)
    (shape,) = shapes
    assert (shape[0], *shape[2:]) == (2 * 16, 14, 14)


def test_extra_norm_of_c4_normalizes_and_is_synchronized_like_the_others():
    assert isinstance(detector("torchvision_c4").roi_heads.box_head.norm, nn.Identity)
    model = detector("torchvision_c4", extra_norm=True)
    norm, outputs = model.roi_heads.box_head.norm, []
    assert type(norm) is nn.BatchNorm2d
    norm.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    losses_of(model)
    torch.testing.assert_close(outputs[0].mean((0, 2, 3)), torch.zeros(64), rtol=0, atol=1e-5)
    synced = set_norm(build_backbone("cifar/resnet18", args={"width": 8}), "synced")
    model = detector("torchvision_c4", backbone=synced, extra_norm=True)
    assert isinstance(model.roi_heads.box_head.norm, nn.SyncBatchNorm)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, args",
    [("timm/vgg11", {"mlp_ratio": 0.01}), ("torchvision/vgg11", {"init_weights": False})],
)
def test_box_head_of_c5_is_the_classifier_of_the_vgg(name, args):
    """An image of 7 x 7 cells, pooled to itself, has the features of the VGG."""
    images = torch.rand(1, 3, 224, 224)
    backbone = build_backbone(name, args=args).eval()
    model = detector("torchvision_c5", backbone=backbone).eval()
    assert model.map_names == ["features.19"]
    assert model.rpn.strides == [16]
    pooled, head = backbone.model.features(backbone.normalize(images)), model.roi_heads.box_head
    torch.testing.assert_close(head(pooled), backbone.pooled(images))
    assert not torch.equal(head.train()(pooled), head(pooled))  # by dropout
    without = detector("torchvision_c5", backbone=backbone, dropout=0.0).roi_heads.box_head
    assert torch.equal(without.train()(pooled), head.eval()(pooled))
