"""Labels of Hugging Face rows: which classes a column has, and which of its cells are none."""

# N rows, K classes

from collections.abc import Mapping
from typing import Any

import numpy as np

from tract_transfer.data.findings import Findings

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
