"""Batches that depend on the seed and the iteration alone.

sampling.py decides which samples an iteration sees. Their random numbers depend on (seed, epoch,
index, copy), and neither on the number of workers nor on where a run was resumed. The global random
state is neither used nor changed.
"""

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from tract_transfer.data.images import MAX_PIXELS, UndecodableImage, decode_image
from tract_transfer.data.sampling import EvalSampler, Sample, TrainBatchSampler, mix
from tract_transfer.data.streaming import StreamedSample


@dataclass
class Batch:
    """What a loader yields.

    Attributes:
        images: uint8; (B, 3, H, W) for classification, a list of (3, H, W) for detection.
        targets: int64 (B,), or a list of dicts as `DetectionDataset.target` returns.
        indices: the indices of the images in the data set.
        skipped: file or row, and reason, of each image that cannot be decoded; if that is all of
            them, images and targets are empty lists.
    """

    images: Tensor | list[Tensor]
    targets: Tensor | list[dict[str, Any]]
    indices: list[int]
    skipped: list[str]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device; from pinned memory the copy does not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; the DataLoader calls it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(item) for item in value]
            if isinstance(value, dict):
                return {key: moved(item) for key, item in value.items()}
            return move(value) if isinstance(value, Tensor) else value

        return replace(self, images=moved(self.images), targets=moved(self.targets))


class ImageDataset(Protocol):
    """What every data set offers."""

    def __len__(self) -> int:
        """Return the number of images."""

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 RGB (3, H, W)."""

    def target(self, index: int) -> Any:
        """Return a class (int), the dict of an image's objects, or a list of marks."""


class _Loaded(NamedTuple):
    """A transformed sample, or the reason why there is none."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    image: Tensor | None
    target: Any
    skipped: str


class SampledDataset(Dataset[_Loaded]):
    """A data set and its transform, with its own random state for every sample.

    Args:
        dataset: the source of images and targets.
        transform: called with the image, or with image and target if targets are dicts.
        seed: with the sample's epoch, index and copy it seeds torch's CPU generator during the
            transform; the generator's state is restored afterwards. A plain index is of epoch 0.
        undecodable: `error` raises UndecodableImage; `skip` skips the image and lists it.
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

    def __getitem__(self, sample: Any) -> _Loaded:
        sample = sample if isinstance(sample, Sample) else Sample(0, sample)
        return self._loaded(sample, self._dataset)

    def _loaded(self, sample: Sample, dataset: ImageDataset) -> _Loaded:
        epoch, index, copy = sample
        try:
            image = dataset.image(index)
        except UndecodableImage as error:
            if not self._skip:
                raise
            return _Loaded(index, None, None, f"{error.item}: {error.reason}")
        target = dataset.target(index)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators too.
            parts = (epoch, index, copy) if copy else (epoch, index)
            torch.default_generator.manual_seed(mix(self._seed, *parts))
            if isinstance(target, dict):
                image, target = self._transform(image, target)
            else:
                image = self._transform(image)
        return _Loaded(index, image, target, "")


@dataclass
class _StreamedImage:
    """The data set of one streamed sample, which a worker decodes."""

    title: str
    max_pixels: int
    stored: bytes | Path = b""
    label: int = -1

    def __len__(self) -> int:
        return 1

    def image(self, index: int) -> Tensor:
        item = f"{self.title} row {index}"
        return decode_image(self.stored, item, max_pixels=self.max_pixels)

    def target(self, index: int) -> int:
        return self.label


class _StreamedImages(SampledDataset):
    """Transforms the samples of a stream, which carry their images."""

    _dataset: _StreamedImage

    def __getitem__(self, sample: StreamedSample) -> _Loaded:
        return self._loaded(sample.sample, replace(self._dataset, **sample.row._asdict()))


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
    """Return the loader of a stream: this process reads `batches`, and workers decode them.

    So neither the rows that are read nor their order depends on the number of workers.
    """
    samples = _StreamedImages(_StreamedImage(title, max_pixels), transform, seed, undecodable)
    return _loader(samples, batches, num_workers=num_workers, pin_memory=pin_memory)


def _loader(
    samples: Dataset[_Loaded], batches: Any, *, num_workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    _end_workers_at_exit()
    return _Loader(
        samples,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each iterator draws from the global one
    )


class _Loader(DataLoader[Batch]):
    """A DataLoader that raises a worker's error with its own message, without a traceback."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except (ValueError, OSError) as error:
            traceback = str(error).partition("Original Traceback")[2]
            _, separator, message = traceback.rpartition(f"{type(error).__name__}: ")
            if not separator:
                raise
            raise type(error)(message.strip()) from error


def _collate(samples: list[_Loaded]) -> Batch:
    loaded = [sample for sample in samples if sample.image is not None]
    skipped = [sample.skipped for sample in samples if sample.image is None]
    indices = [sample.index for sample in loaded]
    images: list[Any] = [sample.image for sample in loaded]
    targets = [sample.target for sample in loaded]
    if not loaded or isinstance(targets[0], dict):
        return Batch(images, targets, indices, skipped)
    return Batch(torch.stack(images), torch.tensor(targets), indices, skipped)


def _ignore_signals(_worker: int) -> None:
    """A signal to the whole group (Ctrl-C, a scheduler) must not kill what the last step needs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@cache
def _end_workers_at_exit() -> None:
    """Kill the remaining workers: multiprocessing sends SIGTERM, and would wait forever."""

    def end() -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises if a worker is killed
        for worker in multiprocessing.active_children():
            if worker.daemon:
                worker.kill()

    atexit.register(end)
