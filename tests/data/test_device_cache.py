"""The on-device cache: batches do to whole batches what torchvision does to single images."""

from itertools import islice, product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torchvision.transforms import InterpolationMode, v2

from tract_transfer.data import device_cache
from tract_transfer.data.device_cache import (
    BatchAugment,
    DeviceCache,
    cached_batches,
    erased,
    hashed_uniform,
    random_boxes,
    resized_crops,
    shifted,
)
from tract_transfer.data.images import UndecodableImage
from tract_transfer.data.sampling import EpochOrder, Sample, TrainBatchSampler

CPU = torch.device("cpu")
RATIO = (3 / 4, 4 / 3)


class Pixels:
    """20 images of noise; those in `broken` cannot be decoded."""

    def __init__(self, broken=(), size=(8, 8), length=20):
        self.broken, self.size, self.length = broken, size, length

    def __len__(self):
        return self.length

    def image(self, index):
        if index in self.broken:
            raise UndecodableImage(f"row {index}", "cut short")
        generator = torch.Generator().manual_seed(index)
        shape = (3, *self.size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def target(self, index):
        return index % 4


def batches(
    data, start_iter=0, *, seed=3, crop="pad", pad_px=2, flip_prob=0.5, batch_size=4, **split
):
    sampler = TrainBatchSampler(EpochOrder(len(data.labels), batch_size, seed), start_iter, **split)
    augment = BatchAugment(8, crop, pad_px, (0.3, 1.0), flip_prob, "bilinear", erase_prob=0.0)
    return cached_batches(data, sampler, seed=seed, augment=augment)


def seen(*batches):
    return {i: x for batch in batches for i, x in zip(batch.indices, batch.images, strict=True)}


def draws(count, each, seed=0):
    return np.random.default_rng(seed).random((count, each))


def test_crops_and_flips_are_those_of_the_padded_image():
    dataset, variants = Pixels(), set()
    for batch in islice(batches(DeviceCache(dataset, 8, CPU)), 40):
        assert batch.targets.tolist() == [dataset.target(index) for index in batch.indices]
        for index, image in seen(batch).items():
            padded = torch.nn.functional.pad(dataset.image(index), [2, 2, 2, 2])
            (match,) = [
                (top, left, flip)
                for top, left, flip in product(range(5), range(5), (False, True))
                if padded[:, top : top + 8, left : left + 8].flip(2 if flip else ()).equal(image)
            ]
            variants.add(match)
    assert len(variants) > 40  # of 50


def test_an_epoch_depends_on_seed_epoch_and_sample_alone():
    """Not on where a run resumes, on processes and micro-batches, or on the batch."""
    data = DeviceCache(Pixels(), 8, CPU)
    whole = list(islice(batches(data), 10))
    for position, batch in enumerate(islice(batches(data, 3), 7), 3):
        assert batch.images.equal(whole[position].images)
    parts = [next(batches(data, rank=rank, world_size=2)).images for rank in range(2)]
    assert torch.cat(parts).equal(whole[0].images)
    halves = islice(batches(data, accumulate=2), 2)
    assert torch.cat([half.images for half in halves]).equal(whole[0].images)
    first, second = seen(*whole[:5]), seen(*whole[5:])
    for index, image in seen(*islice(batches(data, batch_size=2), 10)).items():
        assert image.equal(first[index])
    other = seen(*islice(batches(data, seed=4), 5))
    for changed in (second, other):
        assert any(not image.equal(changed[index]) for index, image in first.items())


def test_hashed_numbers_are_uniform_uncorrelated_and_differ_between_copies():
    rows = np.array([(e, i, 0) for e in range(20) for i in range(1000)], dtype=np.uint64)
    uniform = hashed_uniform(0, rows, 3)
    assert uniform.shape == (20000, 3)
    assert 0 <= uniform.min() < uniform.max() < 1
    counts, _ = np.histogram(uniform, bins=20, range=(0, 1))
    assert chisquare(counts).pvalue > 0.001
    lagged = np.stack([*uniform.T, np.roll(uniform[:, 0], 1), np.roll(uniform[:, 0], 1000)])
    correlation = np.corrcoef(lagged) - np.eye(5)
    assert np.abs(correlation).max() < 4 / np.sqrt(20000)
    copies = np.array([Sample(0, 5, copy) for copy in range(100)], dtype=np.uint64)
    assert len(np.unique(hashed_uniform(0, copies, 1))) == 100


def test_broken_images_are_an_error_or_skipped():
    with pytest.raises(UndecodableImage, match="row 7"):
        DeviceCache(Pixels(broken=(7,)), 8, CPU)
    data = DeviceCache(Pixels(broken=(7, 9)), 8, CPU, undecodable="skip")
    epoch = list(islice(batches(data), 5))
    assert sorted(seen(*epoch)) == sorted(set(range(20)) - {7, 9})
    skipped = [text for batch in epoch for text in batch.skipped]
    assert sorted(skipped) == ["row 7: cut short", "row 9: cut short"]
    images = [batch.images for batch in islice(batches(data, batch_size=1), 20)]
    assert images.count([]) == 2
    broken = Pixels(size=(12, 12), broken=(0,))
    assert DeviceCache(broken, None, CPU, undecodable="skip").images.shape[-1] == 12
    with pytest.raises(UndecodableImage, match="row 0"):
        DeviceCache(broken, None, CPU)


def test_images_are_resized_once_or_keep_their_size():
    assert DeviceCache(Pixels(size=(16, 16)), 8, CPU).images.shape == (20, 3, 8, 8)
    data = DeviceCache(Pixels(size=(12, 12)), None, CPU)
    assert data.images.shape == (20, 3, 12, 12)
    images = next(batches(data, crop="random_resized")).images
    assert (images.shape, images.dtype) == ((4, 3, 8, 8), torch.uint8)


@pytest.mark.parametrize(
    ("dataset", "size_px", "message"),
    [
        (Pixels(size=(8, 12)), 8, "8 px, and image 0 has 12 x 8 px after its short side"),
        (Pixels(size=(8, 12)), None, "square images of one size, 8 px, and image 0 has 12 x 8 px"),
        (Pixels(broken=range(4), length=4), None, "found no image that can be decoded"),
        (Pixels(length=10**13), 32, r"needs 28610229.5 GiB for 1\d* images .*, and cpu has"),
    ],
)
def test_images_that_cannot_be_cached_are_refused(dataset, size_px, message):
    with pytest.raises(ValueError, match=message):
        DeviceCache(dataset, size_px, CPU, undecodable="skip")


# Augmentation of whole batches.


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 20, 20), dtype=torch.uint8, generator=generator)


def test_shifts_are_down_and_right():
    image = torch.arange(16).view(1, 1, 4, 4)
    (crop,) = shifted(image, torch.tensor([[2, 0]]), 1)
    assert crop.tolist() == [[[0, 4, 5, 6], [0, 8, 9, 10], [0, 12, 13, 14], [0, 0, 0, 0]]]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size_px", [8, 20, 33])
def test_a_resized_crop_is_that_of_torchvision(images, interpolation, size_px):
    boxes = random_boxes(draws(6, 22), 20, (0.08, 1.0), RATIO)
    crops = resized_crops(images, boxes, size_px, interpolation)
    sides, mode = [size_px, size_px], InterpolationMode(interpolation)
    for image, box, crop in zip(images, boxes.tolist(), crops, strict=True):
        theirs = v2.functional.resized_crop(image, *box, sides, mode, antialias=True)
        # torch 2.8 rounds some bytes the other way.
        assert (crop.int() - theirs.int()).abs().max() <= 1


def test_boxes_are_in_their_image_and_distributed_as_those_of_torchvision():
    boxes = random_boxes(draws(4000, 22), 32, (0.3, 1.0), RATIO)
    ends = boxes[:, :2] + boxes[:, 2:]
    assert (boxes[:, :2].min(), ends.max()) == (0, 32)
    torch.manual_seed(0)
    image, law = torch.zeros(1, 32, 32), v2.RandomResizedCrop(32, scale=(0.3, 1.0))
    theirs = [law.make_params([image]) for _ in range(4000)]
    for ours, name in zip(boxes.T, ("top", "left", "height", "width"), strict=True):
        other = np.array([params[name] for params in theirs])
        error = np.hypot(ours.std(), other.std()) / np.sqrt(4000)
        assert abs(ours.mean() - other.mean()) < 4 * error
        assert ours.std() == pytest.approx(other.std(), rel=0.1)
    assert random_boxes(draws(3, 22), 16, (4.0, 5.0), (1, 1)).tolist() == [[0, 0, 16, 16]] * 3
    erasing = v2.RandomErasing()  # its ratio is height over width
    assert erasing.ratio == pytest.approx([1 / r for r in reversed(device_cache._ERASE_RATIO)])
    assert erasing.scale == device_cache._ERASE_SCALE


def test_erasing_fills_the_box_and_nothing_else(images):
    boxes = np.array([[2, 3, 4, 5]] * 5 + [[0, 0, 0, 0]])
    results = erased(images, boxes, (1, 2, 3))
    for image, before in zip(results[:5], images[:5], strict=True):
        assert (image[:, 2:6, 3:8] == torch.tensor([1, 2, 3])[:, None, None]).all()
        image[:, 2:6, 3:8] = before[:, 2:6, 3:8]
        assert image.equal(before)
    assert results[5].equal(images[5])


def test_images_are_erased_and_flipped_as_often_as_asked():
    plain = torch.arange(20).repeat(2000, 3, 20, 1).to(torch.uint8)
    augment = BatchAugment(20, "none", 0, (0.08, 1.0), 0.5, "bilinear", 0.25)
    results = augment(plain, draws(2000, augment.num_draws))
    is_erased = (results > 19).flatten(1).any(1)
    assert is_erased.float().mean() == pytest.approx(0.25, abs=0.04)
    flipped = (results[~is_erased][:, 0, 0, 0] == 19).float()
    assert flipped.mean() == pytest.approx(0.5, abs=0.05)
    share = (results[is_erased] > 19)[:, 0].float().mean((1, 2))
    assert 0.01 < share.min() < share.max() < 0.37


def test_an_image_is_augmented_the_same_in_every_batch(images):
    augment = BatchAugment(12, "random_resized", 0, (0.3, 1.0), 0.5, "bilinear", 0.5)
    numbers = draws(6, augment.num_draws)
    whole = augment(images, numbers)
    assert whole.shape == (6, 3, 12, 12)
    single = [augment(images[i : i + 1], numbers[i : i + 1]) for i in range(6)]
    assert torch.cat(single).equal(whole)
