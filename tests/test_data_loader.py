import random
from itertools import islice

import numpy as np
import pytest
import torch

from tract_transfer.data.digits import load_digits
from tract_transfer.data.images import UndecodableImage
from tract_transfer.data.loader import (
    Batch,
    EvalSampler,
    Sample,
    SampledDataset,
    TrainBatchSampler,
    eval_loader,
    train_loader,
)
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


def take(sampler, count):
    return list(islice(iter(sampler), count))


def test_every_epoch_visits_each_kept_index_once():
    batches = take(TrainBatchSampler(23, 5, seed=1), 12)
    for epoch in range(3):
        samples = [sample for batch in batches[4 * epoch : 4 * epoch + 4] for sample in batch]
        assert {sample.epoch for sample in samples} == {epoch}
        assert len({sample.index for sample in samples}) == 20
    orders = {tuple(s.index for b in batches[4 * e : 4 * e + 4] for s in b) for e in range(3)}
    assert len(orders) == 3
    assert take(TrainBatchSampler(23, 5, seed=2), 12) != batches


@pytest.mark.parametrize("start_iter", [0, 1, 4, 7, 11])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_gives_the_tail(start_iter, accumulate):
    whole = take(TrainBatchSampler(17, 4, 0, accumulate=accumulate), 15 * accumulate)
    tail = TrainBatchSampler(17, 4, 0, start_iter, accumulate=accumulate)
    skipped = start_iter * accumulate
    assert take(tail, 15 * accumulate - skipped) == whole[skipped:]


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 3), (2, 3), (6, 2)])
def test_ranks_and_micro_batches_partition_the_batch(world_size, accumulate):
    whole = take(TrainBatchSampler(30, 12, seed=5), 5)
    ranks = [
        take(TrainBatchSampler(30, 12, 5, 0, rank, world_size, accumulate), 5 * accumulate)
        for rank in range(world_size)
    ]
    for i, batch in enumerate(whole):
        micros = range(i * accumulate, (i + 1) * accumulate)
        assert [s for m in micros for rank in ranks for s in rank[m]] == batch


@pytest.mark.parametrize(
    ("batch_size", "parts", "message"),
    [
        (11, (1, 1), "data.batch_size must lie in 1..10"),
        (0, (1, 1), "data.batch_size must lie in 1..10"),
        (6, (2, 2), r"2 x 2 = 4, got 6. Set data.batch_size to 4, or another engine.accumulate"),
    ],
)
def test_wrong_batch_sizes_say_what_to_set(batch_size, parts, message):
    with pytest.raises(ValueError, match=message):
        TrainBatchSampler(10, batch_size, 0, 0, 0, *parts)


@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_eval_visits_every_image_once_on_any_number_of_processes(world_size):
    seen = [list(EvalSampler(10, rank, world_size)) for rank in range(world_size)]
    assert sorted(index for part in seen for index in part) == list(range(10))


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
    assert not torch.equal(SampledDataset(dataset, AUGMENT, 1)[Sample(2, 7)].image, first)


def batches_with(num_workers, start_iter=0, count=4):
    loader = train_loader(
        load_digits("train"),
        AUGMENT,
        batch_size=8,
        seed=3,
        num_workers=num_workers,
        start_iter=start_iter,
        accumulate=2,
    )
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


def test_detection_batches_are_lists():
    flip = detection_train([40], 80, 0.5)
    loader = train_loader(Objects(), flip, batch_size=3, seed=0, num_workers=0)
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
