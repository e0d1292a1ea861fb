"""Batches that depend on the seed and the iteration alone.

Which samples an iteration sees depends on (seed, epoch), their random numbers on (seed, epoch,
index): neither on the number of workers, nor on where a run was resumed. The global random state
is neither used nor changed.
"""

import hashlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tract_transfer.data.images import UndecodableImage


class ImageDataset(Protocol):
    """What both kinds of dataset offer."""

    def __len__(self) -> int:
        """Return the number of images."""

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 RGB (3, H, W)."""

    def target(self, index: int) -> Any:
        """Return a class (int), or the dict of an image's objects."""


class Sample(NamedTuple):
    """One image as it is met in one epoch."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index


def _mix(*parts: int) -> int:
    """Hash whole numbers to 64 bits, so that neighbouring seeds share nothing."""
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class TrainBatchSampler(Sampler[list[Sample]]):
    """The endless sequence of one process's micro-batches.

    Each epoch is a permutation that depends on (seed, epoch); what does not fill a batch at its
    end is dropped. A batch, the images of one optimizer step over all processes, is a slice of
    it, cut into `accumulate` micro-batches, each cut into one part a process. The sequence from
    `start_iter` is the tail of the one from 0.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        start_iter: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        assert start_iter >= 0
        assert accumulate >= 1
        if not 1 <= batch_size <= num_samples:
            raise ValueError(
                f"data.batch_size must lie in 1..{num_samples}, the number of training images, "
                f"got {batch_size}. Set data.batch_size to {num_samples} or less."
            )
        parts = world_size * accumulate
        if batch_size % parts:
            nearest = max(batch_size // parts, 1) * parts
            raise ValueError(
                f"data.batch_size must be divisible by processes x engine.accumulate = "
                f"{world_size} x {accumulate} = {parts}, got {batch_size}. "
                f"Set data.batch_size to {nearest}, or another engine.accumulate."
            )
        self.iters_per_epoch = num_samples // batch_size
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._seed = seed
        self._start_iter = start_iter
        self._rank = rank
        self._world_size = world_size
        self._micro_size = batch_size // accumulate

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch, position = divmod(self._start_iter, self.iters_per_epoch)
        own = self._micro_size // self._world_size
        used = self.iters_per_epoch * self._batch_size
        while True:
            order = self._permutation(epoch)
            for start in range(position * self._batch_size, used, self._micro_size):
                first = start + self._rank * own
                yield [Sample(epoch, index) for index in order[first : first + own].tolist()]
            epoch, position = epoch + 1, 0

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(_mix(self._seed, epoch))
        return torch.randperm(self._num_samples, generator=generator)


class EvalSampler(Sampler[int]):
    """Every `world_size`-th index from `rank`: each image once, none twice as padding."""

    def __init__(self, num_samples: int, rank: int, world_size: int) -> None:
        assert 0 <= rank < world_size
        self._indices = range(rank, num_samples, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class _Loaded(NamedTuple):
    """A transformed sample, or why there is none."""

    row: int
    image: Tensor | None
    target: Any
    skipped: str


class SampledDataset(Dataset[_Loaded]):
    """A dataset and its transform, with a random state of its own for every sample.

    Args:
        dataset: where images and targets come from.
        transform: called with the image, or, where targets are dicts, with image and target.
        seed: with the sample's epoch and index it seeds torch's CPU generator while the transform
            runs; afterwards the generator is as it was. A plain index counts as epoch 0.
        undecodable: `error` raises UndecodableImage; `skip` leaves the image out and says so.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[..., Any],
        seed: int,
        undecodable: str = "error",
    ) -> None:
        if undecodable not in ("error", "skip"):
            raise ValueError(f"data.undecodable must be error or skip, got {undecodable!r}.")
        self._dataset = dataset
        self._transform = transform
        self._seed = seed
        self._skip = undecodable == "skip"

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, sample: Sample | int) -> _Loaded:
        epoch, index = sample if isinstance(sample, Sample) else Sample(0, sample)
        try:
            image = self._dataset.image(index)
        except UndecodableImage as error:
            if not self._skip:
                raise
            return _Loaded(index, None, None, f"{error.item}: {error.reason}")
        target = self._dataset.target(index)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators too.
            torch.default_generator.manual_seed(_mix(self._seed, epoch, index))
            if isinstance(target, dict):
                image, target = self._transform(image, target)
            else:
                image = self._transform(image)
        return _Loaded(index, image, target, "")


@dataclass
class Batch:
    """What a loader yields.

    Attributes:
        images: uint8; (B, 3, H, W) for classification, a list of (3, H, W) for detection.
        targets: int64 (B,), or a list of dicts as `DetectionDataset.target` returns them.
        indices: which images of the dataset these are.
        skipped: file or row and reason of each image left out because it cannot be decoded; where
            that is all of them, images and targets are empty lists.
    """

    images: Tensor | list[Tensor]
    targets: Tensor | list[dict[str, Any]]
    indices: list[int]
    skipped: list[str]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device; from pinned memory the copy does not block."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; the DataLoader calls it."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        images, targets = self.images, self.targets
        return replace(
            self,
            images=move(images) if isinstance(images, Tensor) else [move(one) for one in images],
            targets=move(targets)
            if isinstance(targets, Tensor)
            else [
                {k: move(v) if isinstance(v, Tensor) else v for k, v in one.items()}
                for one in targets
            ],
        )


def _leave_signals_to_the_parent(_worker: int) -> None:
    """A signal to the whole group (Ctrl-C, a scheduler) must not kill what the last step needs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _collate(loaded: list[_Loaded]) -> Batch:
    skipped = [one.skipped for one in loaded if one.image is None]
    images = [one.image for one in loaded if one.image is not None]
    targets = [one.target for one in loaded if one.image is not None]
    indices = [one.row for one in loaded if one.image is not None]
    if not images or isinstance(targets[0], dict):
        return Batch(images, targets, indices, skipped)
    return Batch(torch.stack(images), torch.tensor(targets), indices, skipped)


def train_loader(
    dataset: ImageDataset,
    transform: Callable[..., Any],
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    start_iter: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    undecodable: str = "error",
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Return the endless loader of one process's micro-batches, from iteration `start_iter`.

    See TrainBatchSampler for `batch_size` and the order, SampledDataset for the rest.
    """
    sampler = TrainBatchSampler(
        len(dataset), batch_size, seed, start_iter, rank, world_size, accumulate
    )
    return DataLoader(
        SampledDataset(dataset, transform, seed, undecodable),  # type: ignore[arg-type]
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each iterator draws from the global one
    )


def eval_loader(
    dataset: ImageDataset,
    transform: Callable[..., Any],
    *,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    undecodable: str = "error",
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Return the loader of one process's share, in order, each image once.

    `batch_size` counts the images of this process; the last batch may be smaller.
    """
    return DataLoader(
        SampledDataset(dataset, transform, 0, undecodable),  # type: ignore[arg-type]
        batch_size=batch_size,
        sampler=EvalSampler(len(dataset), rank, world_size),
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )
