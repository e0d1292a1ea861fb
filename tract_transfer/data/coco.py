"""Reading COCO's json: images, annotations and categories."""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tract_transfer.data.detection import (
    UNKNOWN_SIZE,
    DetectionDataset,
    ImageFiles,
    ObjectRow,
    annotated_size,
    flatten,
    is_numbers,
    label_map,
    object_row,
    stored_size,
    unknown_class,
)
from tract_transfer.data.findings import Findings, Origin, Size, check_coco_file, is_below
from tract_transfer.data.images import MAX_PIXELS

Entry = Mapping[str, Any]


def load_coco(
    images: str | Path,
    annotations: str | Path,
    classes: Sequence[str] | None = None,
    *,
    key: str = "data.train",
    findings: Findings | None = None,
    max_pixels: int = MAX_PIXELS,
) -> DetectionDataset:
    """Load a data set of boxes in COCO's format.

    Args:
        images: the folder that the `file_name`s are relative to.
        annotations: the json file. Of an image `id`, `file_name`, `height` and `width` are read;
            of an annotation `id`, `image_id`, `category_id`, `bbox` (x, y, width, height), `area`,
            `iscrowd` and `ignore`. Masks and keypoints are not.
        classes: the category names in label order; by default all, in the order of their ids.
        key: the config section that errors name.
        findings: what happens to wrong annotations; by default the first is raised.
        max_pixels: larger images are not decoded.

    An object with `iscrowd` is a crowd and therefore difficult; one with `ignore` is difficult.

    Raises:
        FileNotFoundError: the json file, the folder or an image is missing.
        ValueError: an entry is wrong; the message names the file and the entry.
    """
    path, folder = Path(annotations).expanduser(), Path(images).expanduser()
    findings = findings or Findings()
    tree = _read(path, key)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of images. Set {key}.images.")
    name_of = _category_names(tree, path, findings)
    names = list(name_of.values()) if classes is None else list(classes)
    if not names and classes is None:
        raise ValueError(f"{path} names no category. Set {key}.annotations to a file with some.")
    label_of = label_map(names, key)
    size_of, row_of = _read_images(tree, path, folder, key, findings)
    files, sizes = list(size_of), list(size_of.values())
    if not files:
        raise ValueError(f"{path} has no image to use. Set {key}.annotations to a file with some.")
    objects: list[list[ObjectRow]] = [[] for _ in files]
    for entry, item in _entries(tree, "annotations", path, findings):
        row, name = row_of.get(_id(entry, "image_id")), name_of.get(_id(entry, "category_id"))
        for field, value, what in (("image_id", row, "image"), ("category_id", name, "category")):
            if value is None:
                message = f"{item}: {field} {entry.get(field)!r} is no {what}'s. Correct it."
                findings.report(ValueError(message))
                break
        if row is None or name is None:
            continue
        if name not in label_of:
            findings.report(unknown_class(f"{item} ({name})", name, label_of, key))
        elif sizes[row] != UNKNOWN_SIZE:
            item = f"{item} ({name})"
            objects[row] += _read_object(entry, item, sizes[row], label_of[name], findings)
    return DetectionDataset(
        f"coco {path.name}",
        names,
        ImageFiles(files, max_pixels),
        sizes,
        flatten(objects),
        origin=Origin(size_check=check_coco_file(path, len(files))),
    )


def _read(path: Path, key: str) -> Entry:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Set {key}.annotations.")
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # of the syntax, the encoding or the depth
        raise ValueError(f"{path} is not a readable json file: {error}. Repair it.") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(tree, dict) or not isinstance(tree.get(name), list):
            raise ValueError(
                f"{path} must have lists of images, annotations and categories, and has no "
                f"{name}. Set {key}.annotations to a COCO file of boxes."
            )
    return dict(tree)


def _entries(
    tree: Entry, name: str, path: Path, findings: Findings
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (entry, its name in messages) of a list; each must be a mapping with a unique id."""
    seen: set[int | str] = set()
    for number, entry in enumerate(tree[name]):
        if not isinstance(entry, dict) or (entry_id := _id(entry, "id")) is None:
            message = f"{path} {name}[{number}] must be a mapping with an id. Correct it."
            findings.report(ValueError(message))
            continue
        item = f"{path} {name}[{number}] id {entry_id}"
        if entry_id in seen:
            findings.report(ValueError(f"{item}: the id is already used. Correct it."))
            continue
        seen.add(entry_id)
        yield entry, item


def _id(entry: Entry, name: str) -> int | str | None:
    """Return the id that an entry names, or None if it is no id."""
    value = entry.get(name)
    return value if isinstance(value, int | str) else None


def _category_names(tree: Entry, path: Path, findings: Findings) -> dict[int | str | None, str]:
    """Return the names of the categories by id, in the order of the ids: integers, then strings."""
    name_of: dict[int | str | None, str] = {}
    for entry, item in _entries(tree, "categories", path, findings):
        name = entry.get("name")
        if not isinstance(name, str) or name in name_of.values():
            message = f"{item}: name {name!r} must be given, and only once. Correct it."
            findings.report(ValueError(message))
            continue
        name_of[entry["id"]] = name
    by_id = sorted(name_of, key=lambda number: (isinstance(number, str), number))
    return {number: name_of[number] for number in by_id}


def _read_images(
    tree: Entry, path: Path, folder: Path, key: str, findings: Findings
) -> tuple[dict[str, Size], dict[int | str | None, int]]:
    """Return the size of each file, and the row of each image id."""
    size_of: dict[str, Size] = {}
    row_of: dict[int | str | None, int] = {}
    for entry, item in _entries(tree, "images", path, findings):
        name = entry.get("file_name")
        if not isinstance(name, str) or not is_below(folder, name):
            message = f"{item}: file_name must be a path below {folder}, not {name!r}. Correct it."
            findings.report(ValueError(message))
        elif str(file := folder / name) in size_of:
            findings.report(ValueError(f"{item}: the file {name} is already used. Correct it."))
        elif not file.is_file():
            message = f"{item}: {file} does not exist. Add it, or set {key}.images."
            findings.report(FileNotFoundError(message))
        else:
            row_of[entry["id"]] = len(size_of)
            size_of[str(file)] = annotated_size(entry) or stored_size(file)
    return size_of, row_of


def _read_object(
    entry: Entry, item: str, size: Size, label: int, findings: Findings
) -> list[ObjectRow]:
    written = entry.get("bbox")
    if not is_numbers(written):
        findings.report_box(f"{item}: bbox must be four numbers, not {reprlib.repr(written)}")
        return []
    x, y, width, height = map(float, written)
    box = findings.check_box((x, y, x + width, y + height), size, item, f"x, y, w, h {written}")
    if box is None:
        return []
    crowd, ignore = (entry.get(name) or 0 for name in ("iscrowd", "ignore"))
    if crowd not in (0, 1) or ignore not in (0, 1):
        findings.report(ValueError(f"{item}: iscrowd and ignore must be 0 or 1. Correct it."))
        return []
    return [
        object_row(box, label, difficult=bool(ignore), crowd=bool(crowd), area=entry.get("area"))
    ]
