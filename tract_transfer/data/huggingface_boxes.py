"""Detection datasets of Hugging Face: a column of images, and one of objects in them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tract_transfer.data.detection import (
    UNKNOWN_SIZE,
    DetectionDataset,
    ObjectRow,
    annotated_size,
    flatten,
    is_numbers,
    label_map,
    object_row,
    stored_size,
    unknown_class,
)
from tract_transfer.data.findings import Box, Findings, Size
from tract_transfer.data.huggingface import (
    RowImages,
    find_image_column,
    folders_of,
    open_rows,
    origin_of,
)
from tract_transfer.data.images import MAX_PIXELS
from tract_transfer.registry import did_you_mean

BOX_FORMATS = ("xywh", "xyxy", "cxcywh")
# What the hub's datasets call the fields of their objects.
_FIELDS = {
    "boxes": ("bbox", "bboxes", "box", "boxes"),
    "classes": ("category", "categories", "category_id", "label", "labels", "class"),
    "difficult": ("difficult", "is_difficult", "ignore"),
    "crowd": ("iscrowd", "is_crowd", "crowd"),
    "area": ("area",),
}


class _Columns(NamedTuple):
    """Where a row has what."""

    objects: str
    field_of: dict[str, str]  # boxes, classes, ... -> the field's own name
    class_names: list[str] | None  # of a ClassLabel


def load_huggingface_boxes(
    path: str,
    split: str,
    box_format: str,
    *,
    box_unit: str = "pixel",
    classes: Sequence[str] | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    objects_column: str | None = None,
    key: str = "data.train",
    findings: Findings | None = None,
    max_pixels: int = MAX_PIXELS,
) -> DetectionDataset:
    """Load one split of a detection dataset with Hugging Face `datasets`.

    Args:
        path, split, config_name, revision: as for `classification.load_huggingface`.
        box_format: `xywh` (COCO), `xyxy` or `cxcywh` (YOLO).
        box_unit: `pixel`, or `relative` to the width and height of the image.
        classes: the class names in label order. Needed where the classes are not of the feature
            ClassLabel: integers then index it, strings must be among it.
        image_column: needed where the feature `Image` does not tell.
        objects_column: needed where several columns hold boxes. It is a list of structs or a struct
            of lists, with `bbox` and `category`, and maybe `difficult`, `iscrowd` and `area`.
        key: the config section that error messages point to.
        findings: what becomes of wrong annotations; by default the first is raised.
        max_pixels: an image of more cannot be decoded.

    Columns `height` and `width` are the annotated size where they exist. Images are turned as their
    EXIF orientation says, which is how `datasets` shows them, but for those that have the annotated
    size only as stored. A column `image_id` must not repeat.

    Raises:
        FileNotFoundError: the path does not exist, or the hub does not answer.
        ValueError: the split, a column or an object does not fit.
    """
    if box_format not in BOX_FORMATS or box_unit not in ("pixel", "relative"):
        raise ValueError(f"{key}: no box_format {box_format!r} or box_unit {box_unit!r}.")
    findings = Findings() if findings is None else findings
    rows = open_rows(path, split, config_name, revision, key)
    title = f"{path} split {split}"
    if len(rows) == 0:
        raise ValueError(f"{title} has no rows. Set {key}.split to a split that has some.")
    column = find_image_column(rows, image_column, key)
    source = RowImages(rows, column, title, folders_of(path), max_pixels)
    columns = _find_columns(rows.features, objects_column, key)
    names = _names(columns, classes, key)
    own_names = columns.class_names or names
    reader = _Reader(columns, own_names, label_map(names, key), key, findings, box_format, box_unit)
    kept, sizes, objects = _read_rows(rows, source, reader)
    dataset = DetectionDataset(
        path, names, source, sizes, flatten(objects), kept, max_pixels, upright=True
    )
    dataset.origin = origin_of(rows, path, split)
    return dataset


def _read_rows(
    rows: Any, source: RowImages, reader: "_Reader"
) -> tuple[NDArray[np.int64], list[Size], list[list[ObjectRow]]]:
    """Return the numbers of the rows that are used, their image sizes and their objects."""
    kept: list[int] = []
    sizes: list[Size] = []
    objects: list[list[ObjectRow]] = []
    for number, cell, size in _rows_once(rows, reader.columns.objects, source, reader.findings):
        kept.append(number)
        sizes.append(size)
        objects.append(list(reader.read(cell, source.item(number), size)))
    return np.array(kept, dtype=np.int64), sizes, objects


def _rows_once(
    rows: Any, objects: str, source: RowImages, findings: Findings
) -> Iterator[tuple[int, Any, Size]]:
    """Yield (number, cell of the column `objects`, image size) of each row, an image_id once."""
    first_with: dict[Any, int] = {}
    wanted = {objects, "image_id", "height", "width"} & set(rows.features)
    for number, row in enumerate(rows.select_columns(sorted(wanted))):
        image_id = row.get("image_id")
        if image_id is not None and (other := first_with.setdefault(image_id, number)) != number:
            message = f"{source.item(number)} repeats image_id {image_id!r} of row {other}."
            findings.wrong(ValueError(f"{message} Take one out."))
            continue
        size = annotated_size(row) or stored_size(source.stored(number), exif=True)
        yield number, row[objects], size


def _names(columns: _Columns, classes: Sequence[str] | None, key: str) -> list[str]:
    names = columns.class_names if classes is None else list(classes)
    if names is None:
        raise ValueError(
            f"{key}.classes is needed, the class names in label order: "
            f"{columns.objects}.{columns.field_of['classes']} is no ClassLabel."
        )
    return names


@dataclass
class _Reader:
    """What turns a row's objects into ours; `own_names` are those of the column's integers."""

    columns: _Columns
    own_names: Sequence[str]
    label_of: Mapping[str, int]
    key: str
    findings: Findings
    box_format: str
    box_unit: str

    def read(self, cell: Any, item: str, size: Size) -> Iterator[ObjectRow]:
        """Yield the objects of one row, whose image is of `size` (height, width)."""
        try:
            things = _things(cell, self.columns, item)
        except ValueError as error:
            self.findings.wrong(error)
            return
        if size == UNKNOWN_SIZE:
            return
        unit = size if self.box_unit == "relative" else (1, 1)
        for count, thing in enumerate(things, start=1):
            name = _class_name(thing["classes"], self.own_names)
            place = f"{item} object {count} ({name})"
            written = thing["boxes"]
            if name not in self.label_of:
                self.findings.wrong(unknown_class(place, name, self.label_of, self.key))
            elif not is_numbers(written):
                message = f"{place}: the box must be four numbers, not {written!r}"
                self.findings.invalid_box(message)
            else:
                numbers = f"{self.box_format} {written}"
                corners = _to_xyxy(written, self.box_format, unit)
                box = self.findings.box(corners, size, place, numbers)
                if box is not None:
                    yield object_row(
                        box,
                        self.label_of[name],
                        difficult=bool(thing.get("difficult")),
                        crowd=bool(thing.get("crowd")),
                        area=thing.get("area") if unit == (1, 1) else None,
                    )


def _find_columns(features: Mapping[str, Any], column: str | None, key: str) -> _Columns:
    """Find the column of objects, and what its fields are called."""
    found: dict[str, _Columns] = {}
    for name, feature in features.items():
        fields = getattr(feature, "feature", feature)  # of a list of structs
        fields = fields if isinstance(fields, dict) else {}
        field_of = {
            what: next((field for field in candidates if field in fields), None)
            for what, candidates in _FIELDS.items()
        }
        if field_of["boxes"] and field_of["classes"]:
            of_class = fields[field_of["classes"]]
            while not hasattr(of_class, "names") and hasattr(of_class, "feature"):
                of_class = of_class.feature
            own = {what: field for what, field in field_of.items() if field is not None}
            found[name] = _Columns(name, own, getattr(of_class, "names", None))
    if column is None and len(found) == 1:
        return next(iter(found.values()))
    if column not in found:
        listed = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
        given = "" if column is None else f" {column!r} is none.{did_you_mean(column, found)}"
        raise ValueError(
            f"One column must hold objects with bbox and category, and {len(found)} do.{given} Set "
            f"{key}.objects_column. Columns: {listed}."
        )
    return found[column]


def _things(cell: Any, columns: _Columns, item: str) -> list[dict[str, Any]]:
    """Return the objects of a row, each a mapping from boxes, classes, ... to its values."""
    if not isinstance(cell, dict):
        own = columns.field_of.items()
        return [{name: thing.get(field) for name, field in own} for thing in cell or []]
    found = {name: cell.get(field) for name, field in columns.field_of.items()}
    lists: dict[str, Any] = {name: values for name, values in found.items() if values is not None}
    counts = {columns.field_of[name]: len(values) for name, values in lists.items()}
    if len(set(counts.values())) > 1 or ("boxes" in lists) != ("classes" in lists):
        raise ValueError(f"{item}: the fields of its objects differ in length: {counts}.")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _class_name(value: Any, names: Sequence[str]) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return names[value]
    return str(value)


def _to_xyxy(written: Sequence[float], box_format: str, unit: Size) -> Box:
    """Return a box in pixels; `unit` is the (height, width) that 1 stands for."""
    a, b, c, d = map(float, written)
    corners = {
        "xyxy": (a, b, c, d),
        "xywh": (a, b, a + c, b + d),
        "cxcywh": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
    }[box_format]
    height, width = unit
    return corners[0] * width, corners[1] * height, corners[2] * width, corners[3] * height
