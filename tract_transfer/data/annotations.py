"""What all readers of box annotations share: objects, their classes and their images' sizes.

Boxes are xyxy pixels, 0-based, x2 and y2 exclusive.
"""

# N images, M objects

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from tract_transfer.data.findings import Box, Size
from tract_transfer.data.images import UndecodableImage, read_size
from tract_transfer.registry import did_you_mean

# Where no size is annotated and the image has no readable header: it will not decode either.
UNKNOWN_SIZE: Size = (0, 0)


class ObjectRow(NamedTuple):
    """An annotated object.

    `label` in 0..K-1; `crowd` marks a region of many (then `difficult` holds too); `area` in square
    pixels, the mask's where the annotation has one and else the box's.
    """

    box: Box
    label: int
    difficult: bool
    crowd: bool
    area: float


def object_row(
    box: Box, label: int, *, difficult: bool = False, crowd: bool = False, area: Any = None
) -> ObjectRow:
    """Return an object; `area` is what its annotation says, if that is a number."""
    if not _is_number(area) or not math.isfinite(area):
        area = (box[2] - box[0]) * (box[3] - box[1])
    return ObjectRow(box, label, difficult or crowd, crowd, float(area))


@dataclass
class Objects:
    """The objects of N images in flat arrays; image i owns rows `first[i]:first[i + 1]`.

    Attributes:
        first: int64 (N + 1,).
        boxes: float32 (M, 4).
        labels: int64 (M,), in 0..K-1.
        difficult: bool (M,); true of every crowd.
        crowd: bool (M,).
        areas: float32 (M,), square pixels.
    """

    first: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray

    def select(self, indices: np.ndarray) -> "Objects":
        """Return the objects of these images, in this order."""
        spans = [np.arange(self.first[index], self.first[index + 1]) for index in indices]
        rows = np.concatenate([np.empty(0, dtype=np.int64), *spans])
        flat = (self.boxes, self.labels, self.difficult, self.crowd, self.areas)
        first = np.cumsum([0, *(len(span) for span in spans)])
        return Objects(first, *(array[rows] for array in flat))


def flatten(per_image: Sequence[Sequence[ObjectRow]]) -> Objects:
    """Lay the objects of all images into flat arrays."""
    rows = [row for objects in per_image for row in objects]
    return Objects(
        np.cumsum([0, *(len(objects) for objects in per_image)], dtype=np.int64),
        np.array([row.box for row in rows], dtype=np.float32).reshape(-1, 4),
        np.array([row.label for row in rows], dtype=np.int64),
        np.array([row.difficult for row in rows], dtype=bool),
        np.array([row.crowd for row in rows], dtype=bool),
        np.array([row.area for row in rows], dtype=np.float32),
    )


def label_map(classes: Sequence[str], key: str) -> dict[str, int]:
    """Return label by class name; refuse a name given twice."""
    label_of = {name: label for label, name in enumerate(classes)}
    if not classes or len(label_of) < len(classes):
        twice = sorted({name for name in classes if list(classes).count(name) > 1})
        given = f"{twice} more than once" if twice else "none"
        raise ValueError(f"{key}.classes must be different names, got {given}.")
    return label_of


def unknown_class(place: str, name: str, label_of: Mapping[str, int], key: str) -> ValueError:
    """Return the error of an object whose class is none of the data set's."""
    return ValueError(
        f"{place}: unknown class.{did_you_mean(name, label_of)} Classes: {', '.join(label_of)}. "
        f"Correct the name, or set {key}.classes."
    )


def stored_size(stored: bytes | Path, *, exif: bool = False) -> Size:
    """Return (height, width) from an image's header, or UNKNOWN_SIZE where it has none.

    Such an image raises at its access, where data.undecodable says what becomes of it.
    """
    try:
        return read_size(stored, exif)
    except UndecodableImage:
        return UNKNOWN_SIZE


_MAX_SIDE_PX = 2**31  # more than any image has: it will not fit what is stored


def annotated_size(entry: Mapping[str, Any]) -> Size | None:
    """Return the (height, width) that an entry states, or None."""
    height, width = entry.get("height"), entry.get("width")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return min(height, _MAX_SIDE_PX), min(width, _MAX_SIDE_PX)
    return None


def is_numbers(written: Any) -> TypeGuard[Sequence[float]]:
    """Whether `written` is a list of four numbers."""
    return isinstance(written, list | tuple) and len(written) == 4 and all(map(_is_number, written))


def _is_number(value: Any) -> bool:
    """Whether a value is a float, or an integer that one can hold."""
    if isinstance(value, int):
        return abs(value) < 2**1023
    return isinstance(value, float)
