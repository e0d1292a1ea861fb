"""Checking a whole data set: its broken images, repeated images and statistics."""

# N images, K classes, M objects

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tract_transfer.data.classification import ClassificationDataset
from tract_transfer.data.detection import DetectionDataset
from tract_transfer.data.findings import Size
from tract_transfer.data.streaming import Stream

Checked = ClassificationDataset | DetectionDataset | Stream
Progress = Callable[[Iterable[int], str], Iterable[int]]
# COCO's limits of medium objects, square pixels.
_SMALL_PX2, _LARGE_PX2 = 32.0**2, 96.0**2


@dataclass
class ImageCheck:
    """The result of decoding every image of a data set."""

    problems: list[str] = field(default_factory=list)  # errors of images that cannot be used
    sizes: list[Size] = field(default_factory=list)  # of the others
    items: dict[str, str] = field(default_factory=dict)  # sha256 (hex) of pixels -> first name
    repeated: list[tuple[str, str]] = field(default_factory=list)  # names of equal images
    turned: list[str] = field(default_factory=list)  # warnings: EXIF orientation is not applied


def check_images(dataset: Checked, progress: Progress | None = None) -> ImageCheck:
    """Decode every image; `progress(indices, name)` may display the progress."""
    result = ImageCheck()
    indices: Iterable[int] = range(len(dataset))
    for index in progress(indices, dataset.name) if progress else indices:
        item = dataset.item(index)
        try:
            image = dataset.image(index)
        except (ValueError, OSError) as error:
            result.problems.append(str(error))
            continue
        if isinstance(dataset, DetectionDataset):
            orientation = dataset.unfollowed_orientation(index)
            if orientation != 1:
                result.turned.append(
                    f"{item} has EXIF orientation {orientation}, and its size fits with and "
                    "without it: boxes are taken to be of the pixels as stored"
                )
        height, width = image.shape[1:]
        result.sizes.append((height, width))
        digest = hashlib.sha256(f"{height}x{width}".encode() + image.numpy().tobytes()).hexdigest()
        first = result.items.setdefault(digest, item)
        if first != item:
            result.repeated.append((first, item))
    return result


def statistics(dataset: Checked, sizes: list[Size]) -> dict[str, Any]:
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
