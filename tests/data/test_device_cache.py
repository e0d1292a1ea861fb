"""Images on their device: what a batch holds, and by which numbers."""

import itertools

import numpy as np
import pytest
import torch

from tract_transfer.data.device_cache import (
    BatchAugment,
    DeviceCache,
    cached_batches,
    hashed_uniform,
)
from tract_transfer.data.images import UndecodableImage
from tract_transfer.data.sampling import EpochOrder, Sample, TrainBatchSampler

CPU = torch.device("cpu")


class Pixels:
    """20 images of 8 x 8, each of one shade; some broken."""

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


def seen(batch):
    return dict(zip(batch.indices, batch.images, strict=True))


def test_a_batch_holds_the_images_of_its_samples():
    dataset = Pixels()
    data = DeviceCache(dataset, 8, CPU)
    batch = next(batches(data, crop="none", flip_prob=0.0))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (4, 3, 8, 8)
    for index, image, label in zip(batch.indices, batch.images, batch.targets, strict=True):
        assert image.equal(dataset.image(index))
        assert label == dataset.target(index)


def test_crops_and_flips_are_those_of_the_padded_image():
    dataset = Pixels()
    data = DeviceCache(dataset, 8, CPU)
    found = set()
    for batch in itertools.islice(batches(data), 40):
        for index, image in seen(batch).items():
            padded = torch.nn.functional.pad(dataset.image(index), [2, 2, 2, 2])
            matches = [
                (top, left, flip)
                for top, left, flip in itertools.product(range(5), range(5), (False, True))
                if padded[:, top : top + 8, left : left + 8].flip(2 if flip else ()).equal(image)
            ]
            assert len(matches) == 1
            found.add(matches[0])
    assert len(found) > 40  # of 50


def test_what_an_epoch_shows_depends_on_seed_epoch_and_sample_alone():
    """Neither on where a run begins, nor on processes and micro-batches, nor on the batch."""
    data = DeviceCache(Pixels(), 8, CPU)
    whole = list(itertools.islice(batches(data), 10))
    for position, batch in enumerate(itertools.islice(batches(data, 3), 7), 3):
        assert batch.images.equal(whole[position].images)
    parts = [batches(data, rank=rank, world_size=2) for rank in range(2)]
    joined = torch.cat([next(part).images for part in parts])
    assert joined.equal(whole[0].images)
    halves = batches(data, accumulate=2)
    assert torch.cat([next(halves).images for _ in range(2)]).equal(whole[0].images)
    pairs = [seen(batch) for batch in itertools.islice(batches(data, batch_size=2), 10)]
    first = {index: image for batch in whole[:5] for index, image in seen(batch).items()}
    for index, image in (item for batch in pairs for item in batch.items()):
        assert image.equal(first[index])
    second = {index: image for batch in whole[5:] for index, image in seen(batch).items()}
    assert any(not image.equal(second[index]) for index, image in first.items())
    other = {i: x for b in itertools.islice(batches(data, seed=4), 5) for i, x in seen(b).items()}
    assert any(not image.equal(other[index]) for index, image in first.items())


def test_copies_of_an_image_differ():
    rows = np.array([Sample(0, 5, copy) for copy in range(100)], dtype=np.uint64)
    assert len(np.unique(hashed_uniform(0, rows, 1))) == 100


def test_hashed_numbers_are_uniform_and_uncorrelated():
    rows = np.array([(e, i, 0) for e in range(20) for i in range(1000)], dtype=np.uint64)
    draws = hashed_uniform(0, rows, 3)
    assert draws.shape == (20000, 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    expected = draws.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees, p 0.001
    lagged = np.stack([*draws.T, np.roll(draws[:, 0], 1), np.roll(draws[:, 0], 1000)])
    correlation = np.corrcoef(lagged) - np.eye(5)
    assert np.abs(correlation).max() < 4 / np.sqrt(20000)


def test_broken_images_are_named_or_left_out():
    with pytest.raises(UndecodableImage, match="row 7"):
        DeviceCache(Pixels(broken=(7,)), 8, CPU)
    data = DeviceCache(Pixels(broken=(7, 9)), 8, CPU, undecodable="skip")
    epoch = list(itertools.islice(batches(data), 5))
    assert sorted(index for batch in epoch for index in batch.indices) == sorted(
        set(range(20)) - {7, 9}
    )
    assert sorted(text for batch in epoch for text in batch.skipped) == [
        "row 7: cut short",
        "row 9: cut short",
    ]
    data = DeviceCache(Pixels(broken=range(4), length=4), 8, CPU, undecodable="skip")
    assert next(batches(data)).images == []


def test_images_are_resized_once_and_must_be_square_then():
    assert DeviceCache(Pixels(size=(16, 16)), 8, CPU).images.shape == (20, 3, 8, 8)
    with pytest.raises(ValueError, match="square images, and image 0 is 12 x 8 px"):
        DeviceCache(Pixels(size=(8, 12)), 8, CPU)


def test_crops_of_any_size_come_from_images_as_they_were_decoded():
    data = DeviceCache(Pixels(size=(12, 12)), None, CPU)
    assert data.images.shape == (20, 3, 12, 12)
    assert next(batches(data, crop="random_resized")).images.shape == (4, 3, 8, 8)
    broken = Pixels(size=(12, 12), broken=(0,))
    assert DeviceCache(broken, None, CPU, undecodable="skip").images.shape[-1] == 12
    with pytest.raises(UndecodableImage, match="row 0"):
        DeviceCache(broken, None, CPU)
    with pytest.raises(ValueError, match="of one size, here 8 px square, and image 0 is 12 x 8 px"):
        DeviceCache(Pixels(size=(8, 12)), None, CPU)
    nothing = Pixels(broken=range(4), length=4)
    with pytest.raises(ValueError, match="found no image that can be decoded"):
        DeviceCache(nothing, None, CPU, undecodable="skip")


def test_too_many_images_say_how_much_they_need():
    with pytest.raises(ValueError, match=r"needs 28610229.5 GiB for 1\d* images .*, and cpu has"):
        DeviceCache(Pixels(length=10**13), 32, CPU)
