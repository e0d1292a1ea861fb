"""What the detector does around its two stages: resizing, padding, objects, original pixels."""

import pytest
import torch
from torch import nn

from tract_transfer.models import Backbone
from tract_transfer.models.detection.two_stage import TwoStageDetector


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def target(boxes, labels, difficult=None, **more) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * len(labels), dtype=torch.bool),
        "image_id": 7,
        **more,
    }


class Patches(nn.Module):
    """Two maps that see no neighbour: means of the colours of 4x4 and 8x8 patches."""

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [nn.functional.avg_pool2d(images, size) for size in (4, 8)]


class PatchBackbone(Backbone):
    def maps(self, images, names):
        self.seen = images
        return dict(zip(names, self.model(self.normalize(images)), strict=True))

    def _map_names(self):
        return ["fine", "coarse"]


class Seen(nn.Module):
    """Stands for a stage, and keeps what it was given."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, *given):
        self.given = given
        return self.answer


def stub_detector(found=None, **arguments) -> TwoStageDetector:
    backbone = PatchBackbone(
        Patches(), feature_dim=3, first_layers=[], mean=[0.4, 0.5, 0.6], std=[0.2] * 3
    )
    return TwoStageDetector(
        backbone,
        nn.Identity(),
        Seen((["proposals"], {"loss_rpn_cls": torch.tensor(1.0)})),
        Seen((found, {"loss_cls": torch.tensor(2.0)})),
        ["fine", "coarse"],
        **{"short_side_px": 32, "max_side_px": 64, "size_divisor": 8, **arguments},
    )


def found_one(box, label=1) -> list[dict[str, torch.Tensor]]:
    box, label = torch.tensor([box], dtype=torch.float32), torch.tensor([label])
    return [{"boxes": box, "scores": torch.tensor([0.9]), "labels": label}]


def test_padding_is_the_mean_colour_and_leaves_the_image_alone():
    model = stub_detector().train()
    images = [picture(16, 24), picture(9, 33, 1).float() / 255]
    model(images, [target([], [])] * 2)
    (fine, coarse), sizes, _, _ = model.rpn.given
    batch = model.backbone.seen
    assert batch.shape == (2, 3, 16, 40)
    assert sizes == [(16, 24), (9, 33)]
    torch.testing.assert_close(batch[0, :, :, :24], images[0].float() / 255)
    torch.testing.assert_close(batch[1, :, :9, :33], images[1])
    normalized = model.backbone.normalize(batch)
    assert not normalized[0, :, :, 24:].any()
    assert not normalized[1, :, 9:].any()
    alone = model.backbone.maps(images[0][None], ["fine", "coarse"])
    for features, name, stride in ((fine, "fine", 4), (coarse, "coarse", 8)):
        torch.testing.assert_close(features[0, :, : 16 // stride, : 24 // stride], alone[name][0])


def test_both_stages_see_the_same_and_their_losses_are_the_model_s():
    model = stub_detector().train()
    given = target([[1, 2, 3, 4], [0, 0, 9, 9]], [0, 2])
    losses = model([picture(32, 64)], [given])
    assert losses == {"loss_rpn_cls": 1, "loss_cls": 2}
    maps, sizes, _, objects = model.rpn.given
    assert model.roi_heads.given == (maps, ["proposals"], sizes, objects)
    assert torch.equal(objects[0].boxes, given["boxes"])
    assert objects[0].labels.tolist() == [0, 2]


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
    model = stub_detector([{"boxes": torch.zeros(0, 4)}])
    model.eval()([picture(*size)])
    assert model.rpn.given[1:] == ([seen], [seen[0] / size[0]])
    model.train()([picture(*size)], [target([], [])])
    assert model.rpn.given[1:3] == ([size], [1.0])
    model([picture(*size)], [target([], [], scale=1.5)])
    assert model.rpn.given[2] == [1.5]


def test_boxes_come_back_in_the_image_s_own_pixels():
    model = stub_detector(found_one([0, 0, 32, 16])).eval()
    (detections,) = model([picture(64, 128)])
    assert detections["labels"].tolist() == [1]
    assert detections["boxes"].tolist() == [[0, 0, 64, 32]]  # 64x128 was seen as 32x64


def test_width_and_height_are_scaled_back_by_their_own_ratios():
    """33x64 rounds to 32x62, which is not quite the same shape."""
    model = stub_detector(found_one([31, 8, 62, 32])).eval()
    (detections,) = model([picture(33, 64)])
    assert model.rpn.given[1] == [(32, 62)]
    assert detections["boxes"].tolist() == [[32, 8.25, 64, 33]]


@pytest.mark.parametrize(
    "policy, kept, ignored",
    [("keep", [0, 1, 2], []), ("drop", [0, 2], []), ("ignore", [0, 2], [[5, 5, 9, 9]])],
)
def test_what_becomes_of_difficult_objects(policy, kept, ignored):
    boxes = [[0, 0, 4, 4], [5, 5, 9, 9], [1, 1, 3, 3]]
    given = target(boxes, [4, 5, 6], [False, True, False])
    model = stub_detector(difficult_in_training=policy).train()
    model([picture(16, 16)], [given])
    (objects,) = model.rpn.given[3]
    assert objects.boxes.tolist() == [boxes[i] for i in kept]
    assert objects.labels.tolist() == [4 + i for i in kept]
    assert objects.ignored.tolist() == ignored


def test_a_crowd_is_never_learnt():
    crowd = torch.tensor([False, True])
    given = target([[0, 0, 4, 4], [5, 5, 9, 9]], [4, 5], [True, True], crowd=crowd)
    model = stub_detector(difficult_in_training="keep").train()
    model([picture(16, 16)], [given])
    assert model.rpn.given[3][0].labels.tolist() == [4]


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match=r"difficult_in_training: must be one of .*got 'leave'"):
        stub_detector(difficult_in_training="leave")
