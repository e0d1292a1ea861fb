"""Reading COCO's json: images, annotations and categories, with errors that name the entry."""

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
        images: the folder that the `file_name`s start from.
        annotations: the json file. Of an image `id`, `file_name`, `height` and `width` are read,
            of an annotation `id`, `image_id`, `category_id`, `bbox` (x, y, width, height), `area`,
            `iscrowd` and `ignore`; masks and keypoints are not.
        classes: the category names in label order; by default all, in the order of their ids.
        key: the config section that error messages point to.
        findings: what becomes of wrong annotations; by default the first is raised.
        max_pixels: an image of more cannot be decoded.

    What has `iscrowd` is a crowd, and thereby difficult; what has `ignore` is difficult.

    Raises:
        FileNotFoundError: the json file, the folder or an image is missing.
        ValueError: an entry is wrong; the message names the file and the entry.
    """
    path, folder = Path(annotations).expanduser(), Path(images).expanduser()
    findings = Findings() if findings is None else findings
    tree = _read(path, key)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of images. Set {key}.images.")
    name_of = _category_names(tree, path, findings)
    names = list(name_of.values()) if classes is None else list(classes)
    if not names and classes is None:
        raise ValueError(f"{path} names no category. Set {key}.annotations to a file with some.")
    label_of = label_map(names, key)
    files, sizes, row_of = _read_images(tree, path, folder, key, findings)
    if not files:
        raise ValueError(f"{path} has no image to use. Set {key}.annotations to a file with some.")
    objects: list[list[ObjectRow]] = [[] for _ in files]
    for entry, place, row in _entries_of_images(tree, path, row_of, findings):
        name = _name_of_object(entry, place, name_of, label_of, key, findings)
        if name is not None:
            found = _read_object(entry, f"{place} ({name})", sizes[row], label_of[name], findings)
            objects[row] += [] if found is None else [found]
    title, source = f"coco {path.name}", ImageFiles(files)
    dataset = DetectionDataset(title, names, source, sizes, flatten(objects), max_pixels=max_pixels)
    dataset.origin = Origin(size_check=check_coco_file(path, len(files)))
    return dataset


def _read(path: Path, key: str) -> Mapping[str, Any]:
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
    tree: Mapping[str, Any], name: str, path: Path, findings: Findings, *, once: bool = False
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (entry, what an error calls it) of a list; each must be a mapping with an id.

    With `once`, an id that another entry has is wrong.
    """
    seen: set[Any] = set()
    for number, entry in enumerate(tree[name]):
        if not (isinstance(entry, dict) and isinstance(entry.get("id"), int | str)):
            message = f"{path} {name}[{number}] must be a mapping with an id. Correct it."
            findings.wrong(ValueError(message))
            continue
        place = f"{path} {name}[{number}] id {entry['id']}"
        if once and entry["id"] in seen:
            findings.wrong(ValueError(f"{place}: the id is another annotation's. Correct it."))
            continue
        seen.add(entry["id"])
        yield entry, place


def _id(entry: Mapping[str, Any], name: str) -> int | str | None:
    """Return the id that an entry names, or None where it is none."""
    value = entry.get(name)
    return value if isinstance(value, int | str) else None


def _category_names(tree: Mapping[str, Any], path: Path, findings: Findings) -> dict[Any, str]:
    """Return the names of the categories by id, in the order of the ids: numbers, then texts."""
    name_of: dict[Any, str] = {}
    for entry, place in _entries(tree, "categories", path, findings):
        name = entry.get("name")
        if not isinstance(name, str) or entry["id"] in name_of or name in name_of.values():
            message = f"{place}: name {name!r} and id must be given, and only once. Correct it."
            findings.wrong(ValueError(message))
            continue
        name_of[entry["id"]] = name
    by_id = sorted(name_of, key=lambda number: (isinstance(number, str), number))
    return {number: name_of[number] for number in by_id}


def _read_images(
    tree: Mapping[str, Any], path: Path, folder: Path, key: str, findings: Findings
) -> tuple[list[str], list[Size], dict[Any, int]]:
    """Return files, sizes and the row of each image id."""
    files: dict[str, Size] = {}
    row_of: dict[Any, int] = {}
    for entry, place in _entries(tree, "images", path, findings):
        name = entry.get("file_name")
        if not isinstance(name, str) or not is_below(folder, name):
            message = f"{place}: file_name must be a path below {folder}, not {name!r}. Correct it."
            findings.wrong(ValueError(message))
            continue
        file = folder / name
        if entry["id"] in row_of or str(file) in files:
            message = f"{place}: the id or the file {name} is another image's. Correct it."
            findings.wrong(ValueError(message))
        elif not file.is_file():
            message = f"{place}: {file} does not exist. Add it, or set {key}.images."
            findings.wrong(FileNotFoundError(message))
        else:
            row_of[entry["id"]] = len(files)
            files[str(file)] = annotated_size(entry) or stored_size(file)
    return list(files), list(files.values()), row_of


def _entries_of_images(
    tree: Mapping[str, Any], path: Path, row_of: Mapping[Any, int], findings: Findings
) -> Iterator[tuple[dict[str, Any], str, int]]:
    """Yield (entry, what an error calls it, row of its image) of each annotation."""
    for entry, place in _entries(tree, "annotations", path, findings, once=True):
        if _id(entry, "image_id") in row_of:
            yield entry, place, row_of[entry["image_id"]]
        else:
            message = f"{place}: image_id {entry.get('image_id')!r} is no image's. Correct it."
            findings.wrong(ValueError(message))


def _name_of_object(
    entry: Mapping[str, Any],
    place: str,
    name_of: Mapping[Any, str],
    label_of: Mapping[str, int],
    key: str,
    findings: Findings,
) -> str | None:
    """Return the name of an object's category, or None where it is wrong."""
    if _id(entry, "category_id") not in name_of:
        message = f"category_id {entry.get('category_id')!r} is no category's. Correct it."
        findings.wrong(ValueError(f"{place}: {message}"))
        return None
    name = name_of[entry["category_id"]]
    if name not in label_of:
        findings.wrong(unknown_class(f"{place} ({name})", name, label_of, key))
        return None
    return name


def _read_object(
    entry: Mapping[str, Any], place: str, size: Size, label: int, findings: Findings
) -> ObjectRow | None:
    if size == UNKNOWN_SIZE:
        return None
    written = entry.get("bbox")
    if not is_numbers(written):
        findings.invalid_box(f"{place}: bbox must be four numbers, not {reprlib.repr(written)}")
        return None
    x, y, width, height = map(float, written)  # type: ignore[arg-type]
    box = findings.box((x, y, x + width, y + height), size, place, f"x, y, w, h {written}")
    if box is None:
        return None
    flags = [entry.get(name) or 0 for name in ("iscrowd", "ignore")]
    if not all(flag in (0, 1) for flag in flags):
        findings.wrong(ValueError(f"{place}: iscrowd and ignore must be 0 or 1. Correct it."))
        return None
    crowd, ignore = map(bool, flags)
    return object_row(box, label, difficult=ignore, crowd=crowd, area=entry.get("area"))
