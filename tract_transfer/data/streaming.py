"""Classification data that are read in order and never kept: rows, their order, and batches.

The order is a function of the seed and the iteration alone. The shuffle of `datasets`' own streams
cannot be used: its buffer is lost on resume, and its order depends on the number of workers.
"""

# G groups of rows, B rows a batch, Q readers, K classes

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tract_transfer.data import images
from tract_transfer.data.classification import ClassificationDataset
from tract_transfer.data.findings import Findings, Origin
from tract_transfer.data.huggingface import (
    Location,
    as_labels,
    find_image_column,
    find_label_column,
    hub_errors,
    image_folders,
    is_saved,
    load_huggingface,
    named_classes,
    open_saved,
    parquet_files,
    split_files,
    stored_image,
    usable_rows,
    wrong_label,
)
from tract_transfer.data.images import MAX_PIXELS
from tract_transfer.data.sampling import Sample, check_batch_size, check_divides, mix

DEFAULT_READERS = 8
DEFAULT_SHUFFLE_ROWS = 2048
_FOOTERS_AT_ONCE = 16
_ROWS_AT_ONCE = 64
_BUFFER_BYTES = 1 << 22
_ROWS_OF_SAVED_GROUP = 100  # as `datasets` writes images to parquet

Cell = dict[str, Any] | None  # an image: its `bytes`, or the `path` of its file
Columns = tuple[str, str]  # of images and of labels

# Rows in groups, read one after another.


class ParquetGroups:
    """The row groups of parquet files, which are paths or URLs that fsspec knows (`hf://`).

    `counts` are the rows of each group, int64 (G,); `features` are those of `datasets`, by column.
    """

    dataset_name = None

    def __init__(self, files: Sequence[str], features: Any = None) -> None:
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            footers = list(pool.map(_footer, files))
        self.features = features or _features(files, footers)
        self.files = files
        self._groups = [
            (file, number)
            for file, footer in zip(files, footers, strict=True)
            for number in range(footer.num_row_groups)
        ]
        counts = [f.row_group(n).num_rows for f in footers for n in range(f.num_row_groups)]
        self.counts = np.array(counts, dtype=np.int64)

    def rows(self, columns: Columns, group: int, first: int = 0) -> Iterator[tuple[Cell, int]]:
        """Read images and labels of a group from its row `first`, and the file's pages before."""
        file, number = self._groups[group]
        for batch in _batches(file, columns, [number]):
            skipped = min(first, len(batch))
            first -= skipped
            yield from _rows_of_table(batch.slice(skipped), *columns)

    def labels(self, column: str) -> np.ndarray:
        """Read all labels in order, int64, without the images."""
        batches = (batch for file in self.files for batch in _batches(file, [column], None))
        return np.concatenate([as_labels(batch.column(column)) for batch in batches])


class SavedGroups:
    """The rows of a memory-mapped `datasets.Dataset`, in groups of 100."""

    def __init__(self, dataset: Any) -> None:
        self.features, self.dataset_name = dataset.features, dataset.info.dataset_name
        self._table = dataset.with_format("arrow")
        starts = np.arange(0, len(dataset) + 1, _ROWS_OF_SAVED_GROUP)
        self.counts = np.diff(np.unique([*starts, len(dataset)])).astype(np.int64)

    def rows(self, columns: Columns, group: int, first: int = 0) -> Iterator[tuple[Cell, int]]:
        """Read images and labels of a group from its row `first`."""
        table, begin = self._table.select_columns(list(columns)), group * _ROWS_OF_SAVED_GROUP
        stop = begin + int(self.counts[group])
        for start in range(begin + first, stop, _ROWS_AT_ONCE):
            part = table[start : min(start + _ROWS_AT_ONCE, stop)]
            yield from _rows_of_table(part, *columns)

    def labels(self, column: str) -> np.ndarray:
        """Read all labels in order, int64, without the images."""
        return as_labels(self._table.select_columns([column])[:][column])


def _open(file: str) -> Any:
    import fsspec

    return fsspec.open(file, "rb").open()


def _footer(file: str) -> Any:
    """Return the metadata of a parquet file. Raises ValueError: the file is truncated."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(file) as stream:
            return pq.read_metadata(stream)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is no complete parquet file: {error} Copy it again.") from error


def _batches(file: str, columns: Sequence[str], groups: list[int] | None) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with _open(file) as stream:
        parquet = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        yield from parquet.iter_batches(
            _ROWS_AT_ONCE, row_groups=groups, columns=list(columns), use_threads=False
        )


def _rows_of_table(table: Any, images: str, labels: str) -> Iterator[tuple[Cell, int]]:
    cells = table.column(images).to_pylist()
    return zip(cells, as_labels(table.column(labels)).tolist(), strict=True)


# A stream: a data set whose images are fast to read only in order.


class Row(NamedTuple):
    """An encoded image, or its file, its class, its name in messages and the limit of its size."""

    stored: bytes | Path
    label: int
    item: str
    max_pixels: int

    def image(self) -> Tensor:
        """Return the image, uint8 RGB (3, H, W). Raises UndecodableImage."""
        return images.decode_image(self.stored, self.item, max_pixels=self.max_pixels)


@dataclass
class Stream:
    """Images and their classes in groups of rows; the index of an image is the number of its row.

    Reading an image opens its group, so only reading in order is fast.

    Attributes:
        columns: those of the images and of the labels.
        class_counts: the number of images of each class, int64 (K,); None for data on the hub,
            whose labels would all have to be downloaded.
    """

    at: Location
    class_names: Sequence[str]
    groups: ParquetGroups | SavedGroups
    columns: Columns
    origin: Origin
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        self.name = self.at.path
        self._folders = image_folders(self.at)
        self._begins = np.cumsum([0, *self.groups.counts])
        self._ahead: Iterator[tuple[int, Row]] = iter(())
        self._last = (-2, Row(b"", -1, "", 0))  # of no image
        self.class_counts: np.ndarray | None = None
        if not self.at.is_hub:
            column, num_classes = self.columns[1], len(self.class_names)
            self._labels = self.groups.labels(column)
            usable_rows(self._labels, num_classes, column, self.at, Findings())
            self.class_counts = np.bincount(self._labels, minlength=num_classes)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def read(self, group: int, first: int = 0) -> Iterator[tuple[int, Row]]:
        """Read a group from its row `first`: indices of images, and rows, which are checked."""
        begin, num_classes = int(self._begins[group]) + first, len(self.class_names)
        for index, (cell, label) in enumerate(self.groups.rows(self.columns, group, first), begin):
            if not 0 <= label < num_classes:
                raise wrong_label(index, label, num_classes, self.columns[1], self.at)
            item = self.item(index)
            stored = stored_image(cell, self._folders, item)
            yield index, Row(stored, label, item, self.max_pixels)

    def read_from(self, index: int) -> Iterator[tuple[int, Row]]:
        """Read all images from an index, in order."""
        group = int(np.searchsorted(self._begins, index, side="right")) - 1
        first = index - int(self._begins[group])
        for number in range(group, len(self.groups.counts)):
            yield from self.read(number, first)
            first = 0

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 RGB (3, H, W). Raises UndecodableImage."""
        return self._row(index).image()

    def target(self, index: int) -> int:
        """Return an image's class, in 0..K-1."""
        return self._row(index).label

    def encoded(self, index: int) -> bytes:
        """Return an image's stored bytes."""
        return images.read_stored(self._row(index).stored)

    def item(self, index: int) -> str:
        """Return an image's name in messages, as `cifar10 split train row 17`."""
        return self.at.item(index)

    def fingerprint(self) -> str:
        """Return a sha256 (hex): of local data as `ClassificationDataset`, else of the URLs."""
        if isinstance(self.groups, ParquetGroups) and self.at.is_hub:
            about = ["\n".join(self.groups.files), len(self), list(self.class_names)]
            return hashlib.sha256(json.dumps(about).encode()).hexdigest()
        return images.fingerprint(self, self._labels)

    def _row(self, index: int) -> Row:
        if index != self._last[0]:
            if index != self._last[0] + 1:
                self._ahead = self.read_from(index)
            self._last = next(self._ahead)
        return self._last[1]


# Opening a stream.


def stream_huggingface(
    path: str,
    split: str,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    key: str = "data.train",
    max_pixels: int = MAX_PIXELS,
) -> Stream | ClassificationDataset:
    """Open one split of an image classification data set without loading it.

    Of parquet and saved rows, only the sizes of the groups and, if they are local, the labels are
    read. An image folder, whose files are only listed, is loaded by `load_huggingface`, whose
    arguments and errors these are. Parquet cannot be sliced, and data sets of the hub must be
    parquet. Integer labels without names, "0", "1", ..., need `num_classes`.
    """
    at = Location(path, split, config_name, revision, key)
    groups = _open_groups(at)
    if groups is None:
        if num_classes is not None:
            raise ValueError(
                f"{key}.num_classes: the folders of {path} are its classes. Remove it."
            )
        return load_huggingface(path, split, key=key, max_pixels=max_pixels)
    features = groups.features
    image_column = find_image_column(features, image_column, key)
    column = find_label_column(features, label_column, key)
    names = named_classes(features[column], column, at)
    label_key = f"{key}.label_column" if names is None else None
    if names is not None and num_classes is not None:
        raise ValueError(f"{key}.num_classes: {column!r} has its own classes. Remove it.")
    if names is None:
        if num_classes is None:
            raise ValueError(
                f"{key}.num_classes: {column!r} holds integers without names, and only reading all "
                "of them would show how many classes there are: set their number."
            )
        names = [str(label) for label in range(num_classes)]
    count = int(groups.counts.sum())
    if count == 0:
        raise ValueError(f"{at.title} has no rows. Set {key}.split to a split that has some.")
    origin = at.origin(groups.dataset_name, count, label_key)
    return Stream(at, names, groups, (image_column, column), origin, max_pixels)


def _open_groups(at: Location) -> ParquetGroups | SavedGroups | None:
    """Return saved rows or parquet files; None for an image folder."""
    if not at.is_hub and is_saved(at.folder()):
        return SavedGroups(open_saved(at))
    if not at.is_hub and not at.folder().is_file() and not parquet_files(at.folder()):
        return None
    if "[" in at.split:
        raise ValueError(
            f"{at.key}.split: {at.split} is a slice, and streamed files are read completely. Name "
            f"whole splits, or set {at.key}.streaming: false."
        )
    if at.is_hub:
        with hub_errors(at):
            return ParquetGroups(*_hub_files(at))
    return ParquetGroups([file for group in split_files(at).values() for file in group])


def _hub_files(at: Location) -> tuple[list[str], Any]:
    """Return URLs of a split's parquet files, and its features if they are declared."""
    import datasets

    builder = datasets.load_dataset_builder(at.path, at.config_name, revision=at.revision)
    by_split = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    files = [str(file) for name in at.check_split(list(by_split)) for file in by_split[name]]
    others = {Path(file).suffix for file in files} - {".parquet"}
    if others or not files:
        raise ValueError(
            f"Streaming from the hub reads parquet, and the files of {at.path} are "
            f"{', '.join(sorted(others)) or 'none'}. Set {at.key}.streaming: false, or "
            f"{at.key}.path to a copy in parquet."
        )
    return files, builder.info.features


def _features(files: Sequence[str], footers: Sequence[Any]) -> Any:
    """Return the features of parquet files; refuse files that differ."""
    import datasets

    features = [
        datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema()) for footer in footers
    ]
    for file, other in zip(files, features, strict=True):
        if other != features[0]:
            raise ValueError(
                f"All files of a split must have the same columns and classes, and {file} has "
                f"others than {files[0]}. Write them again from one dataset."
            )
    return features[0]


# Which rows an iteration sees.


class Span(NamedTuple):
    """`length` rows of a group, from its row `first`."""

    group: int
    first: int
    length: int


class StreamOrder:
    """The batches of every epoch of a stream.

    An epoch shows every row once. Rows that do not fill its last batch are dropped: those of other
    groups in every epoch. Each reader reads a stretch of the shuffled groups. A block is as many
    iterations as fill the shuffle buffer; in it, the rows of each reader are shuffled.

    Args:
        counts: int64 (G,), the rows of each group.
        batch_size: B, the rows of an optimizer step over all processes.
        shuffle_rows: the size of the shuffle buffer over all processes, rounded down to whole
            batches, at least one. None is 2048.
        readers: Q, which divides B; None is the greatest common divisor of 8 and B. The batches
            depend on it, but not on the number of processes, which must divide it.
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
        check_batch_size(batch_size, num_rows)
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
        """Return the iterations of a block of an epoch; the last block may have fewer."""
        return min(self.block_iters, self.iters_per_epoch - block * self.block_iters)

    def spans(self, epoch: int, reader: int, block: int) -> list[Span]:
        """Return what a reader reads from a block to the end of its stretch, in this order."""
        stretch = self.iters_per_epoch * self.share
        start = reader * stretch + block * self.block_iters * self.share
        stop = (reader + 1) * stretch
        order = self._permutation(len(self._counts), epoch).numpy()
        ends = np.cumsum(self._counts[order])
        begins = ends - self._counts[order]
        first, last = np.maximum(begins, start), np.minimum(ends, stop)
        spans = np.stack([order, first - begins, last - first], axis=1)[first < last]
        return [Span(*span) for span in spans.tolist()]

    def places(self, epoch: int, reader: int, block: int) -> Tensor:
        """Return which of a reader's rows of a block each iteration takes, (iters, B/Q)."""
        iters = self.iters_of_block(block)
        return self._permutation(iters * self.share, epoch, block, reader).view(iters, self.share)

    def mixed(self, count: int, epoch: int, iteration: int) -> list[int]:
        """Return the order of `count` rows of a batch in one process.

        Neighbors in a batch, which mixup mixes, are not neighbors in the stream.
        """
        order: list[int] = self._permutation(count, epoch, iteration, -1, -1).tolist()
        return order

    def _permutation(self, count: int, *parts: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(self._seed, *parts))
        return torch.randperm(count, generator=generator)


# The batches of one process.


class StreamedSample(NamedTuple):
    """A sample with its image, still encoded, and its class."""

    sample: Sample
    row: Row


class StreamBatches:
    """The endless sequence of one process's micro-batches of a stream.

    Each process has the same number of readers, and reads one block ahead. The sequence from
    `start_iter` is the tail of the one from 0: the block that contains it is read completely.
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
        assert 0 <= rank < world_size and start_iter >= 0
        check_divides(order.batch_size, world_size, accumulate)
        if order.readers % world_size:
            raise ValueError(
                f"data.readers must be a multiple of the number of processes, {world_size}, got "
                f"{order.readers}. Set data.readers to {world_size}, or to a multiple of it that "
                "divides data.batch_size."
            )
        self._stream, self._order, self._start_iter = stream, order, start_iter
        per_process = order.readers // world_size
        self._readers = range(rank * per_process, (rank + 1) * per_process)
        self._micro_size = order.batch_size // world_size // accumulate

    def __iter__(self) -> Iterator[list[StreamedSample]]:
        order = self._order
        epoch, position = divmod(self._start_iter, order.iters_per_epoch)
        block, skipped = divmod(position, order.block_iters)
        iteration = self._start_iter - skipped
        readers = [self._read(reader, epoch, block) for reader in self._readers]
        with ThreadPoolExecutor(len(readers), "stream") as pool:
            ahead = [pool.submit(next, reader) for reader in readers]
            while True:
                blocks = [future.result() for future in ahead]
                ahead = [pool.submit(next, reader) for reader in readers]
                for shares in zip(*blocks, strict=True):
                    if iteration >= self._start_iter:
                        yield from self._micro_batches(list(chain.from_iterable(shares)), iteration)
                    iteration += 1

    def _micro_batches(
        self, batch: list[StreamedSample], iteration: int
    ) -> Iterator[list[StreamedSample]]:
        where = divmod(iteration, self._order.iters_per_epoch)
        mixed = [batch[position] for position in self._order.mixed(len(batch), *where)]
        for start in range(0, len(mixed), self._micro_size):
            yield mixed[start : start + self._micro_size]

    def _read(self, reader: int, epoch: int, block: int) -> Iterator[list[list[StreamedSample]]]:
        """Yield a reader's blocks without end: its share of the batch of each iteration."""
        order = self._order
        while True:
            rows = (
                StreamedSample(Sample(epoch, index), row)
                for span in order.spans(epoch, reader, block)
                for index, row in islice(self._stream.read(span.group, span.first), span.length)
            )
            for number in range(block, -(-order.iters_per_epoch // order.block_iters)):
                places = order.places(epoch, reader, number)
                samples = list(islice(rows, places.numel()))
                yield [[samples[place] for place in share] for share in places.tolist()]
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
