"""Detection datasets: annotations checked at load and kept as flat arrays, images lazily read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor

from tract_transfer.data import images
from tract_transfer.data.findings import Box, Origin, Size
from tract_transfer.data.images import UndecodableImage, read_size
from tract_transfer.registry import did_you_mean

# --- What all readers of box annotations share: objects, their classes and their images' sizes.

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


class StoredImages(Protocol):
    """Where a dataset's images lie; rows are those of the source, before any selection."""

    def stored(self, row: int) -> bytes | Path:
        """Return a row's encoded image, or its file."""

    def item(self, row: int) -> str:
        """Return what an error message calls the row."""


class ImageFiles:
    """Images in files."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = np.asarray(files)  # one array, which worker processes share

    def stored(self, row: int) -> Path:
        """Return a row's file."""
        return Path(str(self._files[row]))

    def item(self, row: int) -> str:
        """Return a row's file, as errors name it."""
        return str(self._files[row])


class DetectionDataset:
    """Images and their objects, which lie in flat arrays: see annotations.Objects.

    `sizes` int64 (N, 2) holds (height, width). Images are decoded at each access. `origin`
    tells where it comes from. An image of more than `max_pixels` is not decoded.

    An image that has the annotated size both as stored and turned as its EXIF orientation says
    (180 degrees, mirrored, square) is taken as stored, or turned where `upright`.
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        source: StoredImages,
        sizes: Sequence[Size] | np.ndarray,
        objects: Objects,
        rows: np.ndarray | None = None,
        max_pixels: int = images.MAX_PIXELS,
        upright: bool = False,
    ) -> None:
        self.name = name
        self.max_pixels = max_pixels
        self.upright = upright
        self.class_names = list(class_names)
        self.sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
        self.objects = objects
        self._source = source
        self._rows = np.arange(len(self.sizes)) if rows is None else rows
        self._cache: list[Tensor | None] | None = None
        self.origin = Origin()

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def labels(self) -> np.ndarray:
        """The class of every object, int64 (M,)."""
        return self.objects.labels

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 RGB (3, H, W) of the annotated size.

        Its EXIF orientation is followed where only then it has that size, or has it anyway and the
        dataset is `upright`.

        Raises:
            UndecodableImage: it is no whole image.
            ValueError: its size is not the annotated one.
        """
        cached = self._cache[index] if self._cache is not None else None
        if cached is not None:
            return cached
        size = self.size(index)
        row = int(self._rows[index])
        stored, item = self._source.stored(row), self._source.item(row)
        found = []
        for exif in (self.upright, not self.upright):
            image = images.decode_image(stored, item, exif, self.max_pixels)
            if size in (tuple(image.shape[1:]), UNKNOWN_SIZE):
                return image
            found.append(f"{image.shape[2]}x{image.shape[1]}")
        raise ValueError(
            f"{item} has {found[self.upright]} pixels (width x height), but its annotation says "
            f"{size[1]}x{size[0]}: the boxes may not fit. Correct the annotated size."
        )

    def target(self, index: int) -> dict[str, Any]:
        """Return an image's objects.

        Returns:
            boxes: float32 (n, 4) xyxy pixels, 0-based, x2 and y2 exclusive.
            labels: int64 (n,) in 0..K-1.
            difficult: bool (n,), true of every crowd.
            crowd: bool (n,), regions of many objects (COCO).
            area: float32 (n,), square pixels of the image as stored; a transform leaves it.
            image_id: the index.
        """
        objects = self.objects
        own = slice(int(objects.first[index]), int(objects.first[index + 1]))
        flat = {
            "boxes": objects.boxes,
            "labels": objects.labels,
            "difficult": objects.difficult,
            "crowd": objects.crowd,
            "area": objects.areas,
        }
        found: dict[str, Any] = {k: torch.from_numpy(v[own].copy()) for k, v in flat.items()}
        return {**found, "image_id": index}

    def size(self, index: int) -> Size:
        """Return an image's annotated (height, width), without decoding it."""
        height, width = self.sizes[index].tolist()
        return height, width

    def item(self, index: int) -> str:
        """Return what an error message calls an image: its file, or its row."""
        return self._source.item(int(self._rows[index]))

    def unfollowed_orientation(self, index: int) -> int:
        """Return an image's EXIF orientation where it may be meant and is not followed, else 1.

        Raises:
            UndecodableImage: it has no header that can be read.
        """
        stored = self._source.stored(int(self._rows[index]))
        fits_both = images.read_size(stored) == images.read_size(stored, exif=True)
        return images.read_orientation(stored) if fits_both and not self.upright else 1

    def encoded(self, index: int) -> bytes:
        """Return an image's stored bytes."""
        return images.read_stored(self._source.stored(int(self._rows[index])))

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of length, class names, all objects and 64 stored images."""
        objects = self.objects
        arrays = [
            self.sizes, objects.first, objects.boxes, objects.labels, objects.difficult,
            objects.crowd, objects.areas,
        ]  # fmt: skip
        return images.fingerprint(self.class_names, arrays, self.encoded, len(self))

    def select(self, indices: Sequence[int] | np.ndarray, name: str) -> "DetectionDataset":
        """Return the dataset of these images, in this order; all classes stay."""
        picked = np.asarray(indices, dtype=np.int64)
        chosen = DetectionDataset(
            name,
            self.class_names,
            self._source,
            self.sizes[picked],
            self.objects.select(picked),
            self._rows[picked],
            self.max_pixels,
            self.upright,
        )
        chosen.origin = self.origin
        if self._cache is not None:
            chosen._cache = [self._cache[index] for index in picked]
        return chosen

    def with_objects(self) -> "DetectionDataset":
        """Return the dataset without the images that have no object but crowds."""
        counted = np.flatnonzero(~self.objects.crowd)
        kept = np.unique(np.searchsorted(self.objects.first, counted, side="right") - 1)
        return self.select(kept, self.name) if len(kept) < len(self) else self

    def cache_images(self) -> None:
        """Decode every image once into RAM; one that cannot be decoded raises at its access."""
        self._cache = images.decode_all(self.image, len(self))


# --- Labels of whole images from the objects in them, by PASCAL VOC's classification rule.


class ImageLabels:
    """The images of a detection set, each with a mark for every class.

    `marks` int64 (N, K): 1 where an object of the class is in the image; 0, not counted, where all
    of them are difficult; -1 where there is none. So VOC's own files of a class have it.
    """

    def __init__(self, objects: DetectionDataset) -> None:
        self._objects = objects
        self.name = objects.name
        self.class_names = objects.class_names
        self.origin = objects.origin
        self.marks = _marks(objects)

    def __len__(self) -> int:
        return len(self._objects)

    @property
    def labels(self) -> np.ndarray:
        """The class of every positive, int64, image by image."""
        return np.nonzero(self.marks == 1)[1]

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 RGB (3, H, W). Raises as `DetectionDataset.image`."""
        return self._objects.image(index)

    def target(self, index: int) -> list[int]:
        """Return an image's K marks."""
        marks: list[int] = self.marks[index].tolist()
        return marks

    def item(self, index: int) -> str:
        """Return what an error message calls an image."""
        return self._objects.item(index)

    def encoded(self, index: int) -> bytes:
        """Return an image's stored bytes."""
        return self._objects.encoded(index)

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of the detection set's length, classes, objects and images."""
        return self._objects.fingerprint()

    def cache_images(self) -> None:
        """Decode every image once into RAM; one that cannot be decoded raises at its access."""
        self._objects.cache_images()


def _marks(dataset: DetectionDataset) -> np.ndarray:
    objects = dataset.objects
    marks = np.full((len(dataset), len(dataset.class_names)), -1, np.int64)
    image = np.repeat(np.arange(len(dataset)), np.diff(objects.first))
    for is_counted, mark in ((objects.difficult, 0), (~objects.difficult, 1)):
        marks[image[is_counted], objects.labels[is_counted]] = mark
    return marks
