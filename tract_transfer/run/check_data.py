"""Checking all data of a config: everything that is broken, instead of the first error."""

# N images, K classes, M objects

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tract_transfer.build.data import Loaded, compare_splits, load_split
from tract_transfer.config.data import HeldOutSource
from tract_transfer.config.schema import Config
from tract_transfer.data.detection import DetectionDataset
from tract_transfer.data.findings import Findings, Size

Progress = Callable[[Iterable[int], str], Iterable[int]]


@dataclass
class SplitReport:
    """The broken images and annotations of a split, and its statistics."""

    name: str
    problems: list[str]
    statistics: dict[str, Any] | None = None


@dataclass
class DataReport:
    """Reports of the splits (`train`, `val`, `test`), and what is wrong between them.

    `problems` stop a run or make its numbers wrong; `warnings` may be harmless.
    """

    splits: dict[str, SplitReport] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is broken."""
        return not (self.problems or any(split.problems for split in self.splits.values()))


def check_data(config: Config, progress: Progress | None = None) -> DataReport:
    """Open every image and read every annotation of a config's splits.

    Images and boxes that `data.undecodable` and `data.invalid_boxes` skip count as broken.
    """
    report = DataReport()
    loaded: dict[str, Loaded] = {}
    shown: dict[str, str] = {}
    for name in ("train", "val", "test"):
        section = getattr(config.data, name)
        if section is None or isinstance(section, HeldOutSource):  # a part of train
            continue
        findings = Findings(collect=True)
        try:
            dataset = load_split(config, name, findings)
        except (ValueError, OSError) as error:
            report.splits[name] = SplitReport(name, [*findings.problems, str(error)])
            continue
        loaded[name] = dataset
        checked = check_images(dataset, name, shown, progress)
        problems = [*findings.problems, *checked.problems]
        report.splits[name] = SplitReport(
            dataset.name, problems, statistics(dataset, checked.sizes)
        )
        report.warnings += checked.warnings
    try:
        warnings = compare_splits(loaded) if loaded else []
        report.warnings += [warning.removeprefix("data.") for warning in warnings]
    except (ValueError, OSError) as error:
        report.problems.append(str(error))
    return report


class CheckedImages(NamedTuple):
    """Errors of images that cannot be used, the sizes of the others, and warnings."""

    problems: list[str]
    sizes: list[Size]
    warnings: list[str]


def check_images(
    dataset: Loaded, split: str, shown: dict[str, str], progress: Progress | None = None
) -> CheckedImages:
    """Decode every image; `progress(indices, name)` may display the progress.

    Args:
        shown: sha256 (hex) of pixels -> split and name of the first such image; new ones are added.
    """
    checked = CheckedImages([], [], [])
    indices: Iterable[int] = range(len(dataset))
    for index in progress(indices, dataset.name) if progress else indices:
        item = f"{split}: {dataset.item(index)}"
        try:
            image = dataset.image(index)
        except (ValueError, OSError) as error:
            checked.problems.append(str(error))
            continue
        if isinstance(dataset, DetectionDataset):
            orientation = dataset.unfollowed_orientation(index)
            if orientation != 1:
                checked.warnings.append(
                    f"{item} has EXIF orientation {orientation}, and its size fits with and "
                    "without it: boxes are taken to be of the pixels as stored"
                )
        height, width = image.shape[1:]
        checked.sizes.append((height, width))
        digest = hashlib.sha256(f"{height}x{width}".encode() + image.numpy().tobytes()).hexdigest()
        first = shown.setdefault(digest, item)
        if first != item:
            checked.warnings.append(f"{item} shows the same as {first}")
    return checked


# COCO's limits of medium objects, square pixels.
_SMALL_PX2, _LARGE_PX2 = 32.0**2, 96.0**2


def statistics(dataset: Loaded, sizes: list[Size]) -> dict[str, Any]:
    """Return statistics of a data set and its usable images' `sizes` as plain types."""
    heights, widths = np.array(sizes, dtype=np.float64).reshape(-1, 2).T
    result: dict[str, Any] = {
        "images": len(dataset),
        "width_px": _spread(widths),
        "height_px": _spread(heights),
        "tall_images": int((heights > widths).sum()),
    }
    if dataset.class_counts is None:
        return result
    counts = dict(zip(dataset.class_names, dataset.class_counts.tolist(), strict=True))
    if isinstance(dataset, DetectionDataset):
        return result | _box_statistics(dataset, counts)
    return {**result, "classes": {name: {"images": count} for name, count in counts.items()}}


def _box_statistics(dataset: DetectionDataset, counts: dict[str, int]) -> dict[str, Any]:
    objects = dataset.objects
    per_image = np.diff(objects.first)
    image_of = np.repeat(np.arange(len(dataset)), per_image)
    pairs = np.unique(np.stack([image_of, objects.labels]), axis=1)
    images_with = np.bincount(pairs[1], minlength=len(counts)).tolist()
    widths, heights = (objects.boxes[:, 2:] - objects.boxes[:, :2]).astype(np.float64).T
    is_small, is_large = objects.areas < _SMALL_PX2, objects.areas > _LARGE_PX2
    return {
        "empty_images": int((per_image == 0).sum()),
        "objects": len(objects.labels),
        "difficult": int((objects.difficult & ~objects.crowd).sum()),
        "crowd": int(objects.crowd.sum()),
        "objects_per_image": _spread(per_image),
        "box_width_px": _spread(widths),
        "box_height_px": _spread(heights),
        "box_width_over_height": _spread(widths / np.maximum(heights, 1e-9)),
        "small_medium_large": [int(x.sum()) for x in (is_small, ~(is_small | is_large), is_large)],
        "classes": {
            name: {"images": images, "objects": count}
            for (name, count), images in zip(counts.items(), images_with, strict=True)
        },
    }


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if len(values) == 0:
        return None
    spread = {"min": values.min(), "median": np.median(values)}
    spread |= {"mean": values.mean(), "max": values.max()}
    return {name: round(float(value), 3) for name, value in spread.items()}
