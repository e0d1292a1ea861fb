"""Rows that are read in groups, one after another: parquet files, local or on the hub, and saved
Arrow files. Nothing is kept of them but how many rows each group has.
"""

# N rows, G groups

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

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
            yield from _rows(batch.slice(skipped), *self._columns)

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
            yield from _rows(self._table[start : min(start + _ROWS_AT_ONCE, stop)], *self._columns)

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


def _rows(table: Any, image_column: str, label_column: str) -> Iterator[Row]:
    cells = table.column(image_column).to_pylist()
    for cell, label in zip(cells, _labels(table.column(label_column)).tolist(), strict=True):
        if cell is None:
            yield Row(b"", label)
        else:
            yield Row(Path(cell["path"]) if cell["bytes"] is None else cell["bytes"], label)


def _labels(column: Any) -> np.ndarray:
    return np.asarray(column.cast("int64").fill_null(-1), dtype=np.int64)
