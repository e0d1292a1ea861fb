"""Batches that depend on the seed and the iteration alone.

Which samples an iteration sees is sampling.py's; their random numbers depend on (seed, epoch,
index): neither on the number of workers, nor on where a run was resumed. The global random state
is neither used nor changed.
"""

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from tract_transfer.data.images import MAX_PIXELS, UndecodableImage, decode_image
from tract_transfer.data.sampling import EvalSampler, Sample, TrainBatchSampler, mix
from tract_transfer.data.streaming import StreamedSample


class ImageDataset(Protocol):
    """What both kinds of dataset offer."""

    def __len__(self) -> int:
        """Return the number of images."""

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 RGB (3, H, W)."""

    def target(self, index: int) -> Any:
        """Return a class (int), or the dict of an image's objects."""


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
        seed: with the sample's epoch, index and copy it seeds torch's CPU generator while the
            transform runs; afterwards the generator is as it was. A plain index counts as epoch 0.
        undecodable: `error` raises UndecodableImage; `skip` leaves the image out and says so.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[..., Any],
        seed: int,
        undecodable: str = "error",
    ) -> None:
        self._dataset = dataset
        self._transformer = _Transformer(transform, seed, undecodable)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, sample: Sample | int) -> _Loaded:
        sample = sample if isinstance(sample, Sample) else Sample(0, sample)
        return self._transformer(sample, self._dataset.image, self._dataset.target)


class StreamedImages(Dataset[_Loaded]):
    """What decodes the samples of a stream and transforms them, as SampledDataset does its own.

    Args:
        title: what an error message calls the split.
        max_pixels: an image of more cannot be decoded.
    """

    def __init__(
        self,
        title: str,
        transform: Callable[..., Any],
        seed: int,
        undecodable: str = "error",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._title = title
        self._max_pixels = max_pixels
        self._transformer = _Transformer(transform, seed, undecodable)

    def __getitem__(self, streamed: StreamedSample) -> _Loaded:
        sample, (stored, label) = streamed

        def image(index: int) -> Tensor:
            item = f"{self._title} row {index}"
            return decode_image(stored, item, max_pixels=self._max_pixels)

        return self._transformer(sample, image, lambda _: label)


class _Transformer:
    """The transform, with a random state of its own for every sample; see SampledDataset."""

    def __init__(self, transform: Callable[..., Any], seed: int, undecodable: str) -> None:
        if undecodable not in ("error", "skip"):
            raise ValueError(f"data.undecodable must be error or skip, got {undecodable!r}.")
        self._transform = transform
        self._seed = seed
        self._skip = undecodable == "skip"

    def __call__(
        self, sample: Sample, image_of: Callable[[int], Tensor], target_of: Callable[[int], Any]
    ) -> _Loaded:
        epoch, index, copy = sample
        try:
            image = image_of(index)
        except UndecodableImage as error:
            if not self._skip:
                raise
            return _Loaded(index, None, None, f"{error.item}: {error.reason}")
        target = target_of(index)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators too.
            again = (copy,) if copy else ()
            torch.default_generator.manual_seed(mix(self._seed, epoch, index, *again))
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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@cache
def _end_workers_at_exit() -> None:
    """multiprocessing sends SIGTERM to those still there, and would wait for them forever."""

    def end() -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises where a worker is killed
        for worker in multiprocessing.active_children():
            if worker.daemon:
                worker.kill()

    atexit.register(end)


def _collate(loaded: list[_Loaded]) -> Batch:
    skipped = [one.skipped for one in loaded if one.image is None]
    images = [one.image for one in loaded if one.image is not None]
    targets = [one.target for one in loaded if one.image is not None]
    indices = [one.row for one in loaded if one.image is not None]
    if not images or isinstance(targets[0], dict):
        return Batch(images, targets, indices, skipped)
    return Batch(torch.stack(images), torch.tensor(targets), indices, skipped)


class _Loader(DataLoader[Batch]):
    """A loader that tells what its workers find wrong in their own words, without a traceback."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except (ValueError, OSError) as error:
            name = f"{type(error).__name__}: "
            _, told, words = str(error).partition("Original Traceback")[2].rpartition(name)
            if not told:
                raise
            raise type(error)(words.strip()) from error


def _loader(
    samples: Dataset[_Loaded], batches: Any, *, num_workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """Return the loader of the samples that `batches` lists."""
    _end_workers_at_exit()
    return _Loader(
        samples,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each iterator draws from the global one
    )


def train_loader(
    dataset: ImageDataset,
    transform: Callable[..., Any],
    sampler: TrainBatchSampler,
    *,
    seed: int,
    num_workers: int,
    undecodable: str = "error",
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Return the endless loader of one process's micro-batches; see SampledDataset."""
    samples = SampledDataset(dataset, transform, seed, undecodable)
    return _loader(samples, sampler, num_workers=num_workers, pin_memory=pin_memory)


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
    samples = SampledDataset(dataset, transform, 0, undecodable)
    sampler = EvalSampler(len(dataset), rank, world_size)
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    return _loader(samples, batches, num_workers=num_workers, pin_memory=pin_memory)


def stream_loader(
    title: str,
    transform: Callable[..., Any],
    batches: Iterable[list[StreamedSample]],
    *,
    seed: int,
    num_workers: int,
    undecodable: str = "error",
    max_pixels: int = MAX_PIXELS,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Return the loader of the samples that `batches` reads, in this process; workers decode them.

    So neither what is read nor the order depends on the number of workers.
    """
    samples = StreamedImages(title, transform, seed, undecodable, max_pixels)
    return _loader(samples, batches, num_workers=num_workers, pin_memory=pin_memory)
