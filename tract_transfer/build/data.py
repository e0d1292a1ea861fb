"""From a config to the splits of its data."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from tract_transfer.build.weights import errors_at
from tract_transfer.config import data as sources
from tract_transfer.config.schema import Config, DetectionConfig, ProbeConfig
from tract_transfer.config.sections import Section
from tract_transfer.data import classification
from tract_transfer.data.classification import ClassificationDataset
from tract_transfer.data.coco import load_coco
from tract_transfer.data.detection import DetectionDataset, ImageLabels
from tract_transfer.data.digits import load_digit_scenes, load_digits
from tract_transfer.data.findings import Findings, size_checks
from tract_transfer.data.huggingface import load_huggingface, load_huggingface_boxes
from tract_transfer.data.streaming import Stream, stream_huggingface
from tract_transfer.data.voc import load_voc
from tract_transfer.evaluation import check_metric

Loaded = ClassificationDataset | DetectionDataset | Stream
Dataset = Loaded | ImageLabels
logger = logging.getLogger(__name__)


@dataclass
class Data:
    """The splits of a run.

    `clipped_boxes` lists what `data.invalid_boxes: clip` clipped or dropped.
    """

    train: Dataset
    val: Dataset | None
    test: Dataset | None
    clipped_boxes: list[str] = field(default_factory=list)

    @property
    def splits(self) -> dict[str, Dataset]:
        """The splits that exist, by name."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: dataset for name, dataset in named.items() if dataset is not None}

    @property
    def report(self) -> tuple[str, Dataset]:
        """Name and data of the reported split: test, or val if there is no test."""
        name = "test" if self.test is not None else "val"
        return name, self.splits[name]

    @property
    def class_names(self) -> list[str]:
        """The K class names, the same in every split."""
        return list(self.train.class_names)

    def fingerprints(self) -> dict[str, str]:
        """Return split -> hash of its images and annotations."""
        return {name: dataset.fingerprint() for name, dataset in self.splits.items()}


def build_data(config: Config) -> Data:
    """Load every split and check that they fit the task and one another.

    Raises:
        ValueError, FileNotFoundError: a split does not load; the message names file and key.
        ConfigError: the splits load, but the task cannot use them.
    """
    sections = config.data
    findings, limit = Findings(getattr(sections, "invalid_boxes", "error")), sections.max_pixels

    def load(name: str) -> Any:
        section = getattr(sections, name)
        return load_split(section, f"data.{name}", findings, limit) if section else None

    train, held_out = load("train"), dict[str, Any]()
    for name in ("test", "val"):
        section = getattr(sections, name)
        if isinstance(section, sources.HeldOutSource):
            seed = config.seed if section.seed is None else section.seed
            train, held_out[name] = classification.hold_out(train, section.fraction, seed)
    val, test = (held_out[name] if name in held_out else load(name) for name in ("val", "test"))
    if isinstance(config, DetectionConfig) and config.data.empty_images == "drop":
        train = train.with_objects()
    if isinstance(config, ProbeConfig) and config.data.has_many_labels:
        train, test = ImageLabels(train), ImageLabels(test)
    data = Data(train, val, test, findings.clipped_boxes)
    for warning in compare_splits(data.splits):
        logger.warning(warning)
    _check_classes(config, data)
    if boxes := findings.clipped_boxes:
        message = "%d invalid boxes were clipped or dropped, the first: %s"
        logger.warning(message, len(boxes), boxes[0])
    for name, dataset in data.splits.items():
        keeps = sections.cache == "ram" or (sections.cache == "device" and name != "train")
        if keeps and not isinstance(dataset, Stream):
            logger.info("Decoding the %d images of %s", len(dataset), name)
            dataset.cache_images()
    return data


def compare_splits(splits: Mapping[str, Dataset]) -> list[str]:
    """Refuse splits of different classes or of the same data; return warnings."""
    classification.join_integer_classes(splits)
    check_disjoint(splits)
    sizes = size_checks(splits).items()
    return [
        *classification.check_same_classes(cast(Any, splits)),
        *(f"data.{name}: {check.text}" for name, check in sizes if check.differs),
    ]


def check_disjoint(splits: Mapping[str, Dataset]) -> None:
    """Refuse two splits that are the same data: test data must not be trained on."""
    seen: dict[str, str] = {}
    for name, dataset in splits.items():
        other = seen.setdefault(dataset.fingerprint(), name)
        if other != name:
            raise ValueError(
                f"data.{other} and data.{name} are the same {len(dataset)} images "
                f"({dataset.name}). Use disjoint splits, such as split: train[:90%] and "
                "train[90%:], sets: [2007/train] and [2007/val], or, for classification, data.val: "
                "{source: train, fraction: 0.1}."
            )


def _check_classes(config: Config, data: Data) -> None:
    """Refuse a single class to train on, and a top-5 metric of five classes or fewer."""
    if isinstance(config, DetectionConfig):
        return
    shown, count = classification.shown_classes(data.train), len(data.class_names)
    if shown is not None and len(shown) < 2:
        raise config.error(
            "data.train",
            f"its {len(data.train)} images show only the class "
            f"{[data.class_names[k] for k in sorted(shown)]}. Classification needs two classes or "
            "more.",
        )
    with errors_at(config, "evaluation.metric"):
        check_metric(config.evaluation.metric, count)


def load_split(section: Section, key: str, findings: Findings, max_pixels: int) -> Loaded:
    """Load the data that a source section describes; `key` names it in error messages."""
    logger.info("Reading %s", key)
    arguments: dict[str, Any] = {**section.model_dump(exclude={"source"}), "key": key}
    if isinstance(section, sources.DigitsSource):
        return load_digits(**arguments)
    arguments["max_pixels"] = max_pixels
    if isinstance(section, sources.HuggingFaceSource):
        del arguments["streaming"]
        if section.streaming:
            return stream_huggingface(**arguments)
        del arguments["num_classes"]  # of a stream
    return SOURCES[type(section)](**arguments, findings=findings)


# Their arguments are the fields of the section.
SOURCES: dict[type[Section], Callable[..., Loaded]] = {
    sources.HuggingFaceSource: load_huggingface,
    sources.VocSource: load_voc,
    sources.CocoSource: load_coco,
    sources.HuggingFaceBoxesSource: load_huggingface_boxes,
    sources.DigitScenesSource: load_digit_scenes,
}
