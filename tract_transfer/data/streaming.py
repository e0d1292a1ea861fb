"""Classification data that are read from beginning to end, and never kept."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tract_transfer.data import images
from tract_transfer.data.known_splits import Origin
from tract_transfer.data.row_groups import Row, RowGroups
from tract_transfer.data.sampling import Sample


class StreamedSample(NamedTuple):
    """A sample with its image, still encoded, and its class."""

    sample: Sample
    row: Row


@dataclass
class Stream:
    """Images and their classes in groups of rows.

    Images have numbers, those of their rows; one is read by opening its group, so that only their
    order is fast. Memory does not grow with their number.

    Attributes:
        title: what error messages call the split.
        label_key: the config key of its labels.
        version: what fixes the data on the hub; None for local ones.
        class_counts: how many images each class has, int64 (K,); None of the hub's data, where all
            of them would have to be fetched.
        max_pixels: an image of more cannot be decoded.

    Raises:
        ValueError: a label is none of the classes.
    """

    name: str
    class_names: Sequence[str]
    groups: RowGroups
    title: str
    label_key: str
    origin: Origin
    version: str | None = None
    max_pixels: int = images.MAX_PIXELS

    def __post_init__(self) -> None:
        self._begins = np.cumsum([0, *self.groups.counts])
        self._ahead: tuple[int, Iterator[Row]] = (-1, iter(()))
        self._last: tuple[int, Row] = (-1, Row(b"", -1))
        self.class_counts = None if self.version is not None else self._count_classes()

    def __len__(self) -> int:
        return int(self._begins[-1])

    def read(self, group: int, first: int = 0) -> Iterator[tuple[int, Row]]:
        """Read a group from its row `first` on: numbers of images and rows.

        Raises:
            ValueError: a label is none of the classes.
        """
        begin = int(self._begins[group])
        for index, row in enumerate(self.groups.rows(group, first), begin + first):
            self._check_label(index, row.label)
            yield index, row

    def read_from(self, index: int) -> Iterator[tuple[int, Row]]:
        """Read all images from a number on, in order."""
        group = int(np.searchsorted(self._begins, index, side="right")) - 1
        first = index - int(self._begins[group])
        for number in range(group, len(self.groups.counts)):
            yield from self.read(number, first)
            first = 0

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 RGB (3, H, W). Raises UndecodableImage."""
        return images.decode_image(
            self._row(index).stored, self.item(index), max_pixels=self.max_pixels
        )

    def target(self, index: int) -> int:
        """Return an image's class, in 0..K-1."""
        return self._row(index).label

    def encoded(self, index: int) -> bytes:
        """Return an image's stored bytes."""
        return images.read_stored(self._row(index).stored)

    def item(self, index: int) -> str:
        """Return what an error message calls an image, as `cifar10 split train row 17`."""
        return f"{self.title} row {index}"

    def fingerprint(self) -> str:
        """Return a sha256 (hex): of local data that of `ClassificationDataset`, of the hub's that
        of their version, as all labels would have to be fetched."""
        if self.version is not None:
            about = [self.version, len(self), list(self.class_names)]
            return hashlib.sha256(json.dumps(about).encode()).hexdigest()
        return images.fingerprint(
            self.class_names, [np.concatenate(list(self.groups.labels()))], self.encoded, len(self)
        )

    def _count_classes(self) -> np.ndarray:
        num_classes, begin = len(self.class_names), 0
        counts = np.zeros(num_classes, dtype=np.int64)
        for labels in self.groups.labels():
            wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
            if len(wrong):
                self._check_label(begin + int(wrong[0]), int(labels[wrong[0]]))
            counts += np.bincount(labels, minlength=num_classes)
            begin += len(labels)
        return counts

    def _row(self, index: int) -> Row:
        if self._last[0] != index:
            expected, ahead = self._ahead
            ahead = ahead if expected == index else (row for _, row in self.read_from(index))
            (row,) = islice(ahead, 1)
            self._last, self._ahead = (index, row), (index + 1, ahead)
        return self._last[1]

    def _check_label(self, index: int, label: int) -> None:
        if not 0 <= label < len(self.class_names):
            hint = " -1 marks an unlabelled split: set" if label == -1 else " Correct it, or set"
            raise ValueError(
                f"{self.item(index)}: label {label} must be in 0..{len(self.class_names) - 1}."
                f"{hint} {self.label_key} or the split to another."
            )
