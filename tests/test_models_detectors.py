"""The four kinds of Faster R-CNN: what they share, and what each is made of."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import vgg11

from tract_transfer.models import DETECTORS, build_backbone
from tract_transfer.models.freeze import set_norm
from tract_transfer.models.two_stage import TwoStageDetector
from tract_transfer.models.vit import accept_any_size
from tract_transfer.models.weights import load_weights

PYRAMID = {"fpn_channels": 16, "head_dim": 32}
# Backbone, its arguments, the detector's own small ones.
KINDS = {
    "torchvision_fpn": ("timm/test_resnet", {}, PYRAMID),
    "torchvision_c4": ("cifar/resnet18", {"width": 8}, {}),
    "torchvision_c5": ("timm/vgg11", {"mlp_ratio": 0.01}, {}),
    "torchvision_vitdet": ("timm/test_vit", {}, PYRAMID),
}
SMALL = {"short_side_px": 64, "max_side_px": 96}
FEW = {"post_nms_train": 50, "post_nms_test": 50}


def detector(kind="torchvision_fpn", backbone=None, **args) -> TwoStageDetector:
    torch.manual_seed(0)
    name, backbone_args, small = KINDS[kind]
    backbone = backbone or build_backbone(name, args=backbone_args)
    rpn = {**FEW, **args.pop("rpn", {})}
    box = {"rois_per_image": 16, **args.pop("box", {})}
    return DETECTORS.get(kind)(backbone, 3, **{**SMALL, **small, **args}, rpn=rpn, box=box)


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def eager(kind) -> TwoStageDetector:
    """A detector that finds something everywhere."""
    return detector(kind, box={"score_threshold": 0.0, "max_detections": 20}).eval()


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def target(boxes, labels, difficult=None) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * len(labels), dtype=torch.bool),
        "image_id": 7,
    }


IMAGES = [picture(64, 96), picture(80, 64, 1)]
TARGETS = [target([[5, 5, 40, 50], [50, 10, 90, 60]], [0, 2]), target([[1, 2, 30, 70]], [1])]


def losses_of(model, targets=TARGETS) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return model.train()(IMAGES, targets)


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


# ------------------------------------------------------------------------------ plain ViTs


@pytest.mark.parametrize(
    "name, args, strides",
    [
        ("timm/test_vit", {}, [4, 8, 16, 32, 64]),
        ("cifar/vit", {"depth": 1, "width": 48}, [1, 2, 4, 8, 16]),
        ("timm/vit_tiny_patch16_224", {"depth": 1, "dynamic_img_size": True}, [4, 8, 16, 32, 64]),
    ],
)
def test_a_vit_sees_any_size_on_a_pyramid_around_its_patches(name, args, strides):
    backbone = build_backbone(name, args=args)
    names = list(backbone.state_dict())
    model = detector("torchvision_vitdet", backbone=backbone)
    assert model.rpn.strides == strides
    assert list(backbone.state_dict()) == names
    seen = []
    model.rpn.head.register_forward_pre_hook(lambda _module, inputs: seen.extend(inputs[0]))
    losses_of(model)
    # Images of 64x96 and 80x64, padded to a multiple of the second-coarsest stride.
    height, width = (-(-side // strides[-2]) * strides[-2] for side in (80, 96))
    assert [tuple(each.shape[2:]) for each in seen] == [
        (-(-height // stride), -(-width // stride)) for stride in strides
    ]


def test_at_its_own_size_a_freed_vit_is_the_same():
    backbone = build_backbone("cifar/vit", args={"depth": 2, "width": 48}).eval()
    size = backbone.image_size_px
    images = torch.rand(1, 3, size, size)
    (name,) = backbone.pyramid()
    before, pooled = backbone.maps(images, [name])[name], backbone.pooled(images)
    accept_any_size(backbone)
    assert backbone.image_size_px is None
    torch.testing.assert_close(backbone.maps(images, [name])[name], before)
    torch.testing.assert_close(backbone.pooled(images), pooled)


@pytest.mark.parametrize(
    "name, args, says",
    [
        ("timm/test_resnet", {}, r"maps of one stride.*\[2, 4, 8, 16, 32\].*torchvision_fpn"),
        (
            "timm/vit_tiny_patch16_224",
            {"img_size": 56, "depth": 1, "patch_size": 14, "embed_dim": 48},
            r"that 4 divides.*\[14\]",
        ),
    ],
)
def test_what_is_no_plain_vit_is_refused(name, args, says):
    with pytest.raises(ValueError, match=says):
        detector("torchvision_vitdet", backbone=build_backbone(name, args=args))


# ----------------------------------------------------------------- heads of the backbone's own


@pytest.mark.parametrize("kind", ["torchvision_c4", "torchvision_c5"])
def test_the_box_head_is_the_backbone_s_and_stays_there(kind):
    plain, model = detector(kind).backbone, detector(kind)
    last = {"torchvision_c4": "layer4.", "torchvision_c5": "pre_logits."}[kind]
    assert list(model.backbone.state_dict()) == list(plain.state_dict())
    assert not any(last in name for name in model.roi_heads.state_dict())
    sum(losses_of(model).values()).backward()
    assert all(p.grad is not None for n, p in model.backbone.named_parameters() if last in n)


@pytest.mark.parametrize("name", ["cifar/resnet18", "torchvision/resnet18"])
def test_the_fourth_stage_sees_proposals_alone(name):
    """Its BatchNorms would else mix the statistics of whole images into those of proposals."""
    args = {"width": 8} if name == "cifar/resnet18" else {}
    model = detector("torchvision_c4", backbone=build_backbone(name, args=args))
    seen = []
    model.backbone.model.layer4.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0])
    )
    losses_of(model)
    assert [len(each) for each in seen] == [2 * 16]
    assert seen[0].shape[2:] == (14, 14)


def test_the_extra_norm_is_normal_and_synchronised_where_the_others_are():
    assert isinstance(detector("torchvision_c4").roi_heads.box_head.norm, nn.Identity)
    model = detector("torchvision_c4", extra_norm=True)
    norm = model.roi_heads.box_head.norm
    assert type(norm) is nn.BatchNorm2d
    seen = []
    norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    losses_of(model)
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), torch.zeros(64), rtol=0, atol=1e-5)
    synced = set_norm(build_backbone("cifar/resnet18", args={"width": 8}), "synced")
    model = detector("torchvision_c4", backbone=synced, extra_norm=True)
    assert isinstance(model.roi_heads.box_head.norm, nn.SyncBatchNorm)


@torch.no_grad()
def test_a_vgg_s_box_head_is_its_classifier():
    """An image of 7 x 7 cells, pooled to itself, is classified as by the VGG."""
    images = torch.rand(2, 3, 224, 224)
    for name, args in (("timm/vgg11", {"mlp_ratio": 0.01}), ("torchvision/vgg11", {})):
        backbone = build_backbone(name, args=args).eval()
        model = detector("torchvision_c5", backbone=backbone).eval()
        assert model.map_names == ["features.19"]
        assert model.rpn.strides == [16]
        pooled = backbone.model.features(backbone.normalize(images))
        torch.testing.assert_close(model.roi_heads.box_head(pooled), backbone.pooled(images))


def test_dropout_is_in_training_alone():
    pooled = torch.rand(2, 512, 7, 7)
    for dropout, differs in ((0.5, True), (0.0, False)):
        head = detector("torchvision_c5", dropout=dropout).roi_heads.box_head
        assert torch.equal(head.eval()(pooled), head(pooled))
        assert (not torch.equal(head.train()(pooled), head(pooled))) == differs
    with pytest.raises(ValueError, match=r"^dropout: must lie in \[0, 1\), got 1\.0"):
        detector("torchvision_c5", dropout=1.0)


def test_a_vgg_without_its_classifier_s_weights_is_refused(tmp_path):
    state = {n: t for n, t in vgg11().state_dict().items() if not n.startswith("classifier")}
    torch.save(state, tmp_path / "features.pth")
    with torch.device("meta"):
        backbone = build_backbone("torchvision/vgg11")
    with pytest.raises(ValueError, match=r"does not fit.*Missing classifier\.0\.weight"):
        load_weights(backbone, tmp_path / "features.pth")


@pytest.mark.parametrize(
    "kind, name, says",
    [
        ("torchvision_c4", "timm/test_vit", r"needs a ResNet.*layer4.*VisionTransformer"),
        ("torchvision_c4", "timm/vgg11", r"needs a ResNet.*layer4.*VGG"),
        ("torchvision_c5", "timm/test_resnet", r"needs a VGG.*fc6 and fc7.*ResNet"),
    ],
)
def test_a_backbone_without_such_layers_is_refused(kind, name, says):
    with torch.device("meta"):
        backbone = build_backbone(name)
    with pytest.raises(ValueError, match=says):
        detector(kind, backbone=backbone)


def test_a_pool_that_fc6_cannot_read_is_refused():
    with pytest.raises(ValueError, match=r"^box\.pool_size: 14 gives fc6 512 x 14\^2 inputs"):
        detector("torchvision_c5", box={"pool_size": 14})
