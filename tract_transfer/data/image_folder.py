"""A folder of images read as it is: no index is written, and of an image its name is kept."""

# N images, K classes

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from tract_transfer.data import images


class FolderImages:
    """The images at `<folder>/<class>/<name>`, ordered by class and name.

    Attributes:
        class_names: those with an image in any of `all_folders`.
        labels: int64 (N,).

    Raises:
        ValueError: a folder lies in that of a class.
    """

    def __init__(
        self,
        folder: Path,
        all_folders: list[Path],
        title: str,
        max_pixels: int = images.MAX_PIXELS,
    ) -> None:
        self._max_pixels = max_pixels
        self._folder = folder
        self._title = title
        found = {e.name for place in all_folders for e in os.scandir(place) if _has_images(e)}
        self.class_names = sorted(found)
        self._names = [_image_names(folder / name) for name in self.class_names]
        counts = [len(names) for names in self._names]
        self._begins = np.cumsum([0, *counts])
        self.labels = np.repeat(np.arange(len(counts)), counts)

    def path(self, row: int) -> Path:
        """Return a row's file."""
        label = int(self.labels[row])
        name = os.fsdecode(bytes(self._names[label][row - int(self._begins[label])]))
        return self._folder / self.class_names[label] / name

    def encoded(self, row: int) -> bytes:
        """Return a row's encoded image."""
        return self.path(row).read_bytes()

    def image(self, row: int) -> Tensor:
        """Return a row's image, uint8 RGB (3, H, W). Raises UndecodableImage."""
        return images.decode_image(self.path(row), self.item(row), max_pixels=self._max_pixels)

    def item(self, row: int) -> str:
        """Return what an error message calls a row, with its file."""
        return f"{self._title} row {row} ({self.path(row)})"


def _image_names(folder: Path) -> np.ndarray:
    """Return the names of a folder's images, bytes of the longest one's length, sorted."""
    if not folder.is_dir():
        return np.array([], dtype="S1")
    return np.array(sorted(_names(folder)) or [], dtype="S")


def _has_images(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and any(True for _ in _names(Path(entry.path)))


def _names(folder: Path) -> Iterator[bytes]:
    suffixes = Image.registered_extensions()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                raise ValueError(
                    f"{entry.path} is a folder in the folder of a class. Streaming reads "
                    "<class>/<image> alone: move its images up, or set streaming: false."
                )
            if Path(entry.name).suffix.lower() in suffixes:
                yield os.fsencode(entry.name)
