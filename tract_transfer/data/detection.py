"""Detection data sets: annotations checked when they are read, images decoded when accessed."""

# N images, M objects, K classes

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from tract_transfer.data import images
from tract_transfer.data.findings import Box, Findings, Origin, Size
from tract_transfer.data.images import ImageSource, IndexedImages, read_header, upright_size
from tract_transfer.registry import did_you_mean

# Of an image without annotated size and readable header: it raises when it is accessed.
UNKNOWN_SIZE: Size = (0, 0)
_MAX_SIDE_PX = 2**31  # larger than any image: such a size will not match what is stored


class Objects(NamedTuple):
    """The objects of N images in flat arrays; image i has the rows `first[i]:first[i + 1]`.

    Attributes:
        first: int64 (N + 1,).
        boxes: float32 (M, 4) xyxy pixels, 0-based, x2 and y2 exclusive.
        labels: int64 (M,), in 0..K-1.
        difficult: bool (M,); true for every crowd.
        crowd: bool (M,), regions of many objects.
        areas: float32 (M,), square pixels: of the mask if the annotation has one, else of the box.
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
        first = np.cumsum([0, *(len(span) for span in spans)])
        return Objects(first, *(array[rows] for array in self[1:]))


class BoxReader:
    """Checks the annotations that a reader of any format finds, and makes a data set of them."""

    def __init__(self, class_names: Sequence[str], key: str, findings: Findings) -> None:
        if not class_names or len(set(class_names)) < len(class_names):
            repeated = sorted({n for n in class_names if list(class_names).count(n) > 1})
            given = f"{repeated} more than once" if repeated else "none"
            raise ValueError(f"{key}.classes must be different names, got {given}.")
        self.class_names = list(class_names)
        self.label_of = {name: label for label, name in enumerate(class_names)}
        self.key = key
        self.findings = findings
        self._sizes: list[Size] = []
        self._objects: list[list[tuple[Box, int, bool, bool, float]]] = []

    def add_image(self, size: Size) -> int:
        """Add an image of (height, width) and return its index."""
        self._sizes.append(size)
        self._objects.append([])
        return len(self._sizes) - 1

    def add_object(
        self,
        image: int,
        item: str,
        name: str,
        box: Box,
        written: str,
        *,
        difficult: bool = False,
        crowd: bool = False,
        area: Any = None,
    ) -> None:
        """Check an object of an image and add it; a wrong one is reported to the findings.

        Args:
            item: the object's name in messages; `name` is its class.
            box: xyxy pixels, 0-based, x2 and y2 exclusive; NaN where it cannot be read.
            written: the box as the annotation states it.
            area: used if it is a finite number, else the area of the box.
        """
        size = self._sizes[image]
        if size == UNKNOWN_SIZE:
            return
        if name not in self.label_of:
            hint, names = did_you_mean(name, self.label_of), ", ".join(self.label_of)
            message = f"{item}: unknown class.{hint} Classes: {names}. Correct the name, or set"
            self.findings.report(ValueError(f"{message} {self.key}.classes."))
        elif clipped := self.findings.check_box(box, size, item, written):
            if not _is_number(area) or not math.isfinite(area):
                area = (clipped[2] - clipped[0]) * (clipped[3] - clipped[1])
            row = (clipped, self.label_of[name], difficult or crowd, crowd, float(area))
            self._objects[image].append(row)

    def arrays(self) -> tuple[np.ndarray, Objects]:
        """Return the sizes, int64 (N, 2), and the objects of all images."""
        flat = [row for objects in self._objects for row in objects]
        columns = list(zip(*flat, strict=True)) or [()] * 5
        objects = Objects(
            np.cumsum([0, *map(len, self._objects)], dtype=np.int64),
            np.array(columns[0], dtype=np.float32).reshape(-1, 4),
            *map(np.array, columns[1:], (np.int64, bool, bool, np.float32)),
        )
        return np.array(self._sizes, dtype=np.int64).reshape(-1, 2), objects


def stored_size(stored: bytes | Path, *, exif: bool = False) -> Size:
    """Return (height, width) from an image's header, or UNKNOWN_SIZE if it is unreadable."""
    try:
        size, orientation = read_header(stored)
    except images.UndecodableImage:
        return UNKNOWN_SIZE
    return upright_size(size, orientation) if exif else size


def annotated_size(height: Any, width: Any) -> Size | None:
    """Return an annotated (height, width), or None if it is none."""
    sides = (height, width)
    if all(isinstance(side, int | float) and side > 0 and side % 1 == 0 for side in sides):
        return int(min(height, _MAX_SIDE_PX)), int(min(width, _MAX_SIDE_PX))
    return None


def four_numbers(written: Any) -> Box:
    """Return a list of four numbers as floats; four NaN for anything else."""
    if isinstance(written, list | tuple) and len(written) == 4 and all(map(_is_number, written)):
        a, b, c, d = map(float, written)
        return a, b, c, d
    return (math.nan,) * 4


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a float, or an integer that a float can hold."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1023)


class ImageFiles(ImageSource):
    """Images in files."""

    def __init__(self, files: Sequence[str], max_pixels: int = images.MAX_PIXELS) -> None:
        super().__init__(max_pixels)
        self._files = np.asarray(files)  # one array, which worker processes share

    def stored(self, row: int) -> Path:
        """Return a row's file."""
        return Path(self.item(row))

    def item(self, row: int) -> str:
        """Return a row's file as errors name it."""
        return str(self._files[row])


class DetectionDataset(IndexedImages):
    """Images and their objects.

    `sizes` int64 (N, 2) holds (height, width). An image may have the annotated size both as stored
    and after its EXIF orientation is applied (180 degrees, mirrored, square). Such an image is used
    as stored, or with the orientation applied if `upright`.
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        source: ImageSource,
        sizes: np.ndarray,
        objects: Objects,
        rows: Sequence[int] | None = None,
        *,
        upright: bool = False,
        origin: Origin | None = None,
    ) -> None:
        super().__init__(name, class_names, source, len(sizes), rows, origin)
        self.upright = upright
        self.sizes = sizes
        self.objects = objects

    @property
    def labels(self) -> np.ndarray:
        """The class of every object, int64 (M,)."""
        return self.objects.labels

    @property
    def class_counts(self) -> np.ndarray:
        """The number of objects of each class, int64 (K,)."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def _decode(self, index: int) -> Tensor:
        """Decode an image to the annotated size, by its EXIF orientation if only that fits."""
        size, row = self.size(index), int(self._rows[index])
        for exif in (self.upright, not self.upright):
            image = self._source.image(row, exif)
            if size in (tuple(image.shape[1:]), UNKNOWN_SIZE):
                return image
            if not exif:
                stored = f"{image.shape[2]}x{image.shape[1]}"
        raise ValueError(
            f"{self.item(index)} has {stored} pixels (width x height), but its annotation says "
            f"{size[1]}x{size[0]}: the boxes may not fit. Correct the annotated size."
        )

    @property
    def strata(self) -> np.ndarray:
        """A number for the rarest class of each image, int64 (N,), or -1 without objects."""
        rarity = np.argsort(np.argsort(-self.class_counts, kind="stable"))
        strata = np.full(len(self.sizes), -1, dtype=np.int64)
        image_of = np.repeat(np.arange(len(self.sizes)), np.diff(self.objects.first))
        np.maximum.at(strata, image_of, rarity[self.labels])
        return strata

    def target(self, index: int) -> dict[str, Any]:
        """Return boxes, labels, difficult, crowd and area of an image's objects as in `Objects`.

        `image_id` is the index. Transforms keep `area`, which is of the image as stored.
        """
        rows = slice(*self.objects.first[index : index + 2].tolist())
        names = ("boxes", "labels", "difficult", "crowd", "area")
        parts = [torch.from_numpy(array[rows].copy()) for array in self.objects[1:]]
        return {**dict(zip(names, parts, strict=True)), "image_id": index}

    def size(self, index: int) -> Size:
        """Return an image's annotated (height, width), without decoding it."""
        height, width = self.sizes[index].tolist()
        return height, width

    def unfollowed_orientation(self, index: int) -> int:
        """Return the EXIF orientation that an image may need but is not given, else 1."""
        size, orientation = read_header(self._source.stored(int(self._rows[index])))
        is_unclear = not self.upright and upright_size(size, orientation) == size
        return orientation if is_unclear else 1

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of length, class names, all objects and 64 stored images."""
        return images.fingerprint(self, self.sizes, *self.objects)

    def select(self, indices: Sequence[int] | np.ndarray, name: str) -> "DetectionDataset":
        """Return the data set of these images, in this order; it keeps all classes."""
        picked = np.asarray(indices, dtype=np.int64)
        selected = super().select(picked, name)
        selected.sizes, selected.objects = self.sizes[picked], self.objects.select(picked)
        return selected

    def with_objects(self) -> "DetectionDataset":
        """Return the data set without the images that have no object besides crowds."""
        counted = np.flatnonzero(~self.objects.crowd)
        kept = np.unique(np.searchsorted(self.objects.first, counted, side="right") - 1)
        return self.select(kept, self.name) if len(kept) < len(self) else self


class ImageLabels:
    """The images of a detection data set, each with one mark per class (PASCAL VOC's rule).

    `marks` int64 (N, K): 1 if the image has an object of the class; 0, which is not counted, if
    all of them are difficult; -1 if there is none. VOC's own class files say the same.
    """

    def __init__(self, dataset: DetectionDataset) -> None:
        self._dataset = dataset
        self.name = dataset.name
        self.class_names = dataset.class_names
        self.origin = dataset.origin
        self.image, self.item = dataset.image, dataset.item
        self.encoded, self.fingerprint = dataset.encoded, dataset.fingerprint
        self.cache_images = dataset.cache_images
        objects = dataset.objects
        self.marks = np.full((len(dataset), len(dataset.class_names)), -1, np.int64)
        image_of = np.repeat(np.arange(len(dataset)), np.diff(objects.first))
        for chosen, mark in ((objects.difficult, 0), (~objects.difficult, 1)):
            self.marks[image_of[chosen], objects.labels[chosen]] = mark

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def labels(self) -> np.ndarray:
        """The class of every positive mark, int64, image by image."""
        return np.nonzero(self.marks == 1)[1]

    @property
    def class_counts(self) -> np.ndarray:
        """The number of positive images of each class, int64 (K,)."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def target(self, index: int) -> list[int]:
        """Return an image's K marks."""
        marks: list[int] = self.marks[index].tolist()
        return marks
