"""Both views of an image: a mirror image's answer is the image's, mirrored."""

import json

import pytest
import torch
from torch import nn

from tract_transfer.models.flip import FlipClassifier, FlipDetector
from tract_transfer.run.run import run


class Corner(nn.Module):
    """Logits that see the left half and the right half apart."""

    def forward(self, images):
        left, right = images.float().mean(1).chunk(2, dim=-1)
        return torch.stack([left.mean((1, 2)), right.mean((1, 2))], dim=1)


class Brightest(nn.Module):
    """A detector that finds the brightest column, one pixel wide, in every image."""

    def forward(self, images):
        found = []
        for image in images:
            columns = image.float().mean((0, 1))
            x = columns.argmax().item()
            box = torch.tensor([[x, 0.0, x + 1, image.shape[1]]])
            found.append(
                {"boxes": box, "scores": columns.max()[None] / 255, "labels": torch.tensor([3])}
            )
        return found


class Fixed(nn.Module):
    """A detector that finds the same in every image, whatever it shows."""

    def __init__(self, boxes, scores, labels):
        super().__init__()
        self.found = {
            "boxes": torch.tensor(boxes), "scores": torch.tensor(scores),
            "labels": torch.tensor(labels),
        }  # fmt: skip

    def forward(self, images):
        return [dict(self.found) for _ in images]


def some_images():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, 8, width), generator=generator).to(torch.uint8)
        for width in (9, 12, 31)
    ]


def test_logits_are_the_mean_and_do_not_see_left_from_right():
    images = torch.stack([image[..., :8] for image in some_images()])
    plain, mirrored = Corner()(images), Corner()(images.flip(-1))
    both = FlipClassifier(Corner())(images)
    assert torch.equal(both, (plain + mirrored) / 2)
    assert torch.equal(both, FlipClassifier(Corner())(images.flip(-1)))
    assert not torch.equal(both, plain)


def test_a_detector_that_commutes_with_the_mirror_stays_as_it_is():
    images = some_images()
    for one, both in zip(Brightest()(images), FlipDetector(Brightest())(images), strict=True):
        assert one.keys() == both.keys()
        assert all(torch.equal(one[key], both[key]) for key in one)


def test_a_mirror_images_boxes_are_mirrored_at_its_own_width():
    boxes, images = [[1.0, 2.0, 4.0, 6.0]], some_images()
    for image, found in zip(images, FlipDetector(Fixed(boxes, [0.5], [0]))(images), strict=True):
        width = image.shape[-1]
        assert found["boxes"].tolist() == [*boxes, [width - 4.0, 2.0, width - 1.0, 6.0]]


def test_overlaps_of_a_class_are_joined_and_the_best_are_kept():
    image = [some_images()[1]]  # 12 wide: 3..9 is its own mirror image, 0..6 becomes 6..12
    boxes = [[3.0, 0.0, 9.0, 8.0], [3.0, 0.0, 9.0, 7.0], [0.0, 0.0, 6.0, 8.0]]
    detector = Fixed(boxes, [0.6, 0.9, 0.3], [1, 2, 1])
    (found,) = FlipDetector(detector)(image)
    assert found["scores"].tolist() == pytest.approx([0.9, 0.6, 0.3, 0.3])
    assert found["labels"].tolist() == [2, 1, 1, 1]
    (found,) = FlipDetector(detector, max_detections=2)(image)
    assert found["labels"].tolist() == [2, 1]
    (found,) = FlipDetector(detector, nms_iou=0.3)(image)
    assert found["labels"].tolist() == [2, 1]  # IoU of 3..9 and 0..6: 1/3


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_a_run_measures_both_views_and_trains_as_without(load_tiny, tmp_path, task):
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
