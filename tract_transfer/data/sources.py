"""The registry of data sources, and data sets made of lists of images and labels.

A source is a function whose keyword-only arguments are the `args` of a config's section
`{source: mine/tiff, args: {...}}`. It returns `image_dataset(...)` or `box_dataset(...)`.
"""

# N images, n objects of one, K classes

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tract_transfer.data.classification import ClassificationDataset, hold_out
from tract_transfer.data.coco import load_coco
from tract_transfer.data.detection import BoxReader, DetectionDataset, four_numbers, stored_size
from tract_transfer.data.digits import load_digit_scenes, load_digits
from tract_transfer.data.findings import Findings
from tract_transfer.data.huggingface import load_huggingface
from tract_transfer.data.images import MAX_PIXELS, ImageSource, UndecodableImage
from tract_transfer.data.voc import load_voc
from tract_transfer.registry import Registry

SOURCES = Registry("SOURCES")
# These have sections of their own in a config; here their names are taken.
_BUILT_IN: dict[str, Callable[..., Any]] = {
    "huggingface": load_huggingface,
    "digits": load_digits,
    "train": hold_out,
    "voc": load_voc,
    "coco": load_coco,
    "digit_scenes": load_digit_scenes,
}
for _name, _load in _BUILT_IN.items():
    SOURCES.register(_name)(_load)

Stored = Path | str | np.ndarray
Label = int | str
Decode = Callable[[Path], np.ndarray]


class Reading(NamedTuple):
    """What a config demands of the data that a source reads."""

    key: str = "data"
    findings: Findings = Findings()  # raises the first problem
    max_pixels: int = MAX_PIXELS


_READING: ContextVar[Reading] = ContextVar("_READING", default=Reading())  # noqa: B039 - constant


@contextmanager
def reading(key: str, findings: Findings, max_pixels: int) -> Iterator[None]:
    """Let data sets that are made in the block follow a config's policies."""
    token = _READING.set(Reading(key, findings, max_pixels))
    try:
        yield
    finally:
        _READING.reset(token)


def image_dataset(
    images: Sequence[Stored],
    labels: Sequence[Label] | np.ndarray,
    class_names: Sequence[str],
    *,
    name: str = "images",
    decode: Decode | None = None,
) -> ClassificationDataset:
    """Return a data set of images with one label each.

    Args:
        images: N files, or arrays of uint8, RGB (H, W, 3) or gray (H, W). Files are decoded when
            they are used.
        labels: N classes, by number in 0..K-1 or by name.
        class_names: the K classes in the order of their numbers, the same for every split.
        name: names the data in messages and in the protocol of results.
        decode: reads a file as such an array; by default PIL does.

    Raises:
        ValueError: lengths, labels or arrays do not fit.
    """
    key = _READING.get().key
    names = BoxReader(class_names, key, Findings()).class_names  # checks them
    if len(images) == 0 or len(labels) != len(images):
        raise ValueError(
            f"{name}: every image needs a label, and there are {len(images)} images and "
            f"{len(labels)} labels. Give lists of one length, with an image or more."
        )
    source = GivenImages(images, name, decode)
    numbers = [_number(label, names, source.item(row)) for row, label in enumerate(labels)]
    return ClassificationDataset(name, names, np.array(numbers, dtype=np.int64), source)


def box_dataset(
    images: Sequence[Stored],
    boxes: Sequence[Any],
    labels: Sequence[Sequence[Label] | np.ndarray],
    class_names: Sequence[str],
    *,
    difficult: Sequence[Sequence[bool] | np.ndarray] | None = None,
    name: str = "images",
) -> DetectionDataset:
    """Return a data set of images with boxes.

    Args:
        images, class_names, name: as of `image_dataset`. An EXIF orientation is applied.
        boxes: for each image (n, 4): xyxy in pixels, 0-based, x2 and y2 exclusive. Those outside
            the image are treated as `data.invalid_boxes` says.
        labels: for each image the n classes of its boxes, by number or by name.
        difficult: for each image which of its boxes an evaluation ignores; none by default.

    Raises:
        ValueError: lengths, labels, boxes or arrays do not fit.
    """
    current = _READING.get()
    reader = BoxReader(class_names, current.key, current.findings)
    columns = [boxes, labels, *([] if difficult is None else [difficult])]
    if len(images) == 0 or any(len(column) != len(images) for column in columns):
        raise ValueError(
            f"{name}: every image needs its boxes and labels, and there are {len(images)} images "
            f"and {' and '.join(str(len(column)) for column in columns)} lists. Give lists of one "
            "length, with an image or more; an image without objects has empty ones."
        )
    source = GivenImages(images, name, None)
    for row, (of_image, classes) in enumerate(zip(boxes, labels, strict=True)):
        item = source.item(row)
        marks = [False] * len(of_image) if difficult is None else difficult[row]
        if not len(of_image) == len(classes) == len(marks):
            raise ValueError(f"{item}: {len(of_image)} boxes need as many labels, not {classes}.")
        image = reader.add_image(stored_size(source.stored(row), exif=True))
        for number, (box, label, mark) in enumerate(zip(of_image, classes, marks, strict=True)):
            where = f"{item} object {number}"
            class_name = reader.class_names[_number(label, reader.class_names, where)]
            values = [float(value) for value in box]
            written = f"{values} (xyxy)"
            reader.add_object(
                image, where, class_name, four_numbers(values), written, difficult=bool(mark)
            )
    return DetectionDataset(name, reader.class_names, source, *reader.arrays(), upright=True)


def _number(label: Any, class_names: Sequence[str], item: str) -> int:
    """Return the number of a class that is given by its number or name."""
    if isinstance(label, str) and label in class_names:
        return class_names.index(label)
    is_number = isinstance(label, int | np.integer) and not isinstance(label, bool)
    if is_number and 0 <= label < len(class_names):
        return int(label)
    raise ValueError(
        f"{item}: the label {label!r} is neither one of {list(class_names)} nor a number in "
        f"0..{len(class_names) - 1}. Correct it, or add the class."
    )


class GivenImages(ImageSource):
    """Files and arrays; an array is stored as PPM, which PIL decodes without loss."""

    def __init__(self, images: Sequence[Stored], name: str, decode: Decode | None) -> None:
        super().__init__(_READING.get().max_pixels)
        self._images = [Path(i) if isinstance(i, str | Path) else np.asarray(i) for i in images]
        self._name, self._decode = name, decode
        for row, image in enumerate(self._images):
            if isinstance(image, np.ndarray):
                _check_pixels(image, self.item(row))

    def stored(self, row: int) -> bytes | Path:
        """Return a row's file, or its array as PPM."""
        image = self._images[row]
        if isinstance(image, Path):
            return image
        height, width = image.shape[:2]
        kind = b"P6" if image.ndim == 3 else b"P5"
        return kind + f"\n{width} {height}\n255\n".encode() + image.tobytes()

    def item(self, row: int) -> str:
        """Return a row's file, or the number of its array."""
        image = self._images[row]
        return str(image) if isinstance(image, Path) else f"{self._name} image {row}"

    def image(self, row: int, exif: bool = True) -> Tensor:
        """Return a row's image, uint8 RGB (3, H, W). Raises UndecodableImage."""
        image = self._images[row]
        if self._decode is None or not isinstance(image, Path):
            return super().image(row, exif)
        try:
            pixels = np.asarray(self._decode(image))
            _check_pixels(pixels, "the decoded image")
            if (count := pixels.shape[0] * pixels.shape[1]) > self._max_pixels:
                raise ValueError(f"{count} pixels, more than data.max_pixels {self._max_pixels}")
        except Exception as error:  # whatever a reader of damaged files raises
            raise UndecodableImage(str(image), str(error).rstrip(".")) from error
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[:, :, None], 3, axis=2)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _check_pixels(image: np.ndarray, item: str) -> None:
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    if image.dtype != np.uint8 or not is_image or 0 in image.shape:
        raise ValueError(
            f"{item} must be uint8, RGB (H, W, 3) or gray (H, W), got {image.dtype} {image.shape}. "
            "Convert it."
        )
