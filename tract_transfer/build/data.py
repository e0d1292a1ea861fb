"""From a config to the splits of its data."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from tract_transfer.build.weights import call_entry, errors_at, use_plugins
from tract_transfer.config import data as sources
from tract_transfer.config.schema import Config, DetectionConfig, ProbeConfig
from tract_transfer.config.sections import ComponentConfig, Section
from tract_transfer.data import classification
from tract_transfer.data.classification import ClassificationDataset
from tract_transfer.data.coco import load_coco
from tract_transfer.data.detection import DetectionDataset, ImageLabels
from tract_transfer.data.digits import load_digit_scenes, load_digits
from tract_transfer.data.findings import Findings, size_checks
from tract_transfer.data.huggingface import load_huggingface, load_huggingface_boxes
from tract_transfer.data.sources import SOURCES, reading
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
    findings = Findings(getattr(sections, "invalid_boxes", "error"))

    def load(name: str) -> Any:
        return load_split(config, name, findings) if getattr(sections, name) else None

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


def load_split(config: Config, name: str, findings: Findings) -> Loaded:
    """Load the data of the section `data.<name>`."""
    key, section, max_pixels = f"data.{name}", getattr(config.data, name), config.data.max_pixels
    use_plugins(config)
    logger.info("Reading %s", key)
    if isinstance(section, sources.PluginSource):
        with reading(key, findings, max_pixels):
            return _load_from_plugin(config, key, section)
    arguments: dict[str, Any] = {**section.model_dump(exclude={"source"}), "key": key}
    if isinstance(section, sources.DigitsSource):
        return load_digits(**arguments)
    arguments["max_pixels"] = max_pixels
    if isinstance(section, sources.HuggingFaceSource):
        del arguments["streaming"]
        if section.streaming:
            return stream_huggingface(**arguments)
        del arguments["num_classes"]  # of a stream
    return _LOADERS[type(section)](**arguments, findings=findings)


# Their arguments are the fields of the section.
_LOADERS: dict[type[Section], Callable[..., Loaded]] = {
    sources.HuggingFaceSource: load_huggingface,
    sources.VocSource: load_voc,
    sources.CocoSource: load_coco,
    sources.HuggingFaceBoxesSource: load_huggingface_boxes,
    sources.DigitScenesSource: load_digit_scenes,
}


def source_entry(section: sources.PluginSource) -> ComponentConfig:
    """Return a plug-in's source as `call_entry` takes it, with the subkeys SOURCE_KEYS."""
    return ComponentConfig(name=section.source, args=section.args)


SOURCE_KEYS = (".source", ".args")


def _load_from_plugin(config: Config, key: str, section: sources.PluginSource) -> Loaded:
    """Call a plug-in's source, and refuse what it returns unless it is the task's data."""
    with errors_at(config, key):
        dataset = call_entry(config, SOURCES, key, source_entry(section), subkeys=SOURCE_KEYS)
    is_detection = isinstance(config, DetectionConfig)
    kind, make = ClassificationDataset, "image_dataset"
    if is_detection:
        kind, make = DetectionDataset, "box_dataset"  # type: ignore[assignment]
    if not isinstance(dataset, kind):
        raise config.error(
            key,
            f"{section.source} returns {type(dataset).__name__}, and a {config.task} needs a "
            f"{kind.__name__}: return tract_transfer.data.sources.{make}(...).",
        )
    return dataset
