"""From splits to batches: transforms, epoch order, mixing and loaders."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tract_transfer.build.data import Dataset
from tract_transfer.build.weights import call_entry
from tract_transfer.config.data import (
    ClassificationData,
    ClassificationTransformsConfig,
    DetectionTransformsConfig,
)
from tract_transfer.config.schema import Config, TrainedTask
from tract_transfer.config.sections import ComponentConfig
from tract_transfer.data import sampling, transforms
from tract_transfer.data.augment import AUGMENTATIONS, BatchMix
from tract_transfer.data.detection import DetectionDataset
from tract_transfer.data.device_cache import BatchAugment, DeviceCache, cached_batches
from tract_transfer.data.loader import Batch, SampledDataset, load_batches
from tract_transfer.data.streaming import Stream, StreamBatches, StreamEvalBatches, StreamOrder

CPU = torch.device("cpu")
NUM_WHITENING_IMAGES = 5000  # as airbench


def build_transforms(config: Config) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the transforms of training and of evaluation images."""
    section = config.data.transforms
    if isinstance(section, DetectionTransformsConfig):
        return transforms.detection_train(**section.model_dump()), transforms.detection_eval
    evaluation = transforms.classification_eval(
        section.size_px, section.crop_ratio, section.interpolation, section.resize
    )
    if not isinstance(section, ClassificationTransformsConfig):  # a probe's
        return evaluation, evaluation
    augment = None
    if section.augment is not None:
        entry = ComponentConfig(name=section.augment, args=section.augment_args)
        key, subkeys = "data.transforms.augment", ("", "_args")
        augment = call_entry(config, AUGMENTATIONS, key, entry, subkeys=subkeys)
    training = transforms.classification_train(
        **_crop_arguments(section),
        rotation_deg=section.rotation_deg,
        augment=augment,
        color_jitter=section.color_jitter,
    )
    return training, evaluation


def _crop_arguments(section: ClassificationTransformsConfig) -> dict[str, Any]:
    """Return the arguments of crops, of single images and of batches, with their defaults."""
    keys = {"size_px", "crop", "flip_prob", "interpolation", "erase_prob"}
    return {
        **section.model_dump(include=keys),
        "pad_px": 4 if section.pad_px is None else section.pad_px,
        "scale": tuple(section.scale or (0.08, 1.0)),
    }


def build_epoch_order(config: TrainedTask, train: Dataset) -> sampling.EpochOrder | StreamOrder:
    """Return the batches of every epoch; `iters_per_epoch` is their number."""
    section: Any = config.data
    if isinstance(train, Stream):
        options = section.model_dump(include={"shuffle_rows", "readers"})
        return StreamOrder(train.groups.counts, section.batch_size, config.seed, **options)
    groups = factors = None
    if isinstance(train, DetectionDataset):
        objects, threshold = train.objects, section.repeat_threshold
        if section.group_by_aspect:
            groups = sampling.aspect_groups(train.sizes)
        if threshold is not None:
            num_classes = len(train.class_names)
            factors = sampling.repeat_factors(objects.first, objects.labels, num_classes, threshold)
    options = {"groups": groups, "factors": factors, "repeats": getattr(section, "repeats", 1)}
    return sampling.EpochOrder(len(train), section.batch_size, config.seed, **options)


def build_mix(config: TrainedTask, num_classes: int, num_parts: int) -> BatchMix | None:
    """Return what mixes the images of a batch that is split into `num_parts`, or None."""
    section = config.data
    if not isinstance(section, ClassificationData) or section.mixup is None:
        return None
    if section.batch_size // num_parts < 2:
        raise config.error(
            "data.mixup",
            f"mixes the images of a micro-batch of a process, and {section.batch_size} images in "
            f"{num_parts} parts are single ones. Set a larger data.batch_size.",
        )
    return BatchMix(num_classes, config.seed, **section.mixup.model_dump())


def whitening_images(config: TrainedTask, train: Dataset) -> Iterator[Tensor]:
    """Yield batches of random training images by the seed, with the evaluation transforms."""
    _, transform = build_transforms(config)
    generator = torch.Generator().manual_seed(config.seed)
    indices = torch.randperm(len(train), generator=generator)[:NUM_WHITENING_IMAGES]
    dataset = SampledDataset(train, transform, 0, config.data.undecodable)
    for part in indices.split(100):
        images = [dataset[index].image for index in part.tolist()]
        decoded = [image for image in images if image is not None]
        if decoded:
            yield torch.stack(decoded)


def build_train_batches(
    config: TrainedTask,
    train: Dataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = CPU,
) -> Callable[[int], Iterator[Batch]]:
    """Return a function from a first iteration to this process's micro-batches from there on.

    Images are decoded in data workers, read in order from a stream, or kept on the device.

    Args:
        device: where `data.cache: device` keeps the images; batches of loaders are on the CPU.
    """
    section, seed = config.data, config.seed
    order = build_epoch_order(config, train)
    process = (rank, world_size, config.engine.accumulate)

    def sampler(start_iter: int) -> Any:
        if isinstance(order, StreamOrder):
            return StreamBatches(cast(Stream, train), order, start_iter, *process)
        return sampling.TrainBatchSampler(order, start_iter, *process)

    sampler(0)  # raises now rather than at the first step
    if isinstance(section, ClassificationData) and section.cache == "device":
        augment = BatchAugment(**_crop_arguments(section.transforms))
        size_px = None if augment.takes_native_size else section.transforms.size_px
        options = section.transforms.model_dump(include={"interpolation"})
        images = DeviceCache(train, size_px, device, undecodable=section.undecodable, **options)
        return lambda start: cached_batches(images, sampler(start), seed=seed, augment=augment)
    transform, _ = build_transforms(config)
    workers = _workers(config)
    return lambda start_iter: iter(
        load_batches(train, transform, sampler(start_iter), seed=seed, **workers)
    )


def build_eval_loader(
    config: Config, dataset: Dataset, *, rank: int = 0, world_size: int = 1
) -> DataLoader[Batch]:
    """Return one pass over a process's share of `dataset`, each image once."""
    _, transform = build_transforms(config)
    batch_size, workers = max(1, config.data.batch_size // world_size), _workers(config)
    batches: Any = sampling.eval_batches(len(dataset), batch_size, rank, world_size)
    if isinstance(dataset, Stream):
        batches = StreamEvalBatches(dataset, batch_size, rank, world_size)
    return load_batches(dataset, transform, batches, seed=0, **workers)


def _workers(config: Config) -> dict[str, Any]:
    return {
        "num_workers": config.data.num_workers,
        "undecodable": config.data.undecodable,
        "pin_memory": config.engine.device != "cpu" and torch.cuda.is_available(),
    }
