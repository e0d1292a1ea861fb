"""Batches depend on seed and iteration alone, and skip or report what cannot be decoded."""

import random
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch

from tract_transfer.data.digits import load_digits
from tract_transfer.data.images import UndecodableImage
from tract_transfer.data.loader import SampledDataset, load_batches
from tract_transfer.data.sampling import EpochOrder, Sample, TrainBatchSampler, eval_batches
from tract_transfer.data.transforms import classification_train, detection_eval, detection_train

AUGMENT = classification_train(32, "random_resized", 0, (0.3, 1.0), 0.5, "bilinear")


class Objects:
    """Twelve images of different sizes with boxes; those in `broken` cannot be decoded."""

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


def load(dataset, transform, batches, num_workers=0, **options):
    return load_batches(dataset, transform, batches, seed=3, num_workers=num_workers, **options)


def states():
    """The global random states of torch, NumPy and Python."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_a_sample_depends_on_seed_epoch_index_and_copy_alone():
    dataset = load_digits("train")
    first = SampledDataset(dataset, AUGMENT, 0)[Sample(2, 7)].image
    torch.manual_seed(123)
    assert torch.equal(SampledDataset(dataset, AUGMENT, 0)[Sample(2, 7)].image, first)
    for seed, sample in ((0, Sample(3, 7)), (0, Sample(2, 7, 1)), (1, Sample(2, 7))):
        assert not torch.equal(SampledDataset(dataset, AUGMENT, seed)[sample].image, first)


def batches_with(num_workers, start_iter=0, count=4):
    dataset = load_digits("train")
    sampler = TrainBatchSampler(EpochOrder(len(dataset), 8, 3), start_iter, accumulate=2)
    return list(islice(load(dataset, AUGMENT, sampler, num_workers), count))


def test_workers_and_resuming_change_no_bit_and_no_global_state():
    before, batches = states(), batches_with(0)
    assert batches[0].images.shape == (4, 3, 32, 32)
    assert batches[0].targets.dtype == torch.int64
    for others in (batches_with(2), batches[:2] + batches_with(1, start_iter=1, count=2)):
        for ours, other in zip(batches, others, strict=True):
            assert torch.equal(ours.images, other.images)
            assert torch.equal(ours.targets, other.targets)
            assert ours.indices == other.indices
    assert states() == before


def test_detection_batches_are_lists():
    sampler = TrainBatchSampler(EpochOrder(12, 3, 0))
    batch = next(iter(load(Objects(), detection_train([40], 80, 0.5), sampler))).to("cpu")
    assert [target["image_id"] for target in batch.targets] == batch.indices
    assert [int(image[0, 0, 0]) for image in batch.images] == batch.indices


def test_an_evaluation_sees_every_image_once_over_all_processes():
    loader = load(Objects(), detection_eval, eval_batches(12, 5, 1, 2))
    assert len(loader) == 2
    assert [batch.indices for batch in loader] == [[1, 3, 5, 7, 9], [11]]
    for world_size in (1, 3, 5, 13):
        shares = (eval_batches(12, 5, rank, world_size) for rank in range(world_size))
        assert sorted(i for share in shares for batch in share for i in batch) == list(range(12))


def test_undecodable_images_are_an_error_or_skipped_and_listed():
    def loaded(broken, batch_size, **options):
        return list(load(Labels(broken), torch.clone, eval_batches(12, batch_size), **options))

    with pytest.raises(UndecodableImage, match=r"4\.jpg cannot be decoded: cut short.*skip"):
        loaded((4,), 6, num_workers=1)
    first, second = loaded((1, 4), 6, undecodable="skip")
    assert first.indices == [0, 2, 3, 5]
    assert first.targets.tolist() == [0, 2, 0, 2]
    assert first.skipped == ["1.jpg: cut short", "4.jpg: cut short"]
    assert second.skipped == []
    empty = loaded((0, 1), 2, undecodable="skip")[0]
    assert (len(empty.images), len(empty.targets), len(empty.skipped)) == (0, 0, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs page-locked memory")
def test_batches_are_pinned():
    batch = next(iter(load(Objects(), detection_eval, eval_batches(12, 5), pin_memory=True)))
    assert batch.targets[0]["boxes"].is_pinned()


ENDING = """
from tract_transfer.data.digits import load_digits
from tract_transfer.data.loader import load_batches

batches = [[0, 1]] * 99
left_open = iter(load_batches(load_digits("test"), lambda x: x, batches, seed=0, num_workers=2))
next(left_open)
raise RuntimeError("a failed training")
"""


def test_a_failed_process_ends_although_its_workers_ignore_signals():
    process = subprocess.run(
        [sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=100, check=False
    )
    assert process.returncode == 1
    assert process.stderr.rstrip().endswith("a failed training")
