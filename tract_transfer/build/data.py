"""The bridge's data side: where a Config becomes splits."""

from collections.abc import Mapping
from typing import Any
from tract_transfer.config.schema import (Config, ProbeConfig)
from tract_transfer.data.streaming import Stream, stream_huggingface
import logging
from dataclasses import dataclass, field
from typing import Any, cast
from tract_transfer.config.schema import (Config, DetectionConfig, ProbeConfig)
from tract_transfer.config.data import (HeldOutSource, CocoSource, DigitScenesSource, DigitsSource, HuggingFaceBoxesSource, HuggingFaceSource, VocSource)
from tract_transfer.data.classification import (ClassificationDataset, hold_out, check_same_classes)
from tract_transfer.data.coco import load_coco
from tract_transfer.data.detection import DetectionDataset
from tract_transfer.data.digits import (load_digits, load_digit_scenes)
from tract_transfer.data.findings import Findings
from tract_transfer.data.huggingface import load_huggingface, load_huggingface_boxes
from tract_transfer.data.detection import ImageLabels
from tract_transfer.data.findings import size_checks
from tract_transfer.data.classification import (join_integer_classes, shown_classes)
from tract_transfer.data.voc import load_voc


# --- What a config asks of data that are read in order, and cannot have.

def check_streams(config: Config, splits: Mapping[str, Any]) -> None:
    """Refuse what needs any image of a stream at any time, and options of streams elsewhere.

    Raises:
        ConfigError: which key, and what to set.
    """
    sections: Any = config.data
    train_streams = isinstance(splits["train"], Stream)
    for key in ("shuffle_rows", "readers"):
        if not train_streams and getattr(sections, key, None) is not None:
            message = "has no use here: an image folder is shuffled whole. Leave it out."
            raise config.error(f"data.{key}", message)
    for name in (name for name, dataset in splits.items() if isinstance(dataset, Stream)):
        key = f"data.{name}.streaming"
        if isinstance(config, ProbeConfig):
            message = (
                "a probe asks for images by number. Set it to false; data.cache: none keeps none."
            )
            raise config.error(key, message)
        if sections.cache != "none":
            message = f"{sections.cache} keeps all images, and {key} none. Set data.cache: none."
            raise config.error("data.cache", message)
    if not train_streams:
        return
    if getattr(sections, "repeats", 1) > 1:
        message = "asks for images by number, and data.train is streamed. Set it to 1."
        raise config.error("data.repeats", message)
    if config.model.backbone.stem == "whitened":
        message = "whitened asks for 5000 images of all, and data.train is streamed. Set another."
        raise config.error("model.backbone.stem", message)


logger = logging.getLogger(__name__)

Loaded = ClassificationDataset | DetectionDataset | Stream
Dataset = Loaded | ImageLabels


@dataclass
class Data:
    """The splits of a run. `report` is the one whose numbers are reported.

    `mended_boxes` lists what `data.invalid_boxes: clip` has cut or left out.
    """

    train: Dataset
    val: Dataset | None
    test: Dataset | None
    mended_boxes: list[str] = field(default_factory=list)

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
        ConfigError: splits that load and cannot be learnt from.
    """
    sections = config.data
    findings, limit = Findings(getattr(sections, "invalid_boxes", "error")), sections.max_pixels
    train: Any = load_split(sections.train, "data.train", findings, limit)
    val_section = getattr(sections, "val", None)
    if isinstance(val_section, HeldOutSource):
        if isinstance(train, Stream):
            message = "carves a part of data.train, which is streamed. Give it a split of its own."
            raise config.error("data.val", message)
        train, val = hold_out(train, val_section.fraction, config.seed)
    else:
        val = cast(
            Any, load_split(val_section, "data.val", findings, limit) if val_section else None
        )
    test: Any = load_split(sections.test, "data.test", findings, limit) if sections.test else None
    if isinstance(config, DetectionConfig) and config.data.empty_images == "drop":
        train = train.with_objects()
    if isinstance(config, ProbeConfig) and config.data.has_many_labels:
        train, test = ImageLabels(train), ImageLabels(test)
    data = Data(train, val, test, findings.clipped_boxes)
    check_streams(config, data.splits)
    join_integer_classes(data.splits)
    check_disjoint(data.splits)
    if not isinstance(config, DetectionConfig):
        _check_classes(config, data.train)
    for warning in check_same_classes(cast(Any, data.splits)):
        logger.warning(warning)
    for name, check in size_checks(data.splits).items():
        if check.differs:
            logger.warning("data.%s: %s", name, check.text)
    if data.mended_boxes:
        first, count = data.mended_boxes[0], len(data.mended_boxes)
        logger.warning("%d invalid boxes are cut or left out, the first: %s", count, first)
    for name, dataset in data.splits.items():
        if isinstance(dataset, Stream):
            continue
        if sections.cache == "ram" or (sections.cache == "device" and dataset is not train):
            logger.info("Decoding the %d images of %s", len(dataset), name)
            dataset.cache_images()
    return data


def _check_classes(config: Config, train: Dataset) -> None:
    """Refuse to learn one class from images of one class: any number would be of nothing."""
    shown = shown_classes(train)
    if shown is not None and len(shown) < 2:
        raise config.error(
            "data.train",
            f"telling classes apart needs two, and its {len(train)} images show "
            f"{[train.class_names[k] for k in sorted(shown)]}. Give it images of another class "
            "too.",
        )


def check_disjoint(splits: Mapping[str, Dataset]) -> None:
    """Refuse two splits that are the same data: what is trained on cannot be the test."""
    seen: dict[str, str] = {}
    for name, dataset in splits.items():
        other = seen.setdefault(dataset.fingerprint(), name)
        if other != name:
            raise ValueError(
                f"data.{other} and data.{name} are the same {len(dataset)} images "
                f"({dataset.name}). Give each its own, such as split: train[:90%] and "
                "train[90%:], sets: [2007/train] and [2007/val], or, of classes, data.val: "
                "{source: train, fraction: 0.1}."
            )


def load_split(section: Any, key: str, findings: Findings, max_pixels: int) -> Loaded:
    """Load the data a section describes; `key` is its name in error messages."""
    logger.info("Reading %s", key)
    own = {**section.model_dump(exclude={"source", "streaming"}), "key": key}
    own["max_pixels"] = max_pixels
    if isinstance(section, HuggingFaceSource) and section.streaming:
        return stream_huggingface(**own)
    own.pop("num_classes", None)  # a stream's
    common = {"key": key, "findings": findings, "max_pixels": max_pixels}
    arguments = {**own, **common}
    if isinstance(section, HuggingFaceSource):
        return load_huggingface(**arguments)
    if isinstance(section, HuggingFaceBoxesSource):
        return load_huggingface_boxes(**arguments)
    if isinstance(section, CocoSource):
        return load_coco(**arguments)
    if isinstance(section, VocSource):
        return load_voc(**arguments)
    if isinstance(section, DigitsSource):
        return load_digits(section.split, section.classes, key=key)
    assert isinstance(section, DigitScenesSource)
    return load_digit_scenes(**arguments)
