"""Classification datasets: Hugging Face rows (memory-mapped) and arrays, behind one class."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from tract_transfer.data import images
from tract_transfer.data.findings import Findings, Origin
from tract_transfer.data.huggingface import (
    RowImages,
    find_image_column,
    find_label_column,
    folders_of,
    open_rows,
    origin_of,
)

# --- Labels of Hugging Face rows: which classes a column has, and which of its cells are none.

_MAX_CLASSES = 1_000_000
_RENUMBER = (
    "Number them 0, 1, ... with class_encode_column on all splits together, and save_to_disk."
)


def read_labels(rows: Any, column: str, title: str, key: str) -> tuple[np.ndarray, list[str]]:
    """Return int64 (N,) labels, -1 where a row has none, and the class names of a column.

    Raises:
        ValueError: no rows, one class, or integers that are no class numbers.
    """
    import datasets

    if len(rows) == 0:
        raise ValueError(f"{title} has no rows. Set {key}.split to a split that has some.")
    feature = rows.features[column]
    cells = rows.select_columns([column]).with_format("arrow")[:][column]
    # null counts as unlabelled
    labels = np.asarray(cells.cast("int64").fill_null(-1), dtype=np.int64)
    if not isinstance(feature, datasets.ClassLabel):
        names = _integer_names(labels, key) if is_integer(rows, column) else ["False", "True"]
        return labels, names
    if len(feature.names) < 2:
        raise ValueError(
            f"{title}: column {column!r} has one class, {feature.names}, and telling classes apart "
            f"needs two. Set {key}.label_column to another column, or {key}.path to other data."
        )
    return labels, list(feature.names)


def is_integer(rows: Any, column: str) -> bool:
    """Whether the labels are integers without names."""
    import datasets

    feature = rows.features[column]
    return not isinstance(feature, datasets.ClassLabel) and feature.dtype != "bool"


def _integer_names(labels: np.ndarray, key: str) -> list[str]:
    largest = int(max(labels))
    if largest >= _MAX_CLASSES:
        raise ValueError(
            f"{key}.label_column: its integers reach {largest}, so they are no class numbers. "
            f"{_RENUMBER}"
        )
    return [str(label) for label in range(largest + 1)]


def check_labels(
    labels: np.ndarray,
    class_names: list[str],
    column: str,
    title: str,
    key: str,
    findings: Findings,
) -> np.ndarray:
    """Return the rows whose label is one of the classes; what is found wrong are the others."""
    is_wrong = (labels < 0) | (labels >= len(class_names))
    for row in np.flatnonzero(is_wrong).tolist():
        hint = " -1 marks an unlabelled split: set" if labels[row] == -1 else " Correct it, or set"
        message = (
            f"{title} row {row}: label {labels[row]} in column {column!r} must be in "
            f"0..{len(class_names) - 1} ({is_wrong.sum()} such rows).{hint} {key}.split to another."
        )
        findings.wrong(ValueError(message))
    return np.flatnonzero(~is_wrong)


def shown_classes(dataset: Any) -> set[int] | None:
    """Return the classes of which a split has an image; None where only reading it would tell."""
    if hasattr(dataset, "class_counts"):  # a stream's
        counts = dataset.class_counts
        return None if counts is None else set(np.flatnonzero(counts).tolist())
    return set(dataset.labels.tolist())


def join_integer_classes(datasets: Mapping[str, Any]) -> None:
    """Give all splits whose labels are integers without names the classes of all of them.

    The K classes are "0", "1", ... up to the largest label in any split, so that none depends on
    which images a split happens to hold. A class that no split shows stays: labels are never
    renumbered, and `check_same_classes` names it.

    Args:
        datasets: the datasets by split; those of other kinds stay as they are.

    Raises:
        ValueError: all images are of one class, or most of the classes have no image in any split,
            as with ids that are no class numbers.
    """
    own = [dataset for dataset in datasets.values() if dataset.origin.label_key is not None]
    if not own:
        return
    key, num_classes = own[0].origin.label_key, max(len(d.class_names) for d in own)
    of_splits = [shown_classes(dataset) for dataset in own]
    is_known = None not in of_splits
    shown = sorted(set().union(*(found for found in of_splits if found is not None)))
    if is_known and len(shown) < 2:
        raise ValueError(
            f"{key}: all splits together show one class, {shown}, and telling classes apart needs "
            "two. Set it to another column."
        )
    if is_known and 2 * len(shown) < num_classes:
        raise ValueError(
            f"{key}: its integers show {len(shown)} classes between {shown[0]} and {shown[-1]}, so "
            f"{num_classes - len(shown)} of {num_classes} would have no image. {_RENUMBER}"
        )
    for dataset in own:
        dataset.class_names = [str(label) for label in range(num_classes)]


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


def hold_out(
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
        raise ValueError(f"{dataset.name}: nothing to hold_out, no class has two images.")
    return (
        dataset.select(np.flatnonzero(~carved), f"{dataset.name} without {fraction:g}"),
        dataset.select(np.flatnonzero(carved), f"{dataset.name} carved {fraction:g}"),
    )
