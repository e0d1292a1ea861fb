"""PASCAL VOC detection datasets: annotations checked at load, kept as flat arrays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tract_transfer.data import images
from tract_transfer.data.voc import VocObject, read_annotation, read_split

VOC_CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


class DetectionDataset:
    """Images and their objects.

    Objects lie in flat arrays: `boxes` float32 (M, 4) xyxy pixels, 0-based with x2, y2 exclusive,
    `labels` int64 (M,) in 0..K-1, `difficult` bool (M,). Image i owns `first[i]:first[i + 1]`;
    `sizes` int64 (N, 2) holds (height, width). Images are decoded at each access.
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        files: Sequence[str] | np.ndarray,
        sizes: np.ndarray,
        first: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        difficult: np.ndarray,
    ) -> None:
        self.name = name
        self.class_names = list(class_names)
        self.files = np.asarray(files)
        self.sizes = sizes
        self.first = first
        self.boxes = boxes
        self.labels = labels
        self.difficult = difficult
        self._cache: list[Tensor | None] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 RGB (3, H, W) of the annotated size.

        Boxes refer to the pixels as stored, so an EXIF orientation is followed only where the
        annotated size asks for it.

        Raises:
            UndecodableImage: the file is no whole image.
            ValueError: its size is not the annotated one.
        """
        cached = self._cache[index] if self._cache is not None else None
        if cached is not None:
            return cached
        size = self.size(index)
        file = Path(str(self.files[index]))
        found = []
        for exif in (False, True):
            image = images.decode_image(file, self.item(index), exif)
            if tuple(image.shape[1:]) == size:
                return image
            found.append(f"{image.shape[2]}x{image.shape[1]}")
        raise ValueError(
            f"{file} has {found[0]} pixels (width x height), but its annotation says "
            f"{size[1]}x{size[0]}: the boxes may not fit. Correct the annotation's <size>."
        )

    def target(self, index: int) -> dict[str, Any]:
        """Return an image's objects.

        Returns:
            boxes: float32 (n, 4) xyxy pixels, 0-based, x2 and y2 exclusive.
            labels: int64 (n,) in 0..K-1.
            difficult: bool (n,).
            image_id: the index.
        """
        own = slice(int(self.first[index]), int(self.first[index + 1]))
        return {
            "boxes": torch.from_numpy(self.boxes[own].copy()),
            "labels": torch.from_numpy(self.labels[own].copy()),
            "difficult": torch.from_numpy(self.difficult[own].copy()),
            "image_id": index,
        }

    def size(self, index: int) -> tuple[int, int]:
        """Return an image's annotated (height, width), without decoding it."""
        height, width = self.sizes[index].tolist()
        return height, width

    def item(self, index: int) -> str:
        """Return what an error message calls an image: its file."""
        return str(self.files[index])

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of length, class names, all objects and 64 image files."""
        arrays = [self.sizes, self.first, self.boxes, self.labels, self.difficult]

        def encoded(index: int) -> bytes:
            return Path(str(self.files[index])).read_bytes()

        return images.fingerprint(self.class_names, arrays, encoded, len(self))

    def select(self, indices: Sequence[int] | np.ndarray, name: str) -> "DetectionDataset":
        """Return the dataset of these images, in this order; all classes stay."""
        picked = np.asarray(indices, dtype=np.int64)
        spans = [np.arange(self.first[index], self.first[index + 1]) for index in picked]
        objects = np.concatenate([np.empty(0, dtype=np.int64), *spans])
        chosen = DetectionDataset(
            name,
            self.class_names,
            self.files[picked],
            self.sizes[picked],
            np.cumsum([0, *(len(span) for span in spans)]),
            self.boxes[objects],
            self.labels[objects],
            self.difficult[objects],
        )
        if self._cache is not None:
            chosen._cache = [self._cache[index] for index in picked]
        return chosen

    def cache_images(self) -> None:
        """Decode every image once into RAM; one that cannot be decoded raises at its access."""
        self._cache = images.decode_all(self.image, len(self))


def load_voc(
    root: str | Path,
    sets: Sequence[str],
    classes: Sequence[str] | None = None,
    key: str = "data.train",
) -> DetectionDataset:
    """Load image sets of a PASCAL VOC devkit.

    Args:
        root: the folder that holds VOCdevkit, or VOC2007, or any folder of that layout.
        sets: `<year or folder>/<split>`, such as ["2007/trainval", "2012/trainval"]. A split file
            has an image id a line, or an id and 1, 0 or -1: those with -1 are left out.
        classes: the class names in label order; VOC's twenty by default.
        key: the config section that error messages point to.

    Raises:
        FileNotFoundError: a folder, a split file, an annotation or an image is missing.
        ValueError: a line or an object is wrong; the message names its file and number.
    """
    names = list(VOC_CLASSES if classes is None else classes)
    label_of = {name: label for label, name in enumerate(names)}
    if not sets:
        raise ValueError(f"{key}.sets must name a set at least, such as 2007/trainval.")
    files: list[str] = []
    sizes: list[tuple[int, int]] = []
    first = [0]
    objects: list[VocObject] = []
    origin: dict[Path, str] = {}
    for voc_set in sets:
        for place, xml, image in read_split(Path(root).expanduser(), voc_set, key):
            if xml in origin:
                raise ValueError(f"{place} repeats {xml.stem!r}, already in {origin[xml]}.")
            origin[xml] = place
            size, found = read_annotation(xml, image, label_of, key)
            files.append(str(image))
            sizes.append(size)
            objects.extend(found)
            first.append(len(objects))
    return DetectionDataset(
        f"voc {'+'.join(sets)}",
        names,
        files,
        np.array(sizes, dtype=np.int64).reshape(-1, 2),
        np.array(first, dtype=np.int64),
        np.array([thing.box for thing in objects], dtype=np.float32).reshape(-1, 4),
        np.array([thing.label for thing in objects], dtype=np.int64),
        np.array([thing.difficult for thing in objects], dtype=bool),
    )
