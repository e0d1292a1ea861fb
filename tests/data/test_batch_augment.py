"""What is done to whole batches is what torchvision does to single images."""

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from tract_transfer.data import device_cache as batch_augment
from tract_transfer.data.device_cache import (
    BatchAugment,
    erased,
    random_boxes,
    resized_crops,
    shifted,
)


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (6, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def draws(count, each, seed=0):
    return np.random.default_rng(seed).random((count, each))


def test_shifted_crops_by_row_and_column():
    image = torch.arange(16).view(1, 1, 4, 4)
    (crop,) = shifted(image, torch.tensor([[2, 0]]), 1)
    assert crop.tolist() == [[[0, 4, 5, 6], [0, 8, 9, 10], [0, 12, 13, 14], [0, 0, 0, 0]]]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size_px", [8, 20, 33])
def test_a_resized_crop_is_torchvisions(images, interpolation, size_px):
    boxes = random_boxes(draws(6, 22), 20, (0.08, 1.0), (3 / 4, 4 / 3))
    found = resized_crops(images, boxes, size_px, interpolation)
    for image, box, crop in zip(images, boxes.tolist(), found, strict=True):
        expected = v2.functional.resized_crop(
            image, *box, [size_px, size_px], InterpolationMode(interpolation), antialias=True
        )
        assert crop.dtype == torch.uint8
        # torch's weights have 16 bits, and so may differ by one.
        assert (crop.int() - expected.int()).abs().max() <= (interpolation != "nearest")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_large_images_whose_weights_are_in_no_table_are_resized_alike(
    images, interpolation, monkeypatch
):
    boxes = random_boxes(draws(6, 22), 20, (0.08, 1.0), (3 / 4, 4 / 3))
    found = resized_crops(images, boxes, 12, interpolation)
    monkeypatch.setattr(batch_augment, "_TABLE_BYTES", 0)
    assert resized_crops(images, boxes, 12, interpolation).equal(found)


def test_a_box_lies_in_its_image_and_follows_torchvisions_law():
    boxes = random_boxes(draws(4000, 22), 32, (0.3, 1.0), (3 / 4, 4 / 3))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 32).all()
    assert boxes[:, :2].min() == 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() == 32
    torch.manual_seed(0)
    image = torch.zeros(1, 32, 32)
    law = v2.RandomResizedCrop(32, scale=(0.3, 1.0))
    names = ("top", "left", "height", "width")
    theirs = [law.make_params([image]) for _ in range(4000)]
    expected = np.array([[each[name] for name in names] for each in theirs])
    for ours, other in zip(boxes.T, expected.T, strict=True):
        error = np.hypot(ours.std(), other.std()) / np.sqrt(4000)
        assert abs(ours.mean() - other.mean()) < 4 * error
        assert ours.std() == pytest.approx(other.std(), rel=0.1)


def test_what_is_erased_has_torchvisions_shape():
    law = v2.RandomErasing()  # its ratio is height over width
    assert law.ratio == pytest.approx([1 / each for each in reversed(batch_augment._ERASE_RATIO)])
    assert law.scale == batch_augment._ERASE_SCALE


def test_what_fits_nowhere_is_the_whole_image():
    boxes = random_boxes(draws(3, 22), 16, (4.0, 5.0), (1.0, 1.0))
    assert boxes.tolist() == [[0, 0, 16, 16]] * 3


def test_erasing_fills_the_box_and_nothing_else(images):
    boxes = np.array([[2, 3, 4, 5]] * 5 + [[0, 0, 0, 0]])
    found = erased(images, boxes, (1, 2, 3))
    for image, before in zip(found[:5], images[:5], strict=True):
        assert (image[:, 2:6, 3:8] == torch.tensor([1, 2, 3])[:, None, None]).all()
        image[:, 2:6, 3:8] = before[:, 2:6, 3:8]
        assert image.equal(before)
    assert found[5].equal(images[5])


def test_a_share_of_the_images_is_erased_and_flipped():
    plain = torch.arange(20).repeat(2000, 3, 20, 1).to(torch.uint8)
    augment = BatchAugment(20, "none", 0, (0.08, 1.0), 0.5, "bilinear", 0.25)
    found = augment(plain, draws(2000, augment.num_draws))
    is_erased = (found > 19).flatten(1).any(1)
    assert is_erased.float().mean() == pytest.approx(0.25, abs=0.04)
    whole = found[~is_erased]
    flipped = (whole[:, 0, 0, 0] == 19).float()
    assert flipped.mean() == pytest.approx(0.5, abs=0.05)
    share = (found[is_erased] > 19)[:, 0].float().mean((1, 2))
    assert share.min() > 0.01
    assert share.max() < 0.37


def test_an_image_becomes_the_same_in_every_batch(images):
    augment = BatchAugment(12, "random_resized", 0, (0.3, 1.0), 0.5, "bilinear", 0.5)
    numbers = draws(6, augment.num_draws)
    whole = augment(images, numbers)
    assert whole.shape == (6, 3, 12, 12)
    single = [augment(images[i : i + 1], numbers[i : i + 1]) for i in range(6)]
    assert torch.cat(single).equal(whole)


def test_what_is_not_done_in_batches_is_refused(images):
    with pytest.raises(ValueError, match="crop must be pad, random_resized or none, got 'resize_"):
        BatchAugment(8, "resize_random", 4, (0.08, 1.0), 0.5, "bilinear")
    boxes = np.array([[0, 0, 8, 8]] * 6)
    with pytest.raises(ValueError, match="interpolation: nearest, bilinear or bicubic, got 'box'"):
        resized_crops(images, boxes, 8, "box")
