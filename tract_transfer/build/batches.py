"""The bridge from splits to batches: transforms, their order, mixing, loaders."""

from collections.abc import Callable, Iterator
from typing import Any, cast
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tract_transfer.build.data import Dataset
from tract_transfer.build.weights import call_checked
from tract_transfer.config.schema import (Config, ProbeConfig, TrainedConfig)
from tract_transfer.config.data import (ClassificationData, ClassificationTransformsConfig, DetectionTransformsConfig)
from tract_transfer.data import (sampling, transforms)
from tract_transfer.data.augment import AUGMENTATIONS
from tract_transfer.data.device_cache import BatchAugment
from tract_transfer.data.detection import DetectionDataset
from tract_transfer.data.loader import (Batch, SampledDataset, eval_loader, stream_loader, train_loader)
from tract_transfer.data.augment import BatchMix
from tract_transfer.data.device_cache import (DeviceCache, cached_batches)
from tract_transfer.data.streaming import Stream
from tract_transfer.data.streaming import (StreamBatches, StreamEvalBatches)
from tract_transfer.data.streaming import StreamOrder


CPU = torch.device("cpu")


def build_transforms(config: Config) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the transforms of training and of evaluation images.

    Raises:
        ConfigError: the augmentation does not take its arguments.
    """
    section = config.data.transforms
    if isinstance(section, DetectionTransformsConfig):
        return transforms.detection_train(**section.model_dump()), transforms.detection_eval()
    evaluation = transforms.classification_eval(
        section.size_px, section.crop_ratio, section.interpolation, section.resize
    )
    if isinstance(config, ProbeConfig):
        return evaluation, evaluation
    train = config.data.transforms
    assert not isinstance(train, DetectionTransformsConfig)
    augment = None
    if train.augment is not None:
        try:
            entry = AUGMENTATIONS.get(train.augment)
        except KeyError as error:
            raise config.error("data.transforms.augment", str(error.args[0])) from None
        key = "data.transforms.augment_args"
        augment = call_checked(entry, train.augment, train.augment_args, key, config)
    training = transforms.classification_train(
        **_crop_arguments(train),
        rotation_deg=train.rotation_deg,
        augment=augment,
        color_jitter=train.color_jitter,
    )
    return training, evaluation


def _crop_arguments(section: ClassificationTransformsConfig) -> dict[str, Any]:
    """Return what is done image by image and in batches alike, with the defaults of the crops."""
    keys = ("size_px", "crop", "flip_prob", "interpolation", "erase_prob")
    return {
        **{key: getattr(section, key) for key in keys},
        "pad_px": 4 if section.pad_px is None else section.pad_px,
        "scale": tuple(section.scale or (0.08, 1.0)),
    }


def build_epoch_order(config: TrainedConfig, train: Dataset) -> sampling.EpochOrder | StreamOrder:
    """Return the batches of every epoch; `iters_per_epoch` is their number.

    Raises:
        ValueError: the batch does not fit the data.
    """
    section, groups, factors = cast(Any, config).data, None, None
    if isinstance(train, Stream):
        return StreamOrder(
            train.groups.counts,
            section.batch_size,
            config.seed,
            shuffle_rows=section.shuffle_rows,
            readers=section.readers,
        )
    repeats = getattr(section, "repeats", 1)
    if isinstance(train, DetectionDataset):
        objects, threshold = train.objects, section.repeat_threshold
        if section.group_by_aspect:
            groups = sampling.aspect_groups(train.sizes)
        if threshold is not None:
            num_classes = len(train.class_names)
            factors = sampling.repeat_factors(objects.first, objects.labels, num_classes, threshold)
    return sampling.EpochOrder(
        len(train),
        section.batch_size,
        config.seed,
        groups=groups,
        factors=factors,
        repeats=repeats,
    )


def build_mix(config: TrainedConfig, num_classes: int, num_parts: int) -> BatchMix | None:
    """Return what mixes the images of a batch, which is cut into `num_parts`; None mixes nothing.

    Raises:
        ConfigError: the parts are single images.
    """
    section = cast(Any, config).data
    if getattr(section, "mixup", None) is None:
        return None
    if section.batch_size // num_parts < 2:
        raise config.error(
            "data.mixup",
            f"mixes the images of a micro-batch of a process, and {section.batch_size} images in "
            f"{num_parts} parts are single ones. Set a larger data.batch_size.",
        )
    return BatchMix(num_classes, config.seed, **section.mixup.model_dump())


def whitening_images(config: TrainedConfig, train: Dataset) -> Iterator[Tensor]:
    """Yield batches of training images, transformed as in the evaluation: 5000 by the seed.

    As many as airbench takes. Those that cannot be decoded are left out where they may be.
    """
    _, transform = build_transforms(cast(Config, config))
    generator = torch.Generator().manual_seed(config.seed)
    indices = torch.randperm(len(train), generator=generator)[:5000]
    images = SampledDataset(train, transform, 0, cast(Any, config).data.undecodable)
    for part in indices.split(100):
        found = [images[index].image for index in part.tolist()]
        decoded = [image for image in found if image is not None]
        if decoded:
            yield torch.stack(decoded)


def build_train_batches(
    config: TrainedConfig,
    train: Dataset,
    *,
    rank: int,
    world_size: int,
    pin_memory: bool,
    device: torch.device = CPU,
) -> Callable[[int], Iterator[Batch]]:
    """Return what yields a process's micro-batches from a given iteration on.

    Args:
        device: where `data.cache: device` keeps the images; the loader's own are on the CPU.

    Raises:
        ValueError: the batch does not fit the data or divide among processes and micro-batches.
    """
    section = cast(Any, config).data
    transform, _ = build_transforms(cast(Config, config))
    order = build_epoch_order(config, train)
    place = (rank, world_size, config.engine.accumulate)
    workers = {
        "num_workers": section.num_workers,
        "undecodable": section.undecodable,
        "pin_memory": pin_memory,
    }
    if isinstance(order, StreamOrder):
        assert isinstance(train, Stream)
        return _build_streamed_batches(train, transform, order, place, config.seed, workers)

    def sampler(start_iter: int) -> sampling.TrainBatchSampler:
        return sampling.TrainBatchSampler(order, start_iter, *place)

    sampler(0)  # raises before training does
    if section.cache == "device":
        return _build_cached_batches(section, train, sampler, config.seed, device)

    def batches(start_iter: int) -> Iterator[Batch]:
        return iter(
            train_loader(
                train,
                transform,
                sampler(start_iter),
                seed=config.seed,
                **workers,
            )
        )

    return batches


def _build_streamed_batches(
    train: Stream,
    transform: Callable[..., Any],
    order: StreamOrder,
    place: tuple[int, int, int],
    seed: int,
    workers: dict[str, Any],
) -> Callable[[int], Iterator[Batch]]:
    def sampler(start_iter: int) -> StreamBatches:
        return StreamBatches(train, order, start_iter, *place)

    sampler(0)  # raises before training does

    def batches(start_iter: int) -> Iterator[Batch]:
        sequence = sampler(start_iter)
        return iter(
            stream_loader(
                train.title,
                transform,
                sequence,
                seed=seed,
                max_pixels=train.max_pixels,
                **workers,
            )
        )

    return batches


def _build_cached_batches(
    section: ClassificationData,
    train: Dataset,
    sampler: Callable[[int], sampling.TrainBatchSampler],
    seed: int,
    device: torch.device,
) -> Callable[[int], Iterator[Batch]]:
    chosen = section.transforms
    augment = BatchAugment(**_crop_arguments(chosen))
    images = DeviceCache(
        train,
        None if augment.takes_native_size else chosen.size_px,
        device,
        interpolation=chosen.interpolation,
        undecodable=section.undecodable,
    )

    def batches(start_iter: int) -> Iterator[Batch]:
        return cached_batches(images, sampler(start_iter), seed=seed, augment=augment)

    return batches


def build_eval_loader(
    config: Config, dataset: Dataset, *, rank: int, world_size: int, pin_memory: bool
) -> DataLoader[Batch]:
    """Return one pass over a process's share of `dataset`, each image once."""
    _, transform = build_transforms(config)
    section = config.data
    batch_size = max(1, section.batch_size // world_size)
    workers: dict[str, Any] = {
        "num_workers": section.num_workers,
        "undecodable": section.undecodable,
        "pin_memory": pin_memory,
    }
    if isinstance(dataset, Stream):
        batches = StreamEvalBatches(dataset, batch_size, rank, world_size)
        return stream_loader(
            dataset.title, transform, batches, seed=0, max_pixels=dataset.max_pixels, **workers
        )
    return eval_loader(
        dataset, transform, batch_size=batch_size, rank=rank, world_size=world_size, **workers
    )
