"""Images a second that reach a training step: data.cache device against the DataLoader path.

CIFAR's recipe (pad 4, crop, flip), or fine-tuning's (random resized crop, flip), batches of 128 at
32 px, data in memory. Both take turns; the median of the paired ratios is printed.

    python benchmarks/input_pipeline.py [--data ../shared/data/cifar10] [--workers 0 2] [--turns 7]
        [--crops pad random_resized]
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

from tract_transfer.data.batch_augment import BatchAugment
from tract_transfer.data.classification import ClassificationDataset, load_huggingface
from tract_transfer.data.loader import Batch, train_loader
from tract_transfer.data.resident import ResidentImages, resident_batches
from tract_transfer.data.sampling import EpochOrder, TrainBatchSampler
from tract_transfer.data.transforms import classification_train

BATCH_SIZE, SIZE_PX, SEED = 128, 32, 0


class Noise:
    """10,000 random images, where no folder is given."""

    def encoded(self, row: int) -> bytes:
        """Return what tells a row from others."""
        return str(row).encode()

    def image(self, row: int) -> torch.Tensor:
        """Return a row's image."""
        generator = torch.Generator().manual_seed(row)
        shape = (3, SIZE_PX, SIZE_PX)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def item(self, row: int) -> str:
        """Return a row's name."""
        return f"row {row}"


def images_per_second(batches: Iterator[Batch], count: int) -> float:
    """Take `count` batches after a first one, which starts the workers."""
    next(batches)
    started = time.perf_counter()
    images = sum(len(batch.indices) for batch in itertools.islice(batches, count))
    return images / (time.perf_counter() - started)


def main() -> None:
    """Print a row of a Markdown table for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder of CIFAR's parquet; else random images")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--crops", nargs="+", default=["pad", "random_resized"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batches", type=int, default=60, help="timed batches a turn")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.data:
        dataset = load_huggingface(arguments.data, "train")
    else:
        labels = np.arange(10_000) % 10
        dataset = ClassificationDataset("noise", [str(k) for k in range(10)], labels, Noise())
    dataset.cache_images()
    resident = ResidentImages(dataset, SIZE_PX, torch.device(arguments.device))

    def sampler() -> TrainBatchSampler:
        return TrainBatchSampler(EpochOrder(len(dataset), BATCH_SIZE, SEED))

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    head = "| crop | workers | DataLoader, images/s | device, images/s | ratio |"
    print(f"{head}\n| --- | --- | --- | --- | --- |")
    for crop, workers in itertools.product(arguments.crops, arguments.workers):
        law = (SIZE_PX, crop, 4, (0.3, 1.0), 0.5, "bilinear")
        transform, augment = classification_train(*law), BatchAugment(*law)
        rates: dict[str, list[float]] = {"loader": [], "device": []}
        for turn in range(arguments.turns):
            loader = train_loader(dataset, transform, sampler(), seed=SEED, num_workers=workers)
            ways = {
                "loader": iter(loader),
                "device": resident_batches(resident, sampler(), seed=SEED, augment=augment),
            }
            for name in sorted(ways, reverse=turn % 2 == 1):
                count = arguments.batches * (1 if name == "loader" else 10)
                rates[name].append(images_per_second(ways[name], count))
            del ways, loader
        ratios = [b / a for a, b in zip(rates["loader"], rates["device"], strict=True)]
        print(
            f"| {crop} | {workers} | {statistics.median(rates['loader']):,.0f} "
            f"| {statistics.median(rates['device']):,.0f} | {statistics.median(ratios):.1f} "
            f"({min(ratios):.1f} to {max(ratios):.1f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
