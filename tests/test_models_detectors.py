import pytest
import torch
from torch import nn

from tract_transfer.models import DETECTORS, Backbone, build_backbone
from tract_transfer.models.detectors import TwoStageDetector

SMALL = {
    "fpn_channels": 16,
    "head_dim": 32,
    "num_proposals": 50,
    "rois_per_image": 16,
    "short_side_px": 64,
    "max_side_px": 96,
}


def detector(**args) -> TwoStageDetector:
    torch.manual_seed(0)
    backbone = build_backbone("timm/test_resnet")
    return DETECTORS.get("torchvision_fpn")(backbone, 3, **{**SMALL, **args})


@pytest.fixture(scope="module")
def eager() -> TwoStageDetector:
    """A detector that finds something everywhere."""
    return detector(score_threshold=0.0, max_detections=20).eval()


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def target(boxes, labels) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.zeros(len(labels), dtype=torch.bool),
        "image_id": 7,
    }


IMAGES = [picture(64, 96), picture(80, 64, 1)]
TARGETS = [target([[5, 5, 40, 50], [50, 10, 90, 60]], [0, 2]), target([[1, 2, 30, 70]], [1])]


def test_training_gives_four_finite_losses_that_reach_the_first_layer():
    model = detector().train()
    losses = model(IMAGES, TARGETS)
    assert sorted(losses) == ["loss_box", "loss_cls", "loss_rpn_box", "loss_rpn_cls"]
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    gradient = model.get_submodule("backbone.model.conv1.0").weight.grad
    assert gradient.isfinite().all()
    assert gradient.any()


def test_images_without_boxes_are_background():
    model = detector().train()
    losses = model(IMAGES, [target([], []), target([], [])])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_rpn_box"] == losses["loss_box"] == 0
    mixed = model(IMAGES, [TARGETS[0], target([], [])])
    assert all(loss.isfinite() for loss in mixed.values())


@torch.no_grad()
def test_detections_are_in_the_pixels_of_each_image(eager):
    images = [picture(300, 400), picture(30, 20), picture(64, 96), picture(200, 70)]
    found = eager(images)
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
    (alone,) = eager([image])
    for company in (picture(64, 96, 1), picture(64, 64, 2)):
        for together in (eager([image, company])[0], eager([company, image])[1]):
            for key in alone:
                torch.testing.assert_close(together[key], alone[key], rtol=1e-3, atol=1e-3)


class Patches(nn.Module):
    """Two maps that see no neighbour: means of the colours of 4x4 and 8x8 patches."""

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [nn.functional.avg_pool2d(images, size) for size in (4, 8)]


class PatchBackbone(Backbone):
    def maps(self, images, names):
        return dict(zip(names, self.model(self.normalize(images)), strict=True))

    def _map_names(self):
        return ["fine", "coarse"]


class Seen(nn.Module):
    """Stands for the region proposal or the box head, and keeps what it was given."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, *given):
        self.given = given
        return self.answer


def stub_detector(found=None, **sizes) -> TwoStageDetector:
    backbone = PatchBackbone(
        Patches(), feature_dim=3, first_layers=[], mean=[0.4, 0.5, 0.6], std=[0.2] * 3
    )
    return TwoStageDetector(
        backbone,
        nn.Identity(),
        Seen((["proposals"], {"loss_objectness": torch.tensor(1.0)})),
        Seen((found, {"loss_classifier": torch.tensor(2.0)})),
        ["fine", "coarse"],
        **{"short_side_px": 32, "max_side_px": 64, "size_divisor": 8, **sizes},
    )


def test_padding_is_the_mean_colour_and_leaves_the_image_alone():
    model = stub_detector().train()
    images = [picture(16, 24), picture(9, 33, 1).float() / 255]
    model(images, [target([], [])] * 2)
    batch, features, _ = model.rpn.given
    assert batch.tensors.shape == (2, 3, 16, 40)
    assert batch.image_sizes == [(16, 24), (9, 33)]
    torch.testing.assert_close(batch.tensors[0, :, :, :24], images[0].float() / 255)
    torch.testing.assert_close(batch.tensors[1, :, :9, :33], images[1])
    normalized = model.backbone.normalize(batch.tensors)
    assert not normalized[0, :, :, 24:].any()
    assert not normalized[1, :, 9:].any()
    alone = model.backbone.maps(images[0][None], ["fine", "coarse"])
    for name, stride in (("fine", 4), ("coarse", 8)):
        inside = features[name][0, :, : 16 // stride, : 24 // stride]
        torch.testing.assert_close(inside, alone[name][0])


def test_labels_are_shifted_for_torchvision_and_back():
    found = {
        "boxes": torch.tensor([[0.0, 0.0, 32.0, 16.0]]),
        "scores": torch.tensor([0.9]),
        "labels": torch.tensor([1]),
    }
    model = stub_detector([found]).train()
    given = target([[1, 2, 3, 4], [0, 0, 9, 9]], [0, 2])
    losses = model([picture(32, 64)], [given])
    assert losses == {"loss_rpn_cls": 1, "loss_cls": 2}
    for shifted in (model.rpn.given[2], model.roi_heads.given[3]):
        assert shifted[0]["labels"].tolist() == [1, 3]
        assert torch.equal(shifted[0]["boxes"], given["boxes"])
    assert given["labels"].tolist() == [0, 2]
    (detections,) = model.eval()([picture(64, 128)])
    assert detections["labels"].tolist() == [0]
    assert detections["boxes"].tolist() == [[0, 0, 64, 32]]  # 64x128 was seen as 32x64


@pytest.mark.parametrize(
    "size, seen",
    [
        ((32, 64), (32, 64)),
        ((16, 16), (32, 32)),
        ((100, 80), (40, 32)),
        ((20, 80), (16, 64)),
        ((200, 50), (64, 16)),
        ((1, 500), (1, 64)),
    ],
    ids=str,
)
def test_test_images_are_resized_and_training_images_are_not(size, seen):
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}
    model = stub_detector([empty])
    model.eval()([picture(*size)])
    assert model.rpn.given[0].image_sizes == [seen]
    model.train()([picture(*size)], [target([], [])])
    assert model.rpn.given[0].image_sizes == [size]


def test_width_and_height_are_scaled_back_by_their_own_ratios():
    """33x64 rounds to 32x62, which is not quite the same shape."""
    found = {
        "boxes": torch.tensor([[31.0, 8.0, 62.0, 32.0]]),
        "scores": torch.tensor([0.9]),
        "labels": torch.tensor([1]),
    }
    model = stub_detector([found]).eval()
    (detections,) = model([picture(33, 64)])
    assert model.rpn.given[0].image_sizes == [(32, 62)]
    assert detections["boxes"].tolist() == [[32, 8.25, 64, 33]]


@torch.no_grad()
def test_autocast_computes_boxes_in_float32(eager):
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = eager([picture(64, 96)])
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_autocast_trains_on_boxes_in_float32(eager):
    seen = []

    def watch(_module, inputs):
        seen.extend(box for boxes in inputs[1] for box in boxes.flatten().tolist())
        assert all(boxes.dtype == torch.float32 for boxes in inputs[1])

    handle = eager.train().roi_heads.box_roi_pool.register_forward_pre_hook(watch)
    target = {"boxes": torch.tensor([[3.4, 5.0, 61.3, 57.7]]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", torch.bfloat16):
        eager([picture(64, 96)], [target])
    handle.remove()
    assert target["boxes"].flatten().tolist() == seen[-4:]  # the truth is the last proposal


# -------------------------------------------------------------------------------- building


@pytest.mark.parametrize("num_levels", [2, 3, 4])
def test_the_pyramid_stands_on_the_last_strides(num_levels):
    model = detector(num_levels=num_levels, anchor_scale=4)
    strides = [info.stride for info in model.backbone.pyramid().values()]
    assert strides == [2, 4, 8, 16, 32]
    levels = strides[-num_levels:]
    assert list(model.backbone.pyramid())[-num_levels:] == model.map_names
    assert model.size_divisor == 32
    assert [size for (size,) in model.rpn.anchor_generator.sizes] == [
        4 * stride for stride in [*levels, 64]
    ]
    losses = model.train()(IMAGES, TARGETS)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("num_levels", [1, 6])
def test_a_backbone_with_too_few_strides_is_refused(num_levels):
    with pytest.raises(ValueError, match=rf"num_levels = {num_levels}.*\[2, 4, 8, 16, 32\]"):
        detector(num_levels=num_levels)
    with pytest.raises(ValueError, match=r"this backbone has \[16\]"):
        DETECTORS.get("torchvision_fpn")(
            build_backbone(
                "timm/vit_tiny_patch16_224", args={"depth": 1, "dynamic_img_size": True}
            ),
            3,
        )


def test_a_backbone_of_one_size_is_refused():
    backbone = build_backbone("cifar/vit", args={"depth": 1})
    with pytest.raises(ValueError, match="takes 32 px alone"):
        DETECTORS.get("torchvision_fpn")(backbone, 3)


def test_the_number_of_classes_leaves_room_for_the_background():
    predictor = detector().roi_heads.box_predictor
    assert predictor.cls_score.out_features == 4
    assert predictor.bbox_pred.out_features == 16
