"""Reading COCO's json: images, annotations and categories."""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tract_transfer.data.detection import (
    BoxReader,
    DetectionDataset,
    ImageFiles,
    annotated_size,
    four_numbers,
    stored_size,
)
from tract_transfer.data.findings import Findings, Origin, check_coco_file, is_below
from tract_transfer.data.images import MAX_PIXELS

Entry = Mapping[str, Any]
T = TypeVar("T")
_ById = dict[int | str, T]


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
        key, findings, max_pixels: as of `voc.load_voc`, and so are the errors.

    An object with `iscrowd` is a crowd and therefore difficult; one with `ignore` is difficult.
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
    reader = BoxReader(names, key, findings)
    files, index_of = _read_images(tree, path, folder, reader)
    if not files:
        raise ValueError(f"{path} has no image to use. Set {key}.annotations to a file with some.")
    for entry, item in _entries(tree, "annotations", path, findings):
        with findings.reporting():
            _read_object(entry, item, index_of, name_of, reader)
    name, source = f"coco {path.name}", ImageFiles(files, max_pixels)
    origin = Origin(size_check=check_coco_file(path, len(files)))
    return DetectionDataset(name, names, source, *reader.arrays(), origin=origin)


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
        item = f"{path} {name}[{number}]"
        with findings.reporting():
            if not isinstance(entry, dict) or (entry_id := _id(entry, "id")) is None:
                raise ValueError(f"{item} must be a mapping with an id. Correct it.")
            item = f"{item} id {entry_id}"
            if entry_id in seen:
                raise ValueError(f"{item}: the id is already used. Correct it.")
            seen.add(entry_id)
            yield entry, item


def _id(entry: Entry, name: str) -> int | str | None:
    """Return the id that an entry names, or None if it is no id."""
    value = entry.get(name)
    return value if isinstance(value, int | str) else None


def _category_names(tree: Entry, path: Path, findings: Findings) -> _ById[str]:
    """Return the names of the categories by id, in the order of the ids: integers, then strings."""
    name_of: _ById[str] = {}
    for entry, item in _entries(tree, "categories", path, findings):
        with findings.reporting():
            name = entry.get("name")
            if not isinstance(name, str) or name in name_of.values():
                raise ValueError(f"{item}: name {name!r} must be given, and only once. Correct it.")
            name_of[entry["id"]] = name
    by_id = sorted(name_of, key=lambda number: (isinstance(number, str), number))
    return {number: name_of[number] for number in by_id}


def _read_images(
    tree: Entry, path: Path, folder: Path, reader: BoxReader
) -> tuple[list[str], _ById[int]]:
    """Add all images; return their files, and the index of each image id."""
    files: dict[str, int] = {}
    index_of: _ById[int] = {}
    for entry, item in _entries(tree, "images", path, reader.findings):
        with reader.findings.reporting():
            name = entry.get("file_name")
            if not isinstance(name, str) or not is_below(folder, name):
                message = f"file_name must be a path below {folder}, not {name!r}. Correct it."
                raise ValueError(f"{item}: {message}")
            file = folder / name
            if str(file) in files:
                raise ValueError(f"{item}: the file {name} is already used. Correct it.")
            if not file.is_file():
                message = f"{file} does not exist. Add it, or set {reader.key}.images."
                raise FileNotFoundError(f"{item}: {message}")
            size = annotated_size(entry.get("height"), entry.get("width")) or stored_size(file)
            files[str(file)] = index_of[entry["id"]] = reader.add_image(size)
    return list(files), index_of


def _read_object(
    entry: Entry, item: str, index_of: _ById[int], name_of: _ById[str], reader: BoxReader
) -> None:
    for field, entries in (("image_id", index_of), ("category_id", name_of)):
        if _id(entry, field) not in entries:
            kind = field.removesuffix("_id")
            raise ValueError(f"{item}: {field} {entry.get(field)!r} is no {kind}'s. Correct it.")
    image, name = index_of[entry["image_id"]], name_of[entry["category_id"]]
    item = f"{item} ({name})"
    crowd, ignore = (entry.get(field) or 0 for field in ("iscrowd", "ignore"))
    if crowd not in (0, 1) or ignore not in (0, 1):
        raise ValueError(f"{item}: iscrowd and ignore must be 0 or 1. Correct it.")
    x, y, width, height = four_numbers(entry.get("bbox"))
    box, flags = (x, y, x + width, y + height), {"difficult": bool(ignore), "crowd": bool(crowd)}
    written = f"x, y, w, h {reprlib.repr(entry.get('bbox'))}"
    reader.add_object(image, item, name, box, written, area=entry.get("area"), **flags)
