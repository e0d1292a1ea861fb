"""Classification data that are read from beginning to end, and never kept."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tract_transfer.data import images
from tract_transfer.data.findings import Origin
from tract_transfer.data.sampling import Sample, check_divides, mix

# --- Rows that are read in groups, one after another: parquet files, local or on the hub, and s

_FOOTERS_AT_ONCE = 16
_ROWS_AT_ONCE = 64
_BUFFER_BYTES = 1 << 22
_ROWS_OF_SAVED_GROUP = 100  # as `datasets` writes images to parquet


class Row(NamedTuple):
    """An encoded image, or the file it lies in, and its label, -1 where there is none."""

    stored: bytes | Path
    label: int


class RowGroups(Protocol):
    """Where rows lie. `counts` are the rows of each group, int64 (G,)."""

    counts: np.ndarray

    def rows(self, group: int, first: int = 0) -> Iterator[Row]:
        """Read a group from its row `first` on."""

    def labels(self) -> Iterator[np.ndarray]:
        """Read all labels in order, int64, without the images."""


class ParquetGroups:
    """The row groups of parquet files, which are read a few rows at a time.

    Args:
        files: paths or URLs of any file system that fsspec knows, such as `hf://`.
        image_column, label_column: structs of `bytes` and `path`, and whole numbers.
    """

    def __init__(self, files: Sequence[str], image_column: str, label_column: str) -> None:
        self._files = list(files)
        self._columns = (image_column, label_column)
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            of_files = list(pool.map(_group_sizes, self._files))
        self.counts = np.array([size for sizes in of_files for size in sizes], dtype=np.int64)
        groups = [len(sizes) for sizes in of_files]
        self._file_of = np.repeat(np.arange(len(files)), groups)
        self._first_of_file = np.cumsum([0, *groups])[:-1]

    def rows(self, group: int, first: int = 0) -> Iterator[Row]:
        """Read a group from its row `first` on; the file's pages before it are read too."""
        file = int(self._file_of[group])
        number = group - int(self._first_of_file[file])
        for batch in _batches(self._files[file], list(self._columns), [number]):
            skipped = min(first, len(batch))
            first -= skipped
            yield from _rows_of_group(batch.slice(skipped), *self._columns)

    def labels(self) -> Iterator[np.ndarray]:
        """Read all labels in order, int64, without the images."""
        for file in self._files:
            for batch in _batches(file, [self._columns[1]], None):
                yield _labels(batch.column(self._columns[1]))


class SavedGroups:
    """Rows of a `datasets.Dataset`, memory-mapped, in groups of 100."""

    def __init__(self, dataset: Any, image_column: str, label_column: str) -> None:
        self._columns = (image_column, label_column)
        self._table = dataset.select_columns(list(self._columns)).with_format("arrow")
        starts = np.arange(0, len(dataset) + 1, _ROWS_OF_SAVED_GROUP)
        self.counts = np.diff(np.unique([*starts, len(dataset)])).astype(np.int64)

    def rows(self, group: int, first: int = 0) -> Iterator[Row]:
        """Read a group from its row `first` on."""
        begin = group * _ROWS_OF_SAVED_GROUP
        stop = begin + int(self.counts[group])
        for start in range(begin + first, stop, _ROWS_AT_ONCE):
            yield from _rows_of_group(
                self._table[start : min(start + _ROWS_AT_ONCE, stop)], *self._columns
            )

    def labels(self) -> Iterator[np.ndarray]:
        """Read all labels in order, int64, without the images."""
        yield _labels(self._table.select_columns([self._columns[1]])[:][self._columns[1]])


def parquet_schema(file: str) -> Any:
    """Return the Arrow schema in a parquet file's footer. Raises ValueError: it is cut short."""
    return _footer(file).schema.to_arrow_schema()


def _footer(file: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(file) as stream:
            return pq.read_metadata(stream)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is no whole parquet file: {error} Copy it anew.") from error


def _group_sizes(file: str) -> list[int]:
    footer = _footer(file)
    return [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]


def _open(file: str) -> Any:
    import fsspec

    return fsspec.open(file, "rb").open()


def _batches(file: str, columns: list[str], groups: list[int] | None) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with _open(file) as stream:
        parquet = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        yield from parquet.iter_batches(
            _ROWS_AT_ONCE, row_groups=groups, columns=columns, use_threads=False
        )


def _rows_of_group(table: Any, image_column: str, label_column: str) -> Iterator[Row]:
    cells = table.column(image_column).to_pylist()
    for cell, label in zip(cells, _labels(table.column(label_column)).tolist(), strict=True):
        if cell is None:
            yield Row(b"", label)
        else:
            yield Row(Path(cell["path"]) if cell["bytes"] is None else cell["bytes"], label)


def _labels(column: Any) -> np.ndarray:
    return np.asarray(column.cast("int64").fill_null(-1), dtype=np.int64)


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


# --- Which rows of a stream an iteration sees: a function of the seed and the iteration alone.

DEFAULT_READERS = 8
DEFAULT_SHUFFLE_ROWS = 2048


class Span(NamedTuple):
    """`length` rows of a group, from its row `first` on."""

    group: int
    first: int
    length: int


class StreamOrder:
    """The batches of every epoch of a stream.

    An epoch shows every row once; what does not fill a batch at its end is dropped: the rows of
    other groups in every epoch.

    Args:
        counts: int64 (G,), the rows of each group.
        batch_size: B, the rows of an optimizer step over all processes.
        shuffle_rows: how many rows are in the shuffle buffer, over all processes; whole batches of
            them, but at least one. None is 2048.
        readers: Q, which divides B; None is the largest common divisor of 8 and B. The batches
            depend on it, and not on the number of processes, which divides it.

    Raises:
        ValueError: a batch is larger than the data, or no multiple of the readers.
    """

    def __init__(
        self,
        counts: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        shuffle_rows: int | None = None,
        readers: int | None = None,
    ) -> None:
        num_rows = int(counts.sum())
        if not 1 <= batch_size <= num_rows:
            raise ValueError(
                f"data.batch_size must lie in 1..{num_rows}, the number of training images, got "
                f"{batch_size}. Set data.batch_size to {num_rows} or less."
            )
        self.readers = readers or math.gcd(DEFAULT_READERS, batch_size)
        if batch_size % self.readers:
            nearest = max(batch_size // self.readers, 1) * self.readers
            raise ValueError(
                f"data.readers must divide data.batch_size, and {self.readers} does not divide "
                f"{batch_size}. Set data.batch_size to {nearest}, or another data.readers."
            )
        self.batch_size = batch_size
        self.iters_per_epoch = num_rows // batch_size
        self.share = batch_size // self.readers  # rows of a batch from each reader
        self.block_iters = max(1, (shuffle_rows or DEFAULT_SHUFFLE_ROWS) // batch_size)
        self._counts = counts
        self._seed = seed

    def iters_of_block(self, block: int) -> int:
        """Return the iterations of a block of an epoch, of which the last may have fewer."""
        return min(self.block_iters, self.iters_per_epoch - block * self.block_iters)

    def spans(self, epoch: int, reader: int, block: int) -> list[Span]:
        """Return what a reader reads from a block on to the end of its stretch, in this order."""
        stretch = self.iters_per_epoch * self.share
        start = reader * stretch + block * self.block_iters * self.share
        stop = (reader + 1) * stretch
        order = self._permutation(len(self._counts), epoch).numpy()
        ends = np.cumsum(self._counts[order])
        spans = []
        for place in range(int(np.searchsorted(ends, start, side="right")), len(order)):
            begin = int(ends[place] - self._counts[order[place]])
            first, last = max(start, begin), min(stop, int(ends[place]))
            if first >= stop:
                break
            if last == first:
                continue
            spans.append(Span(int(order[place]), first - begin, last - first))
        return spans

    def places(self, epoch: int, reader: int, block: int) -> Tensor:
        """Return which of a reader's rows of a block each of its iterations takes, (iters, B/Q)."""
        iters = self.iters_of_block(block)
        return self._permutation(iters * self.share, epoch, block, reader).view(iters, self.share)

    def mixed(self, count: int, epoch: int, iteration: int) -> list[int]:
        """Return the order of `count` rows that one process has of a batch: neighbours in it, which
        mixup mixes, are not neighbours in the stream."""
        order: list[int] = self._permutation(count, epoch, iteration, -1, -1).tolist()
        return order

    def _permutation(self, count: int, *parts: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(self._seed, *parts))
        return torch.randperm(count, generator=generator)


# --- A process's batches of a stream: what it reads, and in which order it gives it away.

Numbered = tuple[int, Row]


class StreamBatches:
    """The endless sequence of one process's micro-batches of a stream.

    A process owns as many readers as others, and reads one block ahead. The sequence from
    `start_iter` is the tail of the one from 0; of the block that it begins in, all is read.

    Raises:
        ValueError: the batch does not divide among processes and micro-batches, or the readers
            among processes.
    """

    def __init__(
        self,
        stream: Stream,
        order: StreamOrder,
        start_iter: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        assert start_iter >= 0
        check_divides(order.batch_size, world_size, accumulate)
        if order.readers % world_size:
            raise ValueError(
                f"data.readers must be a multiple of the number of processes, {world_size}, got "
                f"{order.readers}. Set data.readers to {world_size}, or to a multiple of it that "
                "divides data.batch_size."
            )
        self._stream = stream
        self._order = order
        self._start_iter = start_iter
        own = order.readers // world_size
        self._readers = range(rank * own, (rank + 1) * own)
        self._micro_size = order.batch_size // world_size // accumulate

    def __iter__(self) -> Iterator[list[StreamedSample]]:
        order = self._order
        first_epoch, position = divmod(self._start_iter, order.iters_per_epoch)
        first_block, done = divmod(position, order.block_iters)
        for epoch, block, rows in self._blocks(first_epoch, first_block):
            places = [order.places(epoch, reader, block) for reader in self._readers]
            for iteration in range(done, order.iters_of_block(block)):
                batch = [
                    StreamedSample(Sample(epoch, own[place][0]), own[place][1])
                    for own, taken in zip(rows, places, strict=True)
                    for place in taken[iteration].tolist()
                ]
                at = block * order.block_iters + iteration
                mixed = [batch[place] for place in order.mixed(len(batch), epoch, at)]
                for start in range(0, len(mixed), self._micro_size):
                    yield mixed[start : start + self._micro_size]
            done = 0
            rows.clear()  # before the next but one is read

    def _blocks(self, epoch: int, block: int) -> Iterator[tuple[int, int, list[list[Numbered]]]]:
        """Yield each block's epoch, number, and the rows of every reader."""
        order = self._order
        num_blocks = -(-order.iters_per_epoch // order.block_iters)
        with ThreadPoolExecutor(len(self._readers), "stream") as pool:
            ahead = None
            while True:
                streams = [
                    _rows(self._stream, order.spans(epoch, reader, block))
                    for reader in self._readers
                ]
                for number in range(block, num_blocks):
                    count = order.iters_of_block(number) * order.share
                    reading = [pool.submit(_take, rows, count) for rows in streams]
                    if ahead is not None:
                        yield ahead
                    ahead = epoch, number, [future.result() for future in reading]
                epoch, block = epoch + 1, 0


class StreamEvalBatches:
    """One pass over a process's share of a stream, in order, each image once."""

    def __init__(self, stream: Stream, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size
        self._stream = stream
        self._batch_size = batch_size
        self._first = rank * len(stream) // world_size
        self._count = (rank + 1) * len(stream) // world_size - self._first

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    def __iter__(self) -> Iterator[list[StreamedSample]]:
        rows = islice(self._stream.read_from(self._first), self._count)
        samples = (StreamedSample(Sample(0, index), row) for index, row in rows)
        while batch := list(islice(samples, self._batch_size)):
            yield batch


def _rows(stream: Stream, spans: list[Span]) -> Iterator[Numbered]:
    for span in spans:
        yield from islice(stream.read(span.group, span.first), span.length)


def _take(rows: Iterator[Numbered], count: int) -> list[Numbered]:
    taken = list(islice(rows, count))
    assert len(taken) == count, "a group of rows holds fewer than its footer says"
    return taken
