"""Classification datasets: Hugging Face rows (memory-mapped) and arrays, behind one class."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from tract_transfer.data import images
from tract_transfer.data.findings import Findings
from tract_transfer.data.huggingface import (
    RowImages,
    folders_of,
    open_rows,
    origin_of,
)
from tract_transfer.data.huggingface_columns import find_image_column, find_label_column
from tract_transfer.data.known_splits import Origin
from tract_transfer.data.labels import check_labels, is_integer, read_labels, shown_classes


class ImageSource(Protocol):
    """Where a dataset's images lie; rows are those of the source, before any selection."""

    def encoded(self, row: int) -> bytes:
        """Return the stored bytes of a row's image."""

    def image(self, row: int) -> Tensor:
        """Return a row's image, uint8 RGB (3, H, W)."""

    def item(self, row: int) -> str:
        """Return what an error message calls the row."""


class ClassificationDataset:
    """Images and their classes.

    `labels` is int64 (N,), in 0..K-1 for the K `class_names`. Images are decoded at each access:
    memory does not grow with their number, unless `cache_images` is called.
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        labels: np.ndarray,
        source: ImageSource,
        rows: np.ndarray | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.name = name
        self.origin = origin or Origin()
        self.class_names = list(class_names)
        self.labels = np.asarray(labels, dtype=np.int64)
        self._source = source
        self._rows = np.arange(len(self.labels)) if rows is None else rows
        self._cache: list[Tensor | None] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 RGB (3, H, W). Raises UndecodableImage."""
        cached = self._cache[index] if self._cache is not None else None
        return self._source.image(int(self._rows[index])) if cached is None else cached

    def target(self, index: int) -> int:
        """Return an image's class, in 0..K-1."""
        return int(self.labels[index])

    def item(self, index: int) -> str:
        """Return what an error message calls an image, as `cifar10 split train row 17`."""
        return self._source.item(int(self._rows[index]))

    def encoded(self, index: int) -> bytes:
        """Return an image's stored bytes."""
        return self._source.encoded(int(self._rows[index]))

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of length, class names, labels and 64 images' stored bytes."""
        return images.fingerprint(self.class_names, [self.labels], self.encoded, len(self))

    def select(self, indices: Sequence[int] | np.ndarray, name: str) -> "ClassificationDataset":
        """Return the dataset of these images, in this order; all classes stay."""
        picked = np.asarray(indices, dtype=np.int64)
        chosen = ClassificationDataset(
            name,
            self.class_names,
            self.labels[picked],
            self._source,
            self._rows[picked],
            self.origin,
        )
        if self._cache is not None:
            chosen._cache = [self._cache[index] for index in picked]
        return chosen

    def cache_images(self) -> None:
        """Decode every image once into RAM; one that cannot be decoded raises at its access."""
        self._cache = images.decode_all(self.image, len(self))


def load_huggingface(
    path: str,
    split: str,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    key: str = "data.train",
    findings: Findings | None = None,
    max_pixels: int = images.MAX_PIXELS,
) -> ClassificationDataset:
    """Load one split of an image classification dataset with Hugging Face `datasets`.

    Args:
        path: a folder written by `save_to_disk`, a parquet file or a folder of them
            (`train.parquet`, `train-00000-of-00003.parquet`), a folder of images
            (`<class>/x.png` or `<split>/<class>/x.png`), or a hub id. What starts with `.`, `/`
            or `~`, or exists, is local and never asked of the hub.
        split: a split's name, or a slice of it such as `train[:10%]`. A single parquet file or
            image folder is the split it is named after, and else `train`.
        config_name: which of a hub dataset's configurations.
        revision: branch, tag or commit of a hub id.
        image_column, label_column: needed where the features `Image` and `ClassLabel` do not tell.
            A named label column may hold integers: the classes are then called "0", "1", ... up
            to the largest (see `labels.join_integer_classes`); or booleans: "False", "True".
        key: the config section that error messages point to.
        findings: what becomes of rows with a wrong label; by default the first is raised.
        max_pixels: an image of more cannot be decoded.

    Raises:
        FileNotFoundError: the path does not exist, or the hub does not answer.
        ValueError: the split, a column or a label does not fit.
    """
    rows = open_rows(path, split, config_name, revision, key)
    image_column = find_image_column(rows, image_column, key)
    label_column = find_label_column(rows, label_column, key)
    title = f"{path} split {split}"
    labels, class_names = read_labels(rows, label_column, title, key)
    kept = check_labels(labels, class_names, label_column, title, key, findings or Findings())
    label_key = f"{key}.label_column" if is_integer(rows, label_column) else None
    origin = origin_of(rows, path, split)._replace(label_key=label_key)
    source = RowImages(rows, image_column, title, folders_of(path), max_pixels)
    return ClassificationDataset(path, class_names, labels[kept], source, kept, origin)


def check_same_classes(datasets: Mapping[str, Any]) -> list[str]:
    """Check that all splits mean the same by every label, and return what looks odd.

    Names and order of the classes must be equal: an image folder that lacks one class shifts the
    labels of all that follow, which no later number would show. Where they are equal, a class
    without examples (as in a subset of a dataset) shifts nothing and is only worth a warning.

    Args:
        datasets: the datasets by split, `{"train": ..., "val": ...}`; the first is the reference.
            Each has `class_names`, and `labels` (of images or of objects) or, as a stream, the
            counts that it knows.

    Returns:
        Warnings, such as `test has no example of 13 of 102 classes: a, b, ...`.

    Raises:
        ValueError: two splits differ in names or order of their classes.
    """
    reference = next(iter(datasets))
    expected = datasets[reference].class_names
    warnings = []
    for split, dataset in datasets.items():
        names = dataset.class_names
        if names != expected:
            raise ValueError(_class_difference(reference, expected, split, names))
        shown = shown_classes(dataset)
        absent = [] if shown is None else [names[k] for k in range(len(names)) if k not in shown]
        if absent:
            listed = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
            warnings.append(
                f"{split} has no example of {len(absent)} of {len(names)} classes: {listed}"
            )
    return warnings + _never_trained(datasets)


def _class_difference(reference: str, expected: list[str], split: str, names: list[str]) -> str:
    for lacking, having, other in (
        (split, set(expected) - set(names), reference),
        (reference, set(names) - set(expected), split),
    ):
        if having:
            listed = ", ".join(sorted(having)[:5])
            return (
                f"All splits must have the same classes: {lacking} lacks {len(having)} that "
                f"{other} has ({listed}), which shifts its labels. Add them to {lacking} (in an "
                "image folder, an empty folder does not count), or load both from one dataset."
            )
    at = next(k for k in range(len(names)) if names[k] != expected[k])
    return (
        f"All splits must have the same classes in the same order: class {at} is {expected[at]!r} "
        f"in {reference} and {names[at]!r} in {split}."
    )


def _never_trained(datasets: Mapping[str, Any]) -> list[str]:
    if "train" not in datasets:
        return []
    names = datasets["train"].class_names
    seen = shown_classes(datasets["train"])
    warnings = []
    for split, dataset in datasets.items():
        shown = shown_classes(dataset)
        if seen is None or shown is None:
            continue
        unseen = [names[k] for k in sorted(shown - seen)]
        if unseen:
            listed = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
            warnings.append(
                f"{split} has examples of {len(unseen)} classes that train never shows: {listed}"
            )
    return warnings


def carve(
    dataset: ClassificationDataset, fraction: float, seed: int
) -> tuple[ClassificationDataset, ClassificationDataset]:
    """Split off a stratified part, as a validation set where there is none.

    Of each class `round(fraction * count)` images are carved, but at least one where the class
    has two, and never all: the parts are disjoint, complete and a function of the arguments.

    Returns:
        (the rest, the carved part), each in the dataset's order.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}.")
    generator = np.random.default_rng(seed)
    carved = np.zeros(len(dataset), dtype=bool)
    for label in range(len(dataset.class_names)):
        members = np.flatnonzero(dataset.labels == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        carved[generator.permutation(members)[: max(count, 0)]] = True
    if not carved.any():
        raise ValueError(f"{dataset.name}: nothing to carve, no class has two images.")
    return (
        dataset.select(np.flatnonzero(~carved), f"{dataset.name} without {fraction:g}"),
        dataset.select(np.flatnonzero(carved), f"{dataset.name} carved {fraction:g}"),
    )
