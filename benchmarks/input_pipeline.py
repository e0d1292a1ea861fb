"""Compare input speed in images/s: `data.cache: device` and other DataLoaders.

Augmentation as for CIFAR (pad 4, crop, flip) or for fine-tuning (random resized crop, flip),
batches of 128 at 32 px, uint8. The alternatives are
- `cache: none`: our DataLoader, which decodes the stored PNGs in every epoch;
- `cache: ram`: our DataLoader on images decoded once;
- torchvision: its v2 transforms and torch's DataLoader on an array in memory that returns PIL
  images, as torchvision.datasets.CIFAR10 does.
They take turns. Prints the median, minimum and maximum of the paired ratios.

    python benchmarks/input_pipeline.py [--data data/samples/cifar10] [--threads 2]
        [--workers 0 2] [--turns 7] [--crops pad random_resized]
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from tract_transfer.data.classification import ClassificationDataset
from tract_transfer.data.device_cache import BatchAugment, DeviceCache, cached_batches
from tract_transfer.data.huggingface import load_huggingface
from tract_transfer.data.images import decode_image
from tract_transfer.data.loader import load_batches
from tract_transfer.data.sampling import EpochOrder, TrainBatchSampler
from tract_transfer.data.transforms import classification_train

BATCH_SIZE, SIZE_PX, SEED = 128, 32, 0
SCALE = (0.3, 1.0)
LOADERS = ("cache: none", "cache: ram", "torchvision")


class Noise:
    """10,000 random PNGs, used if no folder is given."""

    def __init__(self) -> None:
        generator, self._stored = np.random.default_rng(SEED), []
        for _ in range(10_000):
            stream, pixels = BytesIO(), generator.integers(0, 256, (SIZE_PX, SIZE_PX, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
            self._stored.append(stream.getvalue())

    def encoded(self, row: int) -> bytes:
        """Return a row's PNG."""
        return self._stored[row]

    def image(self, row: int) -> torch.Tensor:
        """Return a row's image."""
        return decode_image(self._stored[row], self.item(row))

    def item(self, row: int) -> str:
        """Return a row's name."""
        return f"row {row}"


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Like torchvision.datasets.CIFAR10: pixels (N, H, W, 3), returned as PIL images."""

    def __init__(self, dataset: ClassificationDataset, transform: v2.Transform) -> None:
        images = [dataset.image(index) for index in range(len(dataset))]
        self.data = torch.stack(images).permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = dataset.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def torchvision_transform(crop: str) -> v2.Transform:
    """Return the same augmentation in torchvision."""
    padded = v2.RandomCrop(SIZE_PX, padding=4)
    cropped = padded if crop == "pad" else v2.RandomResizedCrop(SIZE_PX, scale=SCALE)
    return v2.Compose([cropped, v2.RandomHorizontalFlip(), v2.PILToTensor()])


class Loaders:
    """Every DataLoader to compare, as an endless iterator of batches."""

    def __init__(self, data: str | None, device: str) -> None:
        self.stored = self._load(data)
        self.decoded = self._load(data)
        self.decoded.cache_images()
        self.device_cache = DeviceCache(self.decoded, SIZE_PX, torch.device(device))

    def _load(self, data: str | None) -> ClassificationDataset:
        if data:
            return load_huggingface(data, "train")
        labels, names = np.arange(10_000) % 10, [str(k) for k in range(10)]
        return ClassificationDataset("noise", names, labels, Noise())

    def start(self, name: str, crop: str, workers: int) -> Iterator[Any]:
        """Return the batches of a loader."""
        sampler = TrainBatchSampler(EpochOrder(len(self.decoded), BATCH_SIZE, SEED))
        options = (SIZE_PX, crop, 4, SCALE, 0.5, "bilinear")
        if name == "device":
            augment = BatchAugment(*options)
            return cached_batches(self.device_cache, sampler, seed=SEED, augment=augment)
        if name == "torchvision":
            pictures = Pictures(self.decoded, torchvision_transform(crop))
            loader = DataLoader(
                pictures,
                BATCH_SIZE,
                shuffle=True,
                num_workers=workers,
                drop_last=True,
                persistent_workers=workers > 0,
            )
            return itertools.chain.from_iterable(itertools.repeat(loader))
        dataset = self.stored if name == "cache: none" else self.decoded
        transform = classification_train(*options)
        return iter(load_batches(dataset, transform, sampler, seed=SEED, num_workers=workers))


def images_per_second(batches: Iterator[Any], count: int) -> float:
    """Time `count` batches, after a first one that starts the workers."""
    next(batches)
    _wait_for_device()
    started = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    _wait_for_device()
    return count * BATCH_SIZE / (time.perf_counter() - started)


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def main() -> None:
    """Print a Markdown table with a row for each other loader and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with CIFAR as parquet; default: random images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--crops", nargs="+", default=["pad", "random_resized"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batches", type=int, default=60, help="timed batches per turn")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaders = Loaders(arguments.data, arguments.device)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    head = "| crop | DataLoader | workers | images/s | cache: device, images/s | ratio |"
    print(f"{head}\n| --- | --- | --- | --- | --- | --- |")
    for crop in arguments.crops:
        others = list(itertools.product(LOADERS, arguments.workers))
        rates: dict[Any, list[float]] = {other: [] for other in [*others, ("device", 0)]}
        for turn in range(arguments.turns):
            for name, workers in sorted(rates, reverse=turn % 2 == 1):
                count = arguments.batches * (10 if name == "device" else 1)
                batches = loaders.start(name, crop, workers)
                rates[name, workers].append(images_per_second(batches, count))
                del batches  # stops its workers
        ours = rates["device", 0]
        for name, workers in others:
            theirs = rates[name, workers]
            ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
            print(
                f"| {crop} | {name} | {workers} | {statistics.median(theirs):,.0f} "
                f"| {statistics.median(ours):,.0f} | {statistics.median(ratios):.1f} "
                f"({min(ratios):.1f} to {max(ratios):.1f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
