"""Test-time flipping: logits are averaged, detections of the mirror image are mirrored back."""

import json

import pytest
import torch
from torch import nn

from tract_transfer.models.classifier import FlipClassifier
from tract_transfer.models.detection.two_stage import FlipDetector
from tract_transfer.run.run import run


class Halves(nn.Module):
    """Logits: the brightness of the left and of the right half."""

    def forward(self, images):
        left, right = images.float().mean(1).chunk(2, dim=-1)
        return torch.stack([left.mean((1, 2)), right.mean((1, 2))], dim=1)


class Brightest(nn.Module):
    """A detector that finds the brightest column, one pixel wide, in each image."""

    def forward(self, images):
        detections = []
        for image in images:
            columns = image.float().mean((0, 1))
            x = columns.argmax().item()
            box = torch.tensor([[x, 0.0, x + 1, image.shape[1]]])
            scores, labels = columns.max()[None] / 255, torch.tensor([3])
            detections.append({"boxes": box, "scores": scores, "labels": labels})
        return detections


class Fixed(nn.Module):
    """A detector that finds the same in every image."""

    def __init__(self, boxes, scores, labels):
        super().__init__()
        values = {"boxes": boxes, "scores": scores, "labels": labels}
        self.detections = {key: torch.tensor(value) for key, value in values.items()}

    def forward(self, images):
        return [dict(self.detections) for _ in images]


def some_images():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, 8, width), generator=generator).to(torch.uint8)
        for width in (9, 12, 31)
    ]


def test_logits_are_the_mean_of_both_views():
    images = torch.stack([image[..., :8] for image in some_images()])
    plain, mirrored = Halves()(images), Halves()(images.flip(-1))
    both = FlipClassifier(Halves())(images)
    assert torch.equal(both, (plain + mirrored) / 2)
    assert torch.equal(both, FlipClassifier(Halves())(images.flip(-1)))
    assert not torch.equal(both, plain)


def test_detections_of_an_equivariant_detector_do_not_change():
    images = some_images()
    for plain, both in zip(Brightest()(images), FlipDetector(Brightest())(images), strict=True):
        assert plain.keys() == both.keys()
        assert all(torch.equal(plain[key], both[key]) for key in plain)


def test_boxes_are_mirrored_at_the_width_of_their_image():
    boxes, images = [[1.0, 2.0, 4.0, 6.0]], some_images()
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
    image = some_images()[1]  # 12 wide: 3..9 is its own mirror image, 0..6 becomes 6..12
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
