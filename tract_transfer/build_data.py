"""The bridge's data side: where a Config becomes splits, transforms and loaders."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch.utils.data import DataLoader

from tract_transfer.config import Config, ProbeConfig, TrainedConfig
from tract_transfer.config_sections import (
    CarvedSource,
    DetectionTransformsConfig,
    DigitScenesSource,
    DigitsSource,
    HuggingFaceSource,
    VocSource,
)
from tract_transfer.data import transforms
from tract_transfer.data.classification import (
    ClassificationDataset,
    carve,
    check_same_classes,
    load_huggingface,
)
from tract_transfer.data.detection import DetectionDataset, load_voc
from tract_transfer.data.digits import DIGIT_NAMES, load_digits, write_digit_scenes
from tract_transfer.data.loader import Batch, TrainBatchSampler, eval_loader, train_loader

logger = logging.getLogger(__name__)
Dataset = ClassificationDataset | DetectionDataset


@dataclass
class Data:
    """The splits of a run. `report` is the one whose numbers are reported."""

    train: Dataset
    val: Dataset | None
    test: Dataset | None

    @property
    def splits(self) -> dict[str, Dataset]:
        """The splits there are, by name."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: dataset for name, dataset in named.items() if dataset is not None}

    @property
    def report(self) -> tuple[str, Dataset]:
        """Name and data of the reported split: test, or val where there is no test."""
        name = "test" if self.test is not None else "val"
        return name, self.splits[name]

    @property
    def class_names(self) -> list[str]:
        """The K class names, equal in every split."""
        return list(self.train.class_names)


def build_data(config: Config) -> Data:
    """Load every split, and check that their classes agree.

    Raises:
        ValueError, FileNotFoundError: a split does not load; the message names file and key.
    """
    sections = config.data
    train: Any = _load(sections.train, "data.train")
    val_section = getattr(sections, "val", None)
    if isinstance(val_section, CarvedSource):
        train, val = carve(train, val_section.fraction, config.seed)
    else:
        val = cast(Any, _load(val_section, "data.val") if val_section else None)
    test = _load(sections.test, "data.test") if sections.test else None
    data = Data(train, val, test)
    _check_disjoint(data.splits)
    for warning in check_same_classes(cast(Any, data.splits)):
        logger.warning(warning)
    if sections.cache == "ram":
        for dataset in data.splits.values():
            dataset.cache_images()
    return data


def _check_disjoint(splits: Mapping[str, Dataset]) -> None:
    """Refuse two splits that are the same data: what is trained on cannot be the test."""
    seen: dict[str, str] = {}
    for name, dataset in splits.items():
        other = seen.setdefault(dataset.fingerprint(), name)
        if other != name:
            raise ValueError(
                f"data.{other} and data.{name} are the same {len(dataset)} images "
                f"({dataset.name}). Give each its own, such as split: train[:90%] and "
                "train[90%:], or data.val: {source: train, fraction: 0.1}."
            )


def _load(section: Any, key: str) -> Dataset:
    """Load the data a section describes; `key` is its name in error messages."""
    if isinstance(section, HuggingFaceSource):
        return load_huggingface(**section.model_dump(exclude={"source"}), key=key)
    if isinstance(section, DigitsSource):
        try:
            return load_digits(section.split, section.classes)
        except ValueError as error:
            raise ValueError(f"{key}.{error}") from error
    if isinstance(section, VocSource):
        return load_voc(**section.model_dump(exclude={"source"}), key=key)
    assert isinstance(section, DigitScenesSource)
    made = section.model_dump(include={"num_train", "num_test", "size_px"})
    own = "_".join(["digit_scenes", *map(str, made.values())])
    root = Path(section.root or f"output/data/{own}")
    write_digit_scenes(root, **made)
    return load_voc(root, [f"2007/{section.split}"], classes=DIGIT_NAMES, key=key)


def build_transforms(config: Config) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the transforms of training and of evaluation images."""
    section = config.data.transforms
    if isinstance(section, DetectionTransformsConfig):
        return transforms.detection_train(**section.model_dump()), transforms.detection_eval()
    evaluation = transforms.classification_eval(
        section.size_px, section.crop_ratio, section.interpolation
    )
    if isinstance(config, ProbeConfig):
        return evaluation, evaluation
    train = config.data.transforms
    assert not isinstance(train, DetectionTransformsConfig)
    low, high = train.scale or (0.08, 1.0)
    return (
        transforms.classification_train(
            train.size_px,
            train.crop,
            4 if train.pad_px is None else train.pad_px,
            (low, high),
            train.flip_prob,
            train.interpolation,
        ),
        evaluation,
    )


def build_train_batches(
    config: TrainedConfig, train: Dataset, *, rank: int, world_size: int, pin_memory: bool
) -> Callable[[int], Iterator[Batch]]:
    """Return what yields a process's micro-batches from a given iteration on.

    Raises:
        ValueError: the batch does not fit the data or divide among processes and micro-batches.
    """
    section = cast(Any, config).data
    transform, _ = build_transforms(cast(Config, config))
    accumulate = config.engine.accumulate
    sampling = (len(train), section.batch_size, config.seed)
    TrainBatchSampler(*sampling, 0, rank, world_size, accumulate)  # raises before training does

    def batches(start_iter: int) -> Iterator[Batch]:
        return iter(
            train_loader(
                train,
                transform,
                batch_size=section.batch_size,
                seed=config.seed,
                num_workers=section.num_workers,
                start_iter=start_iter,
                rank=rank,
                world_size=world_size,
                accumulate=accumulate,
                undecodable=section.undecodable,
                pin_memory=pin_memory,
            )
        )

    return batches


def build_eval_loader(
    config: Config, dataset: Dataset, *, rank: int, world_size: int, pin_memory: bool
) -> DataLoader[Batch]:
    """Return one pass over a process's share of `dataset`, each image once."""
    _, transform = build_transforms(config)
    section = config.data
    return eval_loader(
        dataset,
        transform,
        batch_size=max(1, section.batch_size // world_size),
        num_workers=section.num_workers,
        rank=rank,
        world_size=world_size,
        undecodable=section.undecodable,
        pin_memory=pin_memory,
    )
