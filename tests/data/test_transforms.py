"""Transforms keep shape and type, and move boxes with their image."""

import pytest
import torch

from tract_transfer.data.transforms import (
    classification_eval,
    classification_train,
    detection_eval,
    detection_train,
)


def noise(height, width):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("crop", ["pad", "resize_random", "random_resized", "none"])
@pytest.mark.parametrize("size", [(20, 90), (300, 41)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_shape_and_type_hold_for_any_image(crop, size, interpolation):
    train = classification_train(32, crop, 4, (0.2, 1.0), 0.5, interpolation)
    for transform in (train, classification_eval(32, 0.875, interpolation)):
        image = transform(noise(*size))
        assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)


@pytest.mark.parametrize("crop", ["pad", "none"])
def test_without_randomness_a_square_of_the_size_is_unchanged(crop):
    image = noise(32, 32)
    assert torch.equal(classification_train(32, crop, 0, (1, 1), 0.0, "bilinear")(image), image)
    assert torch.equal(classification_eval(32, 1.0, "bicubic")(image), image)
    flipped = classification_train(32, crop, 0, (1, 1), 1.0, "bilinear")(image)
    assert torch.equal(flipped, image.flip(-1))


def test_whole_keeps_the_borders_that_short_crops():
    image = torch.zeros(3, 32, 96, dtype=torch.uint8)
    image[..., :24] = image[..., -24:] = 255
    short, whole = (classification_eval(16, 1.0, "bilinear", name) for name in ("short", "whole"))
    assert (short(image) == 0).all()
    assert short(image).shape == whole(image).shape == (3, 16, 16)
    assert (whole(image)[..., [0, 1, -2, -1]] == 255).all()
    assert (whole(image)[..., 6:10] == 0).all()


def make_target(boxes):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "difficult": torch.arange(len(boxes)) % 2 == 1, "image_id": 5}


BOXES = [[0, 0, 60, 40], [3, 5, 17, 20.5]]


@pytest.mark.parametrize("boxes", [BOXES, []])
def test_flipping_twice_is_the_identity(boxes):
    flip = detection_train([40], 60, 1.0)
    image, target = noise(40, 60), make_target(boxes)
    once = flip(image, target)
    twice = flip(*once)
    assert torch.equal(once[0], image.flip(-1))
    assert torch.equal(twice[0], image)
    assert torch.allclose(twice[1]["boxes"], target["boxes"])
    assert once[1]["boxes"].shape == target["boxes"].shape
    assert torch.equal(once[1]["difficult"], target["difficult"])
    assert once[1]["image_id"] == 5
    assert target["boxes"].tolist() == boxes
    assert {type(once[0]), type(once[1]["boxes"])} == {torch.Tensor}


def test_boxes_scale_with_the_image():
    image, target = detection_train([80], 1000, 0.0)(noise(40, 60), make_target(BOXES))
    assert image.shape == (3, 80, 120)
    assert torch.allclose(target["boxes"], 2 * torch.tensor(BOXES, dtype=torch.float32))


def test_the_long_side_is_capped_and_every_short_side_drawn():
    transform = detection_train([40, 60, 80], 90, 0.5)
    sizes = {tuple(transform(noise(40, 60), make_target(BOXES))[0].shape) for _ in range(50)}
    assert sizes == {(3, 40, 60), (3, 60, 90)}


def test_colors_change_as_often_as_asked_and_nothing_else_does():
    image, target = noise(40, 60), make_target(BOXES)
    transform = detection_train([40], 60, 0.0, photometric_prob=0.5)
    results = [transform(image, target) for _ in range(60)]
    assert {(tuple(x.shape), x.dtype) for x, _ in results} == {((3, 40, 60), torch.uint8)}
    same = sum(torch.equal(x, image) for x, _ in results)
    assert same < 15  # 60 / 2^5 expected, and one channel order is the original one
    assert all(torch.equal(y["boxes"], target["boxes"]) for _, y in results)
    for plain in (detection_train([40], 60, 0.0), detection_eval):
        assert torch.equal(plain(image, target)[0], image)


def plain(**options):
    return classification_train(32, "none", 0, (1, 1), 0.0, "bilinear", **options)


@pytest.mark.parametrize(("crop", "mode"), [("pad", "constant"), ("resize_random", "reflect")])
def test_a_random_crop_is_a_window_of_the_padded_image(crop, mode):
    image = noise(32, 32)
    transform = classification_train(32, crop, 4, (1, 1), 0.0, "bicubic")
    padded = torch.nn.functional.pad(image.float()[None], [4] * 4, mode=mode)[0].byte()
    windows = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    crops = [transform(image) for _ in range(20)]
    assert all(any(torch.equal(crop, window) for window in windows) for crop in crops)
    assert len({crop.sum().item() for crop in crops}) > 3


def test_a_rotation_stays_within_its_limit():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 4, 16] = 255  # 12 px above the centre
    angles = []
    for _ in range(60):
        y, x = plain(rotation_deg=15.0)(image)[0].nonzero().float().mean(dim=0)
        angles.append(torch.rad2deg(torch.atan2(x - 15.5, 15.5 - y)).item())
    assert -19 < min(angles) < -8  # a pixel is 5 degrees wide there
    assert 8 < max(angles) < 19


def test_colors_jitter_within_their_factor():
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)  # no contrast and no saturation
    torch.manual_seed(0)
    levels = {plain(color_jitter=0.3)(image).float().mean().item() for _ in range(60)}
    assert min(levels) >= 68  # 70, rounded in each of three steps
    assert max(levels) <= 131
    assert len(levels) > 20


def test_erasing_fills_a_rectangle_with_the_mean_color_as_often_as_asked():
    image = noise(32, 32)
    erased = 0
    torch.manual_seed(0)
    for _ in range(200):
        changed = (plain(erase_prob=0.25)(image) != image).any(dim=0)
        if not changed.any():
            continue
        erased += 1
        ys, xs = changed.nonzero(as_tuple=True)
        height, width = ys.max() - ys.min() + 1, xs.max() - xs.min() + 1
        assert 0.015 * 32 * 32 < height * width < 0.35 * 32 * 32
    assert abs(erased - 50) < 5 * (200 * 0.25 * 0.75) ** 0.5
    whole = plain(erase_prob=1.0)(torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert whole.amax(dim=(1, 2)).tolist() == [124, 116, 104]
