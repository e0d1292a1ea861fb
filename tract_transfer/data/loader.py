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
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tract_transfer.data.images import UndecodableImage
from tract_transfer.data.sampling import Sample, mix
from tract_transfer.data.streaming import Stream, StreamedSample


class Batch(NamedTuple):
    """What a loader yields.

    Attributes:
        images: uint8; (B, 3, H, W) for classification, a list of (3, H, W) for detection.
        targets: int64 (B,), or a list of dicts as `DetectionDataset.target` returns.
        skipped: file or row, and reason, of each image that cannot be decoded; if that is all of
            them, images and targets are empty lists.
    """

    images: Tensor | list[Tensor]
    targets: Tensor | list[dict[str, Any]]
    indices: list[int]
    skipped: list[str]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device; from pinned memory the copy does not block."""
        return Batch(*send_to_device(tuple(self), device, non_blocking=True))


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
        transform: called with the image, or with image and target if targets are dicts.
        seed: with the sample's epoch, index and copy it seeds torch's CPU generator during the
            transform. A plain index is of epoch 0.
        undecodable: `error` raises UndecodableImage; `skip` skips the image and lists it.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[..., Any],
        seed: int,
        undecodable: str = "error",
    ) -> None:
        self._dataset = dataset
        self._transform = transform
        self._seed = seed
        self._skip = undecodable == "skip"

    def __getitem__(self, key: Any) -> _Loaded:
        """Load an index, a Sample, or a StreamedSample."""
        sample, row = key if isinstance(key, StreamedSample) else (key, None)
        epoch, index, copy = sample if isinstance(sample, Sample) else Sample(0, sample)
        try:
            image = row.image() if row else self._dataset.image(index)
        except UndecodableImage as error:
            if not self._skip:
                raise
            return _Loaded(index, None, None, f"{error.item}: {error.reason}")
        target = row.label if row else self._dataset.target(index)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators too.
            parts = (epoch, index, copy) if copy else (epoch, index)
            torch.default_generator.manual_seed(mix(self._seed, *parts))
            if isinstance(target, dict):
                image, target = self._transform(image, target)
            else:
                image = self._transform(image)
        return _Loaded(index, image, target, "")


def load_batches(
    dataset: ImageDataset,
    transform: Callable[..., Any],
    batches: Iterable[Any],
    *,
    seed: int,
    num_workers: int,
    undecodable: str = "error",
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Return the loader of one process's batches; see SampledDataset.

    `batches` are indices or samples: of a TrainBatchSampler or of `eval_batches`, and of a stream
    of StreamBatches or StreamEvalBatches. They do not depend on the number of workers.
    """
    # Workers decode the rows that this process reads from a stream; they do not need it.
    source: Any = None if isinstance(dataset, Stream) else dataset
    _end_workers_at_exit()
    return _Loader(
        SampledDataset(source, transform, seed, undecodable),  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
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
