"""Walking through a whole dataset: what is broken in its images, and what it holds."""

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

Progress = Callable[[Iterable[int], str], Iterable[int]]
# COCO's borders between small, medium and large objects, square pixels.
_SMALL_PX2, _LARGE_PX2 = 32.0**2, 96.0**2


@dataclass
class ImageCheck:
    """What opening every image of a dataset has shown.

    Attributes:
        problems: what is wrong with each image that cannot be used.
        sizes: (height, width) of those that can.
        items: what an image is called, by the sha256 (hex) of its pixels, the first of equal ones.
        repeated: pairs of images whose pixels are the same.
        turned: what is to be looked at, of images with an EXIF orientation that is not followed.
    """

    problems: list[str] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    items: dict[str, str] = field(default_factory=dict)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    turned: list[str] = field(default_factory=list)


def check_images(
    dataset: ClassificationDataset | DetectionDataset | Stream, progress: Progress | None = None
) -> ImageCheck:
    """Decode every image; `progress(indices, name)` may show how far this is."""
    found = ImageCheck()
    indices: Iterable[int] = range(len(dataset))
    for index in progress(indices, dataset.name) if progress else indices:
        try:
            image = dataset.image(index)
        except (ValueError, OSError) as error:
            found.problems.append(str(error))
            continue
        if isinstance(dataset, DetectionDataset):
            found.turned += _orientation_in_words(dataset, index)
        height, width = image.shape[1:]
        found.sizes.append((height, width))
        digest = hashlib.sha256(f"{height}x{width}".encode() + image.numpy().tobytes()).hexdigest()
        first = found.items.setdefault(digest, dataset.item(index))
        if first != dataset.item(index):
            found.repeated.append((first, dataset.item(index)))
    return found


def statistics(
    dataset: ClassificationDataset | DetectionDataset | Stream, sizes: list[Size]
) -> dict[str, Any]:
    """Return what a dataset holds, as plain types; a spread is min, median, mean and max.

    Args:
        sizes: (height, width) of the images that can be used.
    """
    heights, widths = np.array(sizes, dtype=np.float64).reshape(-1, 2).T
    names = dataset.class_names
    found: dict[str, Any] = {
        "images": len(dataset),
        "width_px": _spread(widths),
        "height_px": _spread(heights),
        "tall_images": int((heights > widths).sum()),
    }
    if isinstance(dataset, Stream):
        of_classes = dataset.class_counts
    else:
        of_classes = np.bincount(dataset.labels, minlength=len(names))
    if of_classes is None:
        return found
    counts = of_classes.tolist()
    if not isinstance(dataset, DetectionDataset):
        return {**found, "classes": {name: {"images": counts[k]} for k, name in enumerate(names)}}
    objects, labels = dataset.objects, dataset.labels
    per_image = np.diff(objects.first)
    pairs = np.unique(np.stack([np.repeat(np.arange(len(dataset)), per_image), labels]), axis=1)
    with_class = np.bincount(pairs[1], minlength=len(names)).tolist()
    sides = (objects.boxes[:, 2:] - objects.boxes[:, :2]).astype(np.float64)
    return {
        **found,
        "empty_images": int((per_image == 0).sum()),
        "objects": len(labels),
        "difficult": int((objects.difficult & ~objects.crowd).sum()),
        "crowd": int(objects.crowd.sum()),
        "objects_per_image": _spread(per_image),
        "box_width_px": _spread(sides[:, 0]),
        "box_height_px": _spread(sides[:, 1]),
        "box_width_over_height": _spread(sides[:, 0] / np.maximum(sides[:, 1], 1e-9)),
        "small_medium_large": [
            int((objects.areas < _SMALL_PX2).sum()),
            int(((objects.areas >= _SMALL_PX2) & (objects.areas <= _LARGE_PX2)).sum()),
            int((objects.areas > _LARGE_PX2).sum()),
        ],
        "classes": {
            name: {"images": with_class[k], "objects": counts[k]} for k, name in enumerate(names)
        },
    }


def _orientation_in_words(dataset: DetectionDataset, index: int) -> list[str]:
    orientation = dataset.unfollowed_orientation(index)
    if orientation == 1:
        return []
    return [
        f"{dataset.item(index)} has EXIF orientation {orientation}, of which its size tells "
        "nothing: boxes are taken to be of the pixels as stored"
    ]


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if len(values) == 0:
        return None
    found = {
        "min": values.min(),
        "median": np.median(values),
        "mean": values.mean(),
        "max": values.max(),
    }
    return {name: round(float(value), 3) for name, value in found.items()}
