"""Data sets read by Hugging Face `datasets`: from the hub, parquet, saved rows or image folders."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tract_transfer.data.classification import RENUMBER, ClassificationDataset
from tract_transfer.data.detection import (
    BoxReader,
    DetectionDataset,
    annotated_size,
    four_numbers,
    stored_size,
)
from tract_transfer.data.findings import (
    Box,
    Findings,
    Origin,
    Size,
    check_size,
    is_below,
    split_names,
)
from tract_transfer.data.images import MAX_PIXELS, ImageSource, decode_image
from tract_transfer.registry import did_you_mean

SPLIT_NAMES = ("train", "validation", "val", "valid", "test")
_MAX_CLASSES = 1_000_000
# Names of the fields of objects in data sets on the hub.
_FIELDS = {
    "boxes": ("bbox", "bboxes", "box", "boxes"),
    "classes": ("category", "categories", "category_id", "label", "labels", "class"),
    "difficult": ("difficult", "is_difficult", "ignore"),
    "crowd": ("iscrowd", "is_crowd", "crowd"),
    "area": ("area",),
}


class Location(NamedTuple):
    """Where a split is: arguments of `load_huggingface`."""

    path: str
    split: str
    config_name: str | None
    revision: str | None
    key: str

    @property
    def title(self) -> str:
        """The split's name in messages."""
        return f"{self.path} split {self.split}"

    def item(self, row: int) -> str:
        """Return a row's name in messages, as `cifar10 split train row 17`."""
        return f"{self.title} row {row}"

    @property
    def is_hub(self) -> bool:
        """Whether the path neither looks local nor exists, and so is a hub id."""
        return not (self.path.startswith((".", "/", "~")) or Path(self.path).exists())

    def folder(self) -> Path:
        """Return the path of local data; refuse a missing one, and options of the hub."""
        folder = Path(self.path).expanduser()
        if not folder.exists():
            raise FileNotFoundError(f"{folder.absolute()} does not exist. Set {self.key}.path.")
        if self.revision is not None or self.config_name is not None:
            raise ValueError(
                f"{self.path} is local and has neither revisions nor configurations. Remove "
                f"{self.key}.revision and {self.key}.config_name."
            )
        return folder

    def check_split(self, splits: Sequence[str]) -> list[str]:
        """Return the names in the split; refuse one that is not in `splits`."""
        for name in (names := split_names(self.split)):
            if name not in splits:
                raise ValueError(
                    f"{self.path} has no split {name!r}.{did_you_mean(name, splits)} "
                    f"Set {self.key}.split to one of {list(splits)}."
                )
        return names

    def origin(self, declared: str | None, count: int, label_key: str | None = None) -> Origin:
        """Return the origin of `count` rows; `declared` is the data set's name for itself."""
        size_check = check_size(self.path, declared, self.is_hub, self.split, count)
        return Origin(self.path if self.is_hub else None, size_check, label_key)


def image_folders(at: Location) -> list[Path]:
    """Return the folders that image files may lie in: the data set's, or the caches of the hub."""
    if at.is_hub:
        from datasets import config
        from huggingface_hub.constants import HF_HUB_CACHE

        caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
        return [Path(cache) for cache in caches]
    path = Path(at.path).expanduser()
    return [path if path.is_dir() else path.parent]


def stored_image(
    cell: Mapping[str, Any] | None, folders: Sequence[Path], item: str
) -> bytes | Path:
    """Return a cell's encoded image, or its file. Raises ValueError: it is in none of `folders`."""
    data, path = (cell["bytes"], cell["path"]) if cell else (None, None)
    if data is not None or path is None:
        return bytes(data or b"")
    if not any(is_below(folder, Path(path).absolute()) for folder in folders):
        raise ValueError(
            f"{item} is the file {path}, which is not below {' or '.join(map(str, folders))}: data "
            "must not read other files. Save the dataset with its images in it (save_to_disk)."
        )
    return Path(path)


class RowImages(ImageSource):
    """One image column of rows, kept encoded and memory-mapped.

    An image file must be in one of `image_folders`.
    """

    def __init__(self, rows: Any, column: str, at: Location, max_pixels: int) -> None:
        import datasets

        super().__init__(max_pixels)
        undecoded = rows.select_columns([column])
        self._rows = undecoded.cast_column(column, datasets.Image(decode=False))
        self._column = column
        self._at = at
        self._folders = image_folders(at)

    def stored(self, row: int) -> bytes | Path:
        """Return a row's encoded image, or its file. Raises ValueError: it is in another folder."""
        return stored_image(self._rows[row][self._column], self._folders, self.item(row))

    def image(self, row: int, exif: bool = True) -> Tensor:
        """Return a row's image, uint8 RGB (3, H, W). Raises UndecodableImage."""
        stored, item = self.stored(row), self.item(row)
        item = f"{item} ({stored})" if isinstance(stored, Path) else item
        return decode_image(stored, item, exif, self._max_pixels)

    def item(self, row: int) -> str:
        """Return a row's name in messages, as `cifar10 split train row 17`."""
        return self._at.item(row)


# Opening rows.


def open_rows(at: Location) -> Any:
    """Return the `datasets.Dataset` of a split. Raises ValueError: it has no rows."""
    import datasets

    if at.is_hub:
        where = {"split": at.split, "revision": at.revision}
        with hub_errors(at):
            rows = datasets.load_dataset(at.path, at.config_name, **where)
    elif is_saved(folder := at.folder()):
        rows = open_saved(at)
    elif folder.is_file() or parquet_files(folder):
        rows = _open_files(at, "parquet", split_files(at))
    else:
        splits = [name for name in SPLIT_NAMES if (folder / name).is_dir()]
        folders = {name: folder / name for name in splits} or {own_split(folder): folder}
        at.check_split(list(folders))
        # All splits at once, so that the classes are those of their union.
        rows = _open_files(at, "imagefolder", {k: str(v / "**") for k, v in folders.items()})
    if len(rows) == 0:
        raise ValueError(f"{at.title} has no rows. Set {at.key}.split to a split that has some.")
    return rows


@contextmanager
def hub_errors(at: Location) -> Iterator[None]:
    """Turn the errors of the hub into the three of `load_huggingface`, and say how to fix them."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (OSError, HfHubHTTPError, HFValidationError, ValueError, RuntimeError) as error:
        kind: type[Exception] = ValueError
        if isinstance(error, ConnectionError | TimeoutError):
            kind = ConnectionError
        elif isinstance(error, OSError | HfHubHTTPError | HFValidationError):
            kind = FileNotFoundError
        raise kind(
            f"The hub dataset {at.path!r} with {at.key}.split: {at.split} did not load "
            f"({type(error).__name__}: {_first_line(error)}). Check the name, {at.key}.config_name "
            "and the connection; or save a copy on a machine that has one, for a loading script "
            f"with an older version of datasets: load_dataset({at.path!r}).save_to_disk('./copy'), "
            f"and set {at.key}.path: ./copy. A local path starts with . or / or ~."
        ) from error


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def open_saved(at: Location) -> Any:
    """Return the `datasets.Dataset` of a split that `save_to_disk` wrote."""
    import datasets

    folder = at.folder()
    try:
        saved = datasets.load_from_disk(str(folder))
    except IndexError as error:  # a split was saved without rows
        raise ValueError(
            f"{folder} has a split without rows. Save it again, or set {at.key}.path."
        ) from error
    if not isinstance(saved, datasets.DatasetDict):
        saved = datasets.DatasetDict({str(saved.split or own_split(folder)): saved})
    at.check_split(list(saved))
    try:
        slices = datasets.ReadInstruction.from_spec(at.split).to_absolute(saved.num_rows)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{at.key}.split: {at.split} is no slice of {folder}: {error}") from error
    parts = [saved[part.splitname].select(range(part.from_, part.to)) for part in slices]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def parquet_files(folder: Path) -> list[Path]:
    """Return a folder's parquet files, or those in its folder `data`."""
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def split_files(at: Location) -> dict[str, list[str]]:
    """Return the parquet files of each split that `at.split` names; refuse an incomplete copy."""
    path, groups = at.folder(), dict[str, list[str]]()
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is neither a parquet file nor a folder. Set {at.key}.path.")
        groups[own_split(path)] = [str(path)]
    for file in [] if path.is_file() else parquet_files(path):
        name, _, total = re.fullmatch(r"(.+?)(-\d+-of-(\d+))?", file.stem).groups()  # type: ignore[union-attr]
        groups.setdefault(name, []).append(str(file))
        count = len(list(file.parent.glob(f"{name}-*-of-{total}.parquet")))
        if total is not None and count != int(total):
            raise ValueError(
                f"{file.parent} must hold all {int(total)} files of split {name!r}, but has "
                f"{count}. Complete the copy."
            )
    return {name: groups[name] for name in at.check_split(list(groups))}


def own_split(path: Path) -> str:
    """Return the split that a path is named after, or train: one path is never two splits."""
    return path.stem if path.stem in SPLIT_NAMES else "train"


def _open_files(at: Location, kind: str, data_files: Mapping[str, Any]) -> Any:
    import datasets

    try:
        return datasets.load_dataset(kind, data_files=dict(data_files), split=at.split)
    except (OSError, ValueError, AssertionError, datasets.exceptions.DatasetGenerationError) as e:
        layout = " as a folder of images, <class>/x.png or <split>/<class>/x.png"
        raise ValueError(
            f"{at.path} with {at.key}.split: {at.split} did not load"
            f"{layout if kind == 'imagefolder' else ''}: {_first_line(e.__cause__ or e)}. "
            f"Set {at.key}.path."
        ) from e


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# Columns of images and labels.


def find_image_column(features: Mapping[str, Any], column: str | None, key: str) -> str:
    """Return the image column: the named one, or the only one with the feature `Image`."""
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    content = "images (the feature Image: see cast_column)"
    return _pick_column(features, column, images, content, f"{key}.image_column")


def find_label_column(features: Mapping[str, Any], column: str | None, key: str) -> str:
    """Return the label column: the named one, or the only one with the feature `ClassLabel`."""
    import datasets

    usable = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    content = "a ClassLabel"
    if column is not None:
        types = {name: str(getattr(kind, "dtype", kind)) for name, kind in features.items()}
        usable += [name for name, kind in types.items() if re.fullmatch(r"u?int\d+|bool", kind)]
        content += ", integers or booleans (see class_encode_column, for all splits together)"
    return _pick_column(features, column, usable, content, f"{key}.label_column")


def _pick_column(
    features: Mapping[str, Any], column: str | None, usable: Collection[str], content: str, key: str
) -> str:
    """Return the named column, or else the only usable one; `content` is what these hold."""
    if column is None and len(usable) == 1:
        return next(iter(usable))
    if column is None:
        problem = f"set it, as {len(usable)} columns hold {content}."
    elif column in usable:
        return column
    else:
        problem = f"{column!r} must hold {content}.{did_you_mean(column, usable)}"
    types = {name: type(kind).__name__ for name, kind in features.items()}
    types |= {name: features[name].dtype for name, kind in types.items() if kind == "Value"}
    listed = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    raise ValueError(f"{key}: {problem} Columns: {listed}.")


def named_classes(feature: Any, column: str, at: Location) -> list[str] | None:
    """Return the class names of a label column, or None for integers. Refuse a single class."""
    import datasets

    if not isinstance(feature, datasets.ClassLabel):
        return ["False", "True"] if feature.dtype == "bool" else None
    if len(feature.names) < 2:
        raise ValueError(
            f"{at.title}: column {column!r} has one class, {feature.names}, and classification "
            f"needs two. Set {at.key}.label_column to another column, or {at.key}.path to other "
            "data."
        )
    return list(feature.names)


def as_labels(column: Any) -> np.ndarray:
    """Return int64 (N,) of an Arrow column; null is -1, unlabelled."""
    return np.asarray(column.cast("int64").fill_null(-1), dtype=np.int64)


def usable_rows(
    labels: np.ndarray, num_classes: int, column: str, at: Location, findings: Findings
) -> np.ndarray:
    """Return the rows whose label is one of the classes; the others are reported."""
    is_wrong = (labels < 0) | (labels >= num_classes)
    for row in np.flatnonzero(is_wrong).tolist():
        findings.report(wrong_label(row, int(labels[row]), num_classes, column, at))
    return np.flatnonzero(~is_wrong)


def wrong_label(row: int, label: int, num_classes: int, column: str, at: Location) -> ValueError:
    """Return the error for a label that is not one of the classes."""
    hint = " -1 marks an unlabelled split: set" if label == -1 else " Correct it, or set"
    return ValueError(
        f"{at.item(row)}: label {label} in column {column!r} must be in 0..{num_classes - 1}."
        f"{hint} {at.key}.split to another."
    )


# Loading a split.


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
    max_pixels: int = MAX_PIXELS,
) -> ClassificationDataset:
    """Load one split of an image classification data set.

    Args:
        path: a folder written by `save_to_disk`, a parquet file or a folder of them
            (`train.parquet`, `train-00000-of-00003.parquet`), a folder of images
            (`<class>/x.png` or `<split>/<class>/x.png`), or a hub id. A path that starts with `.`,
            `/` or `~`, or exists, is local: the hub is never asked.
        split: a split's name, or a slice such as `train[:10%]`. A single parquet file or image
            folder is the split it is named after, or else `train`.
        revision: branch, tag or commit of a hub id.
        image_column, label_column: needed unless exactly one column has the feature `Image` or
            `ClassLabel`. A named label column may hold integers, whose classes are "0", "1", ...
            up to the largest (see `join_integer_classes`), or booleans: "False", "True".
        key: the config section that errors name.
        findings: what happens to rows with a wrong label; by default the first is raised.
        max_pixels: larger images are not decoded.

    Raises:
        FileNotFoundError: the path does not exist, or the hub has no such data set.
        ConnectionError: the hub does not answer.
        ValueError: the split, a column or a label does not fit.
    """
    at = Location(path, split, config_name, revision, key)
    rows = open_rows(at)
    image_column = find_image_column(rows.features, image_column, key)
    column = find_label_column(rows.features, label_column, key)
    cells = rows.select_columns([column]).with_format("arrow")[:][column]
    labels = as_labels(cells)
    names = named_classes(rows.features[column], column, at)
    label_key = f"{key}.label_column" if names is None else None
    if names is None:
        if (largest := int(labels.max())) >= _MAX_CLASSES:
            raise ValueError(
                f"{key}.label_column: its integers reach {largest}, so they are no class numbers. "
                f"{RENUMBER}"
            )
        names = [str(label) for label in range(largest + 1)]
    source = RowImages(rows, image_column, at, max_pixels)
    kept = usable_rows(labels, len(names), column, at, findings or Findings())
    origin = at.origin(rows.info.dataset_name, len(rows), label_key)
    return ClassificationDataset(path, names, labels[kept], source, kept, origin)


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
    """Load one split of a detection data set.

    Args:
        box_format: `xywh` (COCO), `xyxy` or `cxcywh` (YOLO).
        box_unit: `pixel`, or `relative` to the width and height of the image.
        classes: the class names in label order. Needed if the classes have no feature ClassLabel:
            integers then index it, strings must be in it.
        objects_column: needed if several columns hold boxes. It is a list of structs or a struct
            of lists, with `bbox` and `category`, and optionally `difficult`, `iscrowd` and `area`.

    The columns `height` and `width`, if there are any, are the annotated size. The EXIF orientation
    of images is applied, as `datasets` does, except for images that have the annotated size only as
    stored. A column `image_id` must not repeat. Other arguments and errors are those of
    `load_huggingface`.
    """
    at = Location(path, split, config_name, revision, key)
    rows = open_rows(at)
    image_column = find_image_column(rows.features, image_column, key)
    source = RowImages(rows, image_column, at, max_pixels)
    column = _find_objects(rows.features, objects_column, key)
    names = column.class_names if classes is None else list(classes)
    if names is None:
        raise ValueError(
            f"{key}.classes is needed, the class names in label order: "
            f"{column.name}.{column.fields['classes']} is no ClassLabel."
        )
    reader = BoxReader(names, key, findings or Findings())
    kept = _read_rows(rows, source, column, reader, box_format, box_unit)
    origin = at.origin(rows.info.dataset_name, len(rows))
    arrays = reader.arrays()
    return DetectionDataset(path, names, source, *arrays, kept, upright=True, origin=origin)


def _read_rows(
    rows: Any, source: RowImages, column: "ObjectsColumn", reader: BoxReader, form: str, unit: str
) -> list[int]:
    """Add the images and objects of all rows; return the rows, each image_id once."""
    kept: list[int] = []
    first_with: dict[Any, int] = {}
    columns = {column.name, "image_id", "height", "width"} & set(rows.features)
    for number, row in enumerate(rows.select_columns(sorted(columns))):
        item, image_id = source.item(number), row.get("image_id")
        with reader.findings.reporting():
            first = number if image_id is None else first_with.setdefault(image_id, number)
            if first != number:
                raise ValueError(
                    f"{item} repeats image_id {image_id!r} of row {first}. Remove one."
                )
            size = annotated_size(row.get("height"), row.get("width"))
            size = size or stored_size(source.stored(number), exif=True)
            kept.append(number)
            image = reader.add_image(size)
            for count, entry in enumerate(_entries(row[column.name], column, item), start=1):
                name, names = entry["classes"], column.class_names or reader.class_names
                name = names[name] if type(name) is int and 0 <= name < len(names) else str(name)
                reader.add_object(
                    image,
                    f"{item} object {count} ({name})",
                    name,
                    _to_xyxy(entry["boxes"], form, size if unit == "relative" else (1, 1)),
                    f"{form} {entry['boxes']}",
                    difficult=bool(entry.get("difficult")),
                    crowd=bool(entry.get("crowd")),
                    area=entry.get("area") if unit == "pixel" else None,
                )
    return kept


class ObjectsColumn(NamedTuple):
    name: str
    fields: dict[str, str]  # boxes, classes, ... -> the field's name in the data
    class_names: list[str] | None  # of a ClassLabel


def objects_columns(features: Mapping[str, Any]) -> dict[str, ObjectsColumn]:
    """Return the columns that hold objects, by name, with the names of their fields."""
    columns: dict[str, ObjectsColumn] = {}
    for column, feature in features.items():
        struct = getattr(feature, "feature", feature)  # of a list of structs
        struct = struct if isinstance(struct, dict) else {}
        fields = {
            what: next(field for field in candidates if field in struct)
            for what, candidates in _FIELDS.items()
            if not struct.keys().isdisjoint(candidates)
        }
        if "boxes" in fields and "classes" in fields:
            classes = struct[fields["classes"]]
            while not hasattr(classes, "names") and hasattr(classes, "feature"):
                classes = classes.feature
            columns[column] = ObjectsColumn(column, fields, getattr(classes, "names", None))
    return columns


def _find_objects(features: Mapping[str, Any], name: str | None, key: str) -> ObjectsColumn:
    """Return the named column of objects, or the only one."""
    columns, content = objects_columns(features), "objects with bbox and category"
    return columns[_pick_column(features, name, columns, content, f"{key}.objects_column")]


def _entries(cell: Any, column: ObjectsColumn, item: str) -> list[dict[str, Any]]:
    """Return the objects of a row, each a mapping from boxes, classes, ... to its values."""
    fields = column.fields
    if not isinstance(cell, dict):
        return [{what: entry.get(fields[what]) for what in fields} for entry in cell or []]
    lists = {what: cell[fields[what]] for what in fields if cell.get(fields[what]) is not None}
    counts = {fields[what]: len(values) for what, values in lists.items()}
    if len(set(counts.values())) > 1 or ("boxes" in lists) != ("classes" in lists):
        raise ValueError(f"{item}: the fields of its objects differ in length: {counts}.")
    rows = zip(*lists.values(), strict=True)
    return [dict(zip(lists, values, strict=True)) for values in rows]


def _to_xyxy(written: Any, box_format: str, unit: Size) -> Box:
    """Return a box in pixels; `unit` is the (height, width) that 1 stands for."""
    a, b, c, d = four_numbers(written)
    x1, y1, x2, y2 = {
        "xyxy": (a, b, c, d),
        "xywh": (a, b, a + c, b + d),
        "cxcywh": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
    }[box_format]
    height, width = unit
    return x1 * width, y1 * height, x2 * width, y2 * height
