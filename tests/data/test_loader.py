import random
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch

from tract_transfer.data.digits import load_digits
from tract_transfer.data.images import UndecodableImage
from tract_transfer.data.loader import Batch, SampledDataset, eval_loader, train_loader
from tract_transfer.data.sampling import EpochOrder, Sample, TrainBatchSampler
from tract_transfer.data.transforms import classification_train, detection_eval, detection_train

AUGMENT = classification_train(32, "random_resized", 0, (0.3, 1.0), 0.5, "bilinear")


class Objects:
    """Twelve images of different sizes, with boxes; those in `broken` cannot be decoded."""

    def __init__(self, broken=()):
        self.broken = broken

    def __len__(self):
        return 12

    def image(self, index):
        if index in self.broken:
            raise UndecodableImage(f"{index}.jpg", "cut short")
        return torch.full((3, 20 + index, 30), index, dtype=torch.uint8)

    def target(self, index):
        boxes = torch.tensor([[1.0, 2, 10, 12]])
        return {"boxes": boxes, "labels": torch.tensor([index]), "image_id": index}


class Labels(Objects):
    def image(self, index):
        return super().image(index)[:, :20]

    def target(self, index):
        return index % 3


def states():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def same_states(a, b):
    return torch.equal(a[0], b[0]) and (a[1] == b[1]).all() and a[2] == b[2]


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    dataset = load_digits("train")
    before = states()
    first = SampledDataset(dataset, AUGMENT, 0)[Sample(2, 7)].image
    assert same_states(before, states())
    torch.manual_seed(123)
    assert torch.equal(SampledDataset(dataset, AUGMENT, 0)[Sample(2, 7)].image, first)
    assert not torch.equal(SampledDataset(dataset, AUGMENT, 0)[Sample(3, 7)].image, first)
    assert not torch.equal(SampledDataset(dataset, AUGMENT, 0)[Sample(2, 7, 1)].image, first)
    assert not torch.equal(SampledDataset(dataset, AUGMENT, 1)[Sample(2, 7)].image, first)


def batches_with(num_workers, start_iter=0, count=4):
    dataset = load_digits("train")
    sampler = TrainBatchSampler(EpochOrder(len(dataset), 8, 3), start_iter, accumulate=2)
    loader = train_loader(dataset, AUGMENT, sampler, seed=3, num_workers=num_workers)
    return list(islice(iter(loader), count))


def same_batches(ours, theirs):
    return all(
        torch.equal(a.images, b.images)
        and torch.equal(a.targets, b.targets)
        and a.indices == b.indices
        for a, b in zip(ours, theirs, strict=True)
    )


def test_workers_and_resuming_change_no_bit_and_no_global_state():
    before = states()
    batches = batches_with(0)
    assert batches[0].images.shape == (4, 3, 32, 32)
    assert batches[0].targets.dtype == torch.int64
    assert same_batches(batches, batches_with(1))
    assert same_batches(batches, batches_with(2))
    assert same_batches(batches[2:], batches_with(1, start_iter=1, count=2))
    assert same_states(before, states())


def test_an_image_repeated_in_an_epoch_is_augmented_anew_and_reproducibly():
    flip = detection_train([20, 30, 40, 50, 60], 100, 0.5, photometric_prob=0.5)
    order = EpochOrder(12, 12, 0, factors=np.full(12, 4.0))

    def load(num_workers, start_iter=0):
        sampler = TrainBatchSampler(order, start_iter)
        loader = train_loader(Objects(), flip, sampler, seed=0, num_workers=num_workers)
        return list(islice(iter(loader), 4 - start_iter))

    batches = load(0)
    by_image = {}
    for batch in batches:
        for index, image in zip(batch.indices, batch.images, strict=True):
            by_image.setdefault(index, []).append((tuple(image.shape), image.sum().item()))
    assert {len(shown) for shown in by_image.values()} == {4}
    assert min(len(set(shown)) for shown in by_image.values()) > 1
    for ours, theirs in ((batches, load(2)), (batches[1:], load(0, start_iter=1))):
        for a, b in zip(ours, theirs, strict=True):
            assert a.indices == b.indices
            assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


def test_detection_batches_are_lists():
    flip = detection_train([40], 80, 0.5)
    sampler = TrainBatchSampler(EpochOrder(12, 3, 0))
    loader = train_loader(Objects(), flip, sampler, seed=0, num_workers=0)
    batch = next(iter(loader)).to("cpu")
    assert [target["image_id"] for target in batch.targets] == batch.indices
    assert [int(image[0, 0, 0]) for image in batch.images] == batch.indices
    loader = eval_loader(
        Objects(), detection_eval(), batch_size=5, num_workers=0, rank=1, world_size=2
    )
    assert [batch.indices for batch in loader] == [[1, 3, 5, 7, 9], [11]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_undecodable_image_stops_with_its_name(num_workers):
    data = Labels(broken=(4,))
    loader = eval_loader(data, lambda image: image, batch_size=6, num_workers=num_workers)
    with pytest.raises(UndecodableImage, match=r"4\.jpg cannot be decoded: cut short.*skip"):
        list(loader)


def test_skipped_images_are_told():
    def load(broken, batch_size):
        return list(
            eval_loader(
                Labels(broken),
                lambda image: image,
                batch_size=batch_size,
                num_workers=0,
                undecodable="skip",
            )
        )

    first, second = load((1, 4), 6)
    assert first.indices == [0, 2, 3, 5]
    assert first.targets.tolist() == [0, 2, 0, 2]
    assert first.skipped == ["1.jpg: cut short", "4.jpg: cut short"]
    assert second.skipped == []
    empty = load((0, 1), 2)[0]
    assert len(empty.images) == len(empty.targets) == 0
    assert empty.skipped == ["0.jpg: cut short", "1.jpg: cut short"]
    with pytest.raises(ValueError, match=r"data\.undecodable must be error or skip"):
        SampledDataset(Labels(), lambda image: image, 0, "ignore")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs page-locked memory")
def test_batches_pin():
    batch = Batch([torch.zeros(3, 2, 2)], [{"boxes": torch.zeros(1, 4), "image_id": 0}], [0], [])
    assert batch.pin_memory().targets[0]["boxes"].is_pinned()


ENDING = """
from tract_transfer.data.digits import load_digits
from tract_transfer.data.loader import eval_loader
from tract_transfer.data.transforms import classification_eval

transform = classification_eval(32, 1.0, "bilinear")
left_open = iter(eval_loader(load_digits("test"), transform, batch_size=4, num_workers=2))
next(left_open)
raise RuntimeError("as from a training")
"""


def test_a_process_that_fails_ends_although_its_workers_leave_signals_alone():
    process = subprocess.run(
        [sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=100, check=False
    )
    assert process.returncode == 1
    assert process.stderr.rstrip().endswith("as from a training")
