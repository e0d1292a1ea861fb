"""What the detector does around its two stages: resizing, padding, objects, pixels."""

import json

import pytest
import torch
from small_detectors import picture, target
from torch import nn

from tract_transfer.models import Backbone
from tract_transfer.models.detection.two_stage import FlipDetector, TwoStageDetector
from tract_transfer.run.run import run


class Patches(nn.Module):
    """Two feature maps: the mean colors of 4x4 and of 8x8 patches."""

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [nn.functional.avg_pool2d(images, size) for size in (4, 8)]


class PatchBackbone(Backbone):
    def maps(self, images, names):
        self.images = images
        return dict(zip(names, self.model(self.normalize(images)), strict=True))


class Recorder(nn.Module):
    """Stands for a stage, and records its arguments."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, *args):
        self.args = args
        return self.output


def stub_detector(detections=None, **options) -> TwoStageDetector:
    backbone = PatchBackbone(
        Patches(), feature_dim=3, first_layers=[], mean=[0.4, 0.5, 0.6], std=[0.2] * 3
    )
    return TwoStageDetector(
        backbone,
        nn.Identity(),
        Recorder((["proposals"], {"loss_rpn_cls": torch.tensor(1.0)})),
        Recorder((detections, {"loss_cls": torch.tensor(2.0)})),
        ["fine", "coarse"],
        **{"short_side_px": 32, "max_side_px": 64, "size_divisor": 8, **options},
    )


def test_padding_has_the_mean_color_and_does_not_change_the_image():
    model = stub_detector().train()
    images = [picture(16, 24), picture(9, 33, 1).float() / 255]
    model(images, [target([], [])] * 2)
    (fine, coarse), sizes, _, _ = model.rpn.args
    batch = model.backbone.images
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


def test_both_stages_get_the_same_and_all_losses_are_returned():
    model = stub_detector().train()
    truth = target([[1, 2, 3, 4], [0, 0, 9, 9]], [0, 2])
    losses = model([picture(32, 64)], [truth])
    assert losses == {"loss_rpn_cls": 1, "loss_cls": 2}
    maps, sizes, _, objects = model.rpn.args
    assert model.roi_heads.args == (maps, ["proposals"], sizes, objects)
    assert torch.equal(objects[0].boxes, truth["boxes"])
    assert objects[0].labels.tolist() == [0, 2]


@pytest.mark.parametrize(
    "size, resized",
    [
        ((32, 64), (32, 64)),
        ((16, 16), (32, 32)),
        ((100, 80), (40, 32)),
        ((20, 80), (16, 64)),
        ((200, 50), (64, 16)),
        ((1, 500), (1, 64)),
        ((33, 64), (32, 62)),  # rounded to another shape
    ],
    ids=str,
)
def test_only_test_images_are_resized_and_boxes_are_in_their_pixels(size, resized):
    model = stub_detector([{"boxes": torch.tensor([[0.0, 0.0, *reversed(resized)]])}])
    (detected,) = model.eval()([picture(*size)])
    assert model.rpn.args[1:] == ([resized], [resized[0] / size[0]])
    assert detected["boxes"].tolist() == [[0, 0, *reversed(size)]]
    model.train()([picture(*size)], [target([], [])])
    assert model.rpn.args[1:3] == ([size], [1.0])
    model([picture(*size)], [target([], [], scale=1.5)])
    assert model.rpn.args[2] == [1.5]


@pytest.mark.parametrize(
    "policy, crowd, kept, ignored",
    [
        ("keep", {}, [0, 1, 2], []),
        ("keep", {"crowd": torch.tensor([False, True, False])}, [0, 2], []),  # never objects
        ("drop", {}, [0, 2], []),
        ("ignore", {}, [0, 2], [[5, 5, 9, 9]]),
    ],
)
def test_policy_decides_about_difficult_objects(policy, crowd, kept, ignored):
    boxes = [[0, 0, 4, 4], [5, 5, 9, 9], [1, 1, 3, 3]]
    model = stub_detector(difficult_in_training=policy).train()
    model([picture(16, 16)], [target(boxes, [4, 5, 6], [False, True, False], **crowd)])
    (objects,) = model.rpn.args[3]
    assert objects.boxes.tolist() == [boxes[i] for i in kept]
    assert objects.labels.tolist() == [4 + i for i in kept]
    assert objects.ignored.tolist() == ignored


# Test-time flipping


class Fixed(nn.Module):
    """A detector that finds the same in every image."""

    def __init__(self, boxes, scores, labels):
        super().__init__()
        values = {"boxes": boxes, "scores": scores, "labels": labels}
        self.detections = {key: torch.tensor(value) for key, value in values.items()}

    def forward(self, images):
        return [dict(self.detections) for _ in images]


def test_boxes_are_mirrored_at_the_width_of_their_image():
    boxes, images = [[1.0, 2.0, 4.0, 6.0]], [picture(8, width) for width in (9, 12, 31)]
    both = FlipDetector(Fixed(boxes, [0.5], [0]))(images)
    for image, detections in zip(images, both, strict=True):
        width = image.shape[-1]
        assert detections["boxes"].tolist() == [*boxes, [width - 4.0, 2.0, width - 1.0, 6.0]]


@pytest.mark.parametrize(
    "options, scores, labels",
    [
        ({}, [0.9, 0.6, 0.3, 0.3], [2, 1, 1, 1]),
        ({"max_detections": 2}, [0.9, 0.6], [2, 1]),
        ({"nms_iou": 0.3}, [0.9, 0.6], [2, 1]),  # the IoU of 3..9 and 0..6 is 1/3
    ],
)
def test_overlaps_of_a_class_are_merged_and_the_best_remain(options, scores, labels):
    image = picture(8, 12)  # 12 wide: 3..9 is its own mirror image, 0..6 becomes 6..12
    boxes = [[3.0, 0.0, 9.0, 8.0], [3.0, 0.0, 9.0, 7.0], [0.0, 0.0, 6.0, 8.0]]
    (detections,) = FlipDetector(Fixed(boxes, [0.6, 0.9, 0.3], [1, 2, 1]), **options)([image])
    assert detections["scores"].tolist() == pytest.approx(scores)
    assert detections["labels"].tolist() == labels


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_flipping_changes_the_evaluation_and_not_the_training(load_tiny, tmp_path, task):
    results = {}
    for flip in ("false", "true"):
        folder = tmp_path / flip
        folder.mkdir()
        config = load_tiny(folder, f"evaluation.flip={flip}", "solver.max_iters=2", task=task)
        results[flip] = run(config)
    weights = [(tmp_path / flip / "run/model.safetensors").read_bytes() for flip in results]
    assert weights[0] == weights[1]
    assert "mirror" in results["true"]["protocol"]["views"]
    assert "views" not in results["false"]["protocol"]
    key = "loss" if task == "classification" else "num_detections"
    measured = [{**r["metrics"], **r["details"]}[key] for r in results.values()]
    assert measured[0] != measured[1]
    assert json.dumps(results["true"], allow_nan=False)
