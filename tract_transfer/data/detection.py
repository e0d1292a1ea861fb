"""Detection datasets: annotations checked at load and kept as flat arrays, images lazily read."""

# K classes, N images, M objects

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tract_transfer.data import images
from tract_transfer.data.annotations import UNKNOWN_SIZE, Objects
from tract_transfer.data.findings import Size
from tract_transfer.data.known_splits import Origin


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
