"""Which columns of Hugging Face data hold images and labels: those named, or of that type."""

import re
from typing import Any

from tract_transfer.registry import did_you_mean


def find_image_column(rows: Any, column: str | None, key: str) -> str:
    """Return the image column: the named one, or the only one with feature `Image`."""
    import datasets

    column = _find(rows, column, datasets.Image, f"{key}.image_column")
    if not isinstance(rows.features[column], datasets.Image):
        raise ValueError(
            f"{key}.image_column: {column!r} must have the feature Image, not "
            f"{rows.features[column]}. Convert it with cast_column({column!r}, datasets.Image()) "
            "and save_to_disk."
        )
    return column


def find_label_column(rows: Any, column: str | None, key: str) -> str:
    """Return the label column: the named one, or the only one with feature `ClassLabel`."""
    import datasets

    column = _find(rows, column, datasets.ClassLabel, f"{key}.label_column")
    feature = rows.features[column]
    dtype = str(getattr(feature, "dtype", feature))
    if not isinstance(feature, datasets.ClassLabel) and not re.fullmatch(r"u?int\d+|bool", dtype):
        raise ValueError(
            f"{key}.label_column: {column!r} must hold integers, booleans or a ClassLabel, not "
            f"{dtype}. "
            f"Convert it with class_encode_column({column!r}) on all splits together, and "
            "save_to_disk."
        )
    return column


def _find(rows: Any, column: str | None, feature: type, key: str) -> str:
    listed = ", ".join(f"{name} ({_type(kind)})" for name, kind in rows.features.items())
    if column is not None:
        if column not in rows.features:
            hint = did_you_mean(column, rows.features)
            raise ValueError(f"{key}: no column {column!r}.{hint} Columns: {listed}.")
        return column
    found: list[str] = [name for name, kind in rows.features.items() if isinstance(kind, feature)]
    if len(found) != 1:
        raise ValueError(
            f"One column must have the feature {feature.__name__}, but {len(found)} have: set "
            f"{key}. Columns: {listed}."
        )
    return found[0]


def _type(feature: Any) -> str:
    plain = type(feature).__name__
    return str(feature.dtype) if plain == "Value" else plain
