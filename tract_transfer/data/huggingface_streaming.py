"""Opening rows to be read in order: parquet on the hub or here, saved rows, image folders."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tract_transfer.data import images
from tract_transfer.data.classification import ClassificationDataset, is_integer
from tract_transfer.data.findings import Origin, check_size
from tract_transfer.data.huggingface import (
    check_split,
    find_image_column,
    find_label_column,
    hub_errors,
    is_hub_id,
    is_saved,
    local_path,
    open_saved,
    parquet_files,
    split_files,
    split_folders,
)
from tract_transfer.data.streaming import (
    ParquetGroups,
    RowGroups,
    SavedGroups,
    Stream,
    parquet_schema,
)

# --- A folder of images read as it is: no index is written, and of an image its name is kept.


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
    max_pixels: int = images.MAX_PIXELS,
) -> Stream | ClassificationDataset:
    """Open one split of an image classification dataset without loading it.

    Of parquet and of saved rows nothing but the sizes of their groups is read, and the labels of
    local ones once. An image folder is a `ClassificationDataset` whose files are listed here.

    Args:
        path, split, config_name, revision, image_column, label_column, key, max_pixels: as of
            `classification.load_huggingface`; no slices but of saved rows, and of the hub's data
            sets those in parquet.
        num_classes: of a label column of integers without names: "0", "1", ...

    Raises:
        FileNotFoundError: the path does not exist, or the hub does not answer.
        ValueError: the split, a column or a label does not fit, or is of a kind that does not
            stream.
    """
    title = f"{path} split {split}"
    opened = _open(path, split, config_name, revision, key)
    if opened is None:
        return _image_folder(path, split, title, key, num_classes, max_pixels)
    rows, files, version = opened
    image_column = find_image_column(rows, image_column, key)
    label_column = find_label_column(rows, label_column, key)
    class_names = _class_names(rows, label_column, title, num_classes, key)
    columns = (image_column, label_column)
    found: RowGroups = ParquetGroups(files, *columns) if files else SavedGroups(rows, *columns)
    count = int(found.counts.sum())
    if count == 0:
        raise ValueError(f"{title} has no rows. Set {key}.split to a split that has some.")
    declared = None if files else rows.info.dataset_name
    origin = Origin(
        path if version is not None else None,
        check_size(path, declared, version is not None, split, count),
        f"{key}.label_column" if is_integer(rows, label_column) else None,
    )
    return Stream(
        path, class_names, found, title, f"{key}.label_column", origin, version, max_pixels
    )


def _open(
    path: str, split: str, config_name: str | None, revision: str | None, key: str
) -> tuple[Any, list[str], str | None] | None:
    """Return saved rows, or the features of parquet files and the files, and the hub's version.

    None where it is an image folder.
    """
    if is_hub_id(path):
        files, features, version = _hub_files(path, split, config_name, revision, key)
        return SimpleNamespace(features=features), files, version
    folder = local_path(path, config_name, revision, key)
    if is_saved(folder):
        return open_saved(folder, split, key), [], None
    if not (folder.is_file() or parquet_files(folder)):
        return None
    _refuse_slice(split, key)
    groups = split_files(folder, split, key)
    files = [str(file) for group in groups.values() for file in group]
    return SimpleNamespace(features=_features(files)), files, None


def _hub_files(
    path: str, split: str, config_name: str | None, revision: str | None, key: str
) -> tuple[list[str], Any, str]:
    """Return URLs of a split's parquet files, its features, and what fixes its version."""
    import datasets

    _refuse_slice(split, key)
    with hub_errors(path, split, key):
        builder = datasets.load_dataset_builder(path, config_name, revision=revision)
    of_splits = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    names = check_split(split, list(of_splits), path, key)
    files = [str(file) for name in names for file in of_splits[name]]
    others = {re.sub(r".*(?=\.)", "", file) for file in files} - {".parquet"}
    if others or not files:
        raise ValueError(
            f"Streaming from the hub reads parquet, and the files of {path} are "
            f"{', '.join(sorted(others)) or 'none'}. Set {key}.streaming: false, or {key}.path to "
            "a copy in parquet."
        )
    with hub_errors(path, split, key):
        features = builder.info.features or _features(files[:1])
    return files, features, "\n".join(files)


def _features(files: list[str]) -> Any:
    """Return the features of parquet files; those of all are the same."""
    import datasets

    first: Any = None
    for file in files:
        features = datasets.Features.from_arrow_schema(parquet_schema(file))
        first = first or features
        if features != first:
            raise ValueError(
                f"All files of a split must have the same columns and classes, and {file} has "
                f"others than {files[0]}. Write them anew from one dataset."
            )
    return first


def _refuse_slice(split: str, key: str) -> None:
    if "[" in split:
        raise ValueError(
            f"{key}.split: {split} is a slice, and files that are streamed are read whole. Name "
            f"whole splits, or set {key}.streaming: false."
        )


def _class_names(
    rows: Any, label_column: str, title: str, num_classes: int | None, key: str
) -> list[str]:
    import datasets

    feature = rows.features[label_column]
    if not is_integer(rows, label_column):
        if num_classes is not None:
            raise ValueError(f"{key}.num_classes: {label_column!r} has its own classes. Remove it.")
        if not isinstance(feature, datasets.ClassLabel):
            return ["False", "True"]
        if len(feature.names) < 2:
            raise ValueError(
                f"{title}: column {label_column!r} has one class, {feature.names}, and telling "
                f"classes apart needs two. Set {key}.label_column to another column."
            )
        return list(feature.names)
    if num_classes is None or num_classes < 2:
        raise ValueError(
            f"{key}.num_classes: {label_column!r} holds integers without names, and only reading "
            f"all of them would tell how many classes there are: 2 or more are needed, got "
            f"{num_classes}."
        )
    return [str(label) for label in range(num_classes)]


def _image_folder(
    path: str, split: str, title: str, key: str, num_classes: int | None, max_pixels: int
) -> ClassificationDataset:
    _refuse_slice(split, key)
    if num_classes is not None:
        raise ValueError(f"{key}.num_classes: the folders of {path} are its classes. Remove it.")
    folders = split_folders(local_path(path, None, None, key))
    (name, *others) = check_split(split, list(folders), path, key)
    if others:
        raise ValueError(f"{key}.split: a streamed image folder is one split, not {split}.")
    source = FolderImages(folders[name], list(folders.values()), title, max_pixels)
    if len(source.labels) == 0 or len(source.class_names) < 2:
        raise ValueError(
            f"{folders[name]} has {len(source.labels)} images in {len(source.class_names)} "
            f"classes, as <class>/<image>; 2 classes are needed. Set {key}.path."
        )
    size_check = check_size(path, None, False, split, len(source.labels))
    return ClassificationDataset(
        path, source.class_names, source.labels, source, origin=Origin(None, size_check)
    )
