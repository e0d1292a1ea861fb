"""What a folder of images holds, so that a training needs no config file.

`RECOGNIZERS` lists the kinds of folders; a new kind is a function that returns a Description, or
None, and a row there.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tract_transfer.data.detection import UNKNOWN_SIZE, stored_size
from tract_transfer.data.findings import Findings, Size, is_below
from tract_transfer.data.huggingface import (
    SPLIT_NAMES,
    is_saved,
    load_huggingface_boxes,
    objects_columns,
    own_split,
    parquet_files,
)
from tract_transfer.data.voc import IMAGE_SUFFIXES as VOC_SUFFIXES
from tract_transfer.data.voc import VOC_CLASSES
from tract_transfer.files import CONFIG_NAME, RESULTS_NAME

BOX_FORMATS = ("xywh", "xyxy", "cxcywh")
IMAGE_SUFFIXES = {
    ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff",
    ".webp",
}  # fmt: skip
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_COCO_EXPORT = "_annotations.coco.json"
_SPLITS = {
    "train": "train|training|trn",
    "val": "val|valid|validation|dev|eval|evaluation",
    "test": "test|testing|tst",
}
_AFTER_SPLIT = r"([-_ ]?(set|data|images|imgs|split|\d+))*"
_MAX_SIZES = 64  # images whose size is read
_MAX_BOX_ROWS = 200  # rows by which the format of boxes is found
_MAX_NAMED = 5


class Split(NamedTuple):
    """Where a split is: a source section of a config, and its number of images."""

    source: dict[str, Any]
    num_images: int


@dataclass(frozen=True)
class Description:
    """What a folder holds.

    Attributes:
        kind: one of RECOGNIZERS' names.
        task: classification or detection.
        splits: `train`, and `val` and `test` if the folder has them.
        class_names: None if labels are integers without names.
        why: by what the kind was recognized.
        sizes: (height, width) of up to 64 training images.
        notes: what else a user should know, such as folders that are not used.
    """

    path: Path
    kind: str
    task: str
    splits: dict[str, Split]
    class_names: list[str] | None
    why: str
    sizes: list[Size]
    notes: list[str] = field(default_factory=list)


class Recognizer(NamedTuple):
    """A kind of folder: its name, what is looked for, and the function that recognizes it."""

    kind: str
    layout: str
    describe: Callable[[Path], Description | None]


def describe_folder(path: str | Path) -> Description:
    """Return what a folder, or a parquet file, holds.

    Hidden entries, and those of macOS and Jupyter, are ignored. A folder that contains nothing but
    another one is replaced by it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is empty, a file or a run folder, or nothing that is known; the message says
            what was looked for, what was found, and what to do.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path.absolute()} does not exist. Give the folder of the images.")
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(_about_file(path))
    if path.is_dir():
        _refuse_run_folder(path)
        if not visible(path):
            raise ValueError(f"{path} is empty. Give the folder of the images.")
    for recognizer in RECOGNIZERS:
        if description := recognizer.describe(path):
            return description
    entries = visible(path)
    if len(entries) == 1 and entries[0].is_dir():
        return describe_folder(entries[0])
    raise ValueError(_unknown(path))


# Listing folders.


def visible(folder: Path) -> list[Path]:
    """Return a folder's entries by name, without hidden ones and those of operating systems."""
    if not folder.is_dir():
        return []
    ignored = (".", "__", "Thumbs.db", "desktop.ini", "lost+found")
    return sorted(path for path in folder.iterdir() if not path.name.startswith(ignored))


def is_image(path: Path) -> bool:
    """Whether a file has the suffix of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def split_of(name: str) -> str | None:
    """Return train, val or test if a name is a usual spelling of it, as Training_Set or val2017."""
    for split, names in _SPLITS.items():
        if re.fullmatch(f"({names}){_AFTER_SPLIT}", name.lower()):
            return split
    return None


def _folders(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.is_dir()]


def _images(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if is_image(path) and path.is_file()]


def _files_below(folder: Path) -> Iterator[Path]:
    for path in visible(folder):
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path


def _by_split(names: Iterable[Any], name_of: Callable[[Any], str], path: Path) -> dict[str, Any]:
    """Return split -> the one of `names` that is spelled like it; refuse two of the same."""
    splits: dict[str, Any] = {}
    for name in names:
        split = split_of(name_of(name))
        if split is None:
            continue
        if split in splits:
            raise ValueError(
                f"{path} has two parts that read as {split}: {name_of(splits[split])} and "
                f"{name_of(name)}. Rename or move one of them."
            )
        splits[split] = name
    return {split: splits[split] for split in _SPLITS if split in splits}


def _split_names(names: Sequence[str], path: Path) -> dict[str, str]:
    """Return split -> its name among those that a folder has; a single one is train."""
    splits: dict[str, str] = _by_split(names, str, path)
    if "train" in splits:
        return splits
    if len(names) > 1:
        raise ValueError(f"{path} has the splits {list(names)}, and none of them is train. Rename.")
    return {"train": names[0]}


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)})" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _sizes(stored: Sequence[Any]) -> list[Size]:
    """Return the sizes of images, evenly chosen from all, whose header can be read."""
    step = max(1, len(stored) // _MAX_SIZES)
    sizes = [stored_size(one) for one in stored[::step][:_MAX_SIZES]]
    return [size for size in sizes if size != UNKNOWN_SIZE]


# What cannot be trained on.


def _about_file(path: Path) -> str:
    """Return what to do with a file in place of a folder."""
    if path.suffix.lower() in _ARCHIVES:
        return f"{path} is an archive. Unpack it, and give the folder that it contains."
    if is_image(path):
        return f"{path} is one image. Give the folder of all images; to predict it: predict."
    if path.suffix in (".yaml", ".yml"):
        return f"{path} is a YAML file. If it is a config, give it with --config-file."
    return f"{path} is a file. Give the folder of the images, or a parquet file."


def _refuse_run_folder(path: Path) -> None:
    outputs = [RESULTS_NAME, "model.json", "checkpoints"]
    if (path / CONFIG_NAME).is_file() and any((path / name).exists() for name in outputs):
        raise ValueError(
            f"{path} is the folder of a run. To fine-tune its backbone, give the folder of the "
            f"images and --weights {path}; to resume the run, --config-file {path / CONFIG_NAME} "
            "--resume."
        )


def _unknown(path: Path) -> str:
    """Return what was looked for in a folder, and what was found instead."""
    files = list(_files_below(path))
    kinds = Counter(file.suffix.lower() or "no suffix" for file in files)
    counts = [f"{count} {kind}" for kind, count in kinds.most_common(_MAX_NAMED)]
    layouts = "\n".join(f"  {one.kind}: {one.layout}" for one in RECOGNIZERS)
    entries = [f"{one.name}/" if one.is_dir() else one.name for one in visible(path)]
    hint = ""
    if files and all(map(is_image, files)):
        hint = " The images have no classes: sort them into a folder for each."
    return (
        f"{path} holds nothing that can be trained on. Looked for:\n{layouts}\n"
        f"Found: {', '.join(counts) or 'no file'}; at the top: {_listed(entries)}.{hint} Change "
        "the folder, or write a config and give it with --config-file."
    )


# Class folders.


def describe_class_folders(path: Path) -> Description | None:
    """Recognize class folders, flat or one level below folders of splits."""
    with_classes = [f for f in _folders(path) if any(map(_images, _folders(f)))]
    splits = _by_split(with_classes, lambda folder: folder.name, path)
    if "train" not in splits:
        splits = {"train": path}
    images = {name: _images_by_class(folder) for name, folder in splits.items()}
    classes = sorted(set().union(*images.values()))
    if not images["train"] or all(map(split_of, classes)):
        return None
    is_flat = splits["train"] == path
    if len(classes) == 1:
        if any(len(visible(folder)) > 1 for folder in splits.values()):
            return None
        raise ValueError(
            f"{path} has one class, {classes[0]!r}, and classification needs two. Put the images "
            "of each class into a folder of their own."
        )
    for folder in splits.values():
        _check_depth(folder)
    if is_flat and (clash := [name for name in classes if name in SPLIT_NAMES]):
        raise ValueError(
            f"{path} has the class {clash[0]!r}, which reads as a split. Rename the folder."
        )
    sources = {}
    for name, folder in splits.items():
        is_standard = not is_flat and folder.name in SPLIT_NAMES
        root, split = (path, folder.name) if is_standard else (folder, own_split(folder))
        sources[name] = Split(
            {"source": "huggingface", "path": str(root.absolute()), "split": split},
            sum(map(len, images[name].values())),
        )
    used = [] if is_flat else [folder.name for folder in splits.values()]
    others = [] if is_flat else [one.name for one in _folders(path) if one.name not in used]
    return Description(
        path,
        "class folders",
        "classification",
        sources,
        classes,
        f"{len(classes)} folders of images{' in each of ' if used else ''}{', '.join(used)}",
        _sizes([file for files in images["train"].values() for file in files]),
        [f"not used: the folders {_listed(others)}"] if others else [],
    )


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    images = {sub.name: _images(sub) for sub in _folders(folder)}
    return {name: files for name, files in images.items() if files}


def _check_depth(folder: Path) -> None:
    """Refuse images that do not lie in `folder/<class>/`: they would have no class."""
    for file in _files_below(folder):
        if is_image(file) and file.parent.parent != folder:
            raise ValueError(
                f"{file} is not in {folder}/<class>/, like other images of {folder}. Move it into "
                "the folder of its class, or out of this folder."
            )


# Rows: parquet, saved data sets, image folders with metadata.


def describe_saved(path: Path) -> Description | None:
    """Recognize what `save_to_disk` of Hugging Face `datasets` wrote."""
    if not is_saved(path):
        return None
    import datasets

    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        saved = {str(saved.split or own_split(path)): saved}
    first = next(iter(saved.values()))

    counts = {name: len(rows) for name, rows in saved.items()}
    return _describe_rows(path, "saved dataset", first.features, counts, _cells_of(first))


def describe_parquet(path: Path) -> Description | None:
    """Recognize parquet files: one, or those of a folder or of its folder `data`."""
    files = [path] if path.is_file() else parquet_files(path)
    if not files or any(file.name in _METADATA for file in files):
        return None
    import pyarrow
    from datasets import Features
    from pyarrow import parquet

    counts: dict[str, int] = {}
    try:
        for file in files:
            name = own_split(file) if path.is_file() else re.sub(r"-\d+-of-\d+$", "", file.stem)
            counts[name] = counts.get(name, 0) + parquet.read_metadata(file).num_rows
        features = Features.from_arrow_schema(parquet.read_schema(files[0]))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}. Repair it.") from error

    def cells(column: str) -> list[Any]:
        batches = parquet.ParquetFile(files[0]).iter_batches(_MAX_SIZES, columns=[column])
        return list(next(batches).column(0).to_pylist())

    return _describe_rows(path, "parquet", features, counts, cells)


def describe_metadata(path: Path) -> Description | None:
    """Recognize images with a metadata file beside them, as `datasets` reads them."""
    splits = [name for name in SPLIT_NAMES if (path / name).is_dir()]
    folders = {name: path / name for name in splits} or {own_split(path): path}
    if not any((folder / name).is_file() for folder in folders.values() for name in _METADATA):
        return None
    import datasets

    patterns = {name: str(folder / "**") for name, folder in folders.items()}
    try:
        rows = datasets.load_dataset("imagefolder", data_files=patterns)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"The metadata in {path} do not load: {reason}. Correct them.") from error
    first = next(iter(rows.values()))

    counts = {name: len(split) for name, split in rows.items()}
    return _describe_rows(path, "images with metadata", first.features, counts, _cells_of(first))


def _cells_of(rows: Any) -> Callable[[str], list[Any]]:
    """Return the function that reads the first cells of an image column, undecoded."""
    import datasets

    def cells(column: str) -> list[Any]:
        first = rows.select(range(min(_MAX_SIZES, len(rows)))).select_columns([column])
        return list(first.cast_column(column, datasets.Image(decode=False))[column])

    return cells


def _describe_rows(
    path: Path,
    kind: str,
    features: Mapping[str, Any],
    counts: Mapping[str, int],
    cells: Callable[[str], list[Any]],
) -> Description:
    """Describe rows with these features; `counts` are their splits.

    Args:
        cells: returns the first cells of an image column, undecoded.
    """
    names = _split_names(list(counts), path)
    images = _columns(features, "Image")
    if not images:
        types = {name: type(kind).__name__ for name, kind in features.items()}
        raise ValueError(
            f"{path}: no column has the feature Image. Columns: {types}. Convert one with "
            "cast_column(name, datasets.Image()) and save_to_disk."
        )
    image = min(images, key=lambda name: name not in ("image", "img"))
    common: dict[str, Any] = {"image_column": image} if len(images) > 1 else {}
    where = {"source": "huggingface", "path": str(path.absolute())}
    objects = objects_columns(features)
    notes = [f"image column {image}, of {images}"] if len(images) > 1 else []
    if objects:
        column = next(iter(objects.values()))
        at = {**where, "split": names["train"], **common}
        common |= {"objects_column": column.name} if len(objects) > 1 else {}
        box_format, box_unit = _box_format(at, column.class_names or [], len(objects) > 1, column)
        common |= {"box_format": box_format, "box_unit": box_unit}
        classes, why = column.class_names, f"column {column.name} with boxes ({box_format})"
    else:
        label, classes, note = _label_column(path, features)
        common |= {} if note is None else {"label_column": label}
        notes += [note] if note else []
        why = f"column {label} with labels"
    splits = {
        name: Split({**where, "split": theirs, **common}, counts[theirs])
        for name, theirs in names.items()
    }
    stored = [cell["bytes"] or Path(cell["path"] or "").absolute() for cell in cells(image) if cell]
    stored = [one for one in stored if isinstance(one, bytes) or is_below(path, one)]
    task = "detection" if objects else "classification"
    return Description(path, kind, task, splits, classes, why, _sizes(stored), notes)


def _columns(features: Mapping[str, Any], feature: str) -> list[str]:
    return [name for name, kind in features.items() if type(kind).__name__ == feature]


def _label_column(
    path: Path, features: Mapping[str, Any]
) -> tuple[str, list[str] | None, str | None]:
    """Return the label column, its class names, and a note if a config must name it."""
    labels = _columns(features, "ClassLabel")
    if len(labels) == 1:
        return labels[0], list(features[labels[0]].names), None
    if labels:
        usual = ("label", "labels")
        label = min(labels, key=lambda n: (n not in usual, -len(features[n].names), n))
        names = list(features[label].names)
        return label, names, f"label column {label} ({len(names)} classes), of {labels}"
    kinds = {name: str(getattr(kind, "dtype", kind)) for name, kind in features.items()}
    integers = [name for name, kind in kinds.items() if re.fullmatch(r"u?int\d+|bool", kind)]
    for name in integers:
        if name.lower() in ("label", "labels", "class", "target", "category", "y"):
            return name, None, f"label column {name}, of integers"
    raise ValueError(
        f"{path}: no column has labels (ClassLabel, or integers named label) or boxes. Columns: "
        f"{kinds}. Convert one with class_encode_column(name) on all splits, and save_to_disk; or "
        "give a config with data.train.label_column."
    )


def _box_format(
    at: dict[str, Any], classes: Sequence[str], names_column: bool, column: Any
) -> tuple[str, str]:
    """Return box_format and box_unit: the only pair by which all boxes lie in their images."""
    key = "data.train"
    if not classes:
        raise ValueError(
            f"{at['path']}: the classes in column {column.name} have no names. Give a config with "
            f"{key}.classes, box_format and box_unit."
        )
    options = {key: value for key, value in at.items() if key != "source"}
    options |= {"objects_column": column.name} if names_column else {}
    options["split"] = f"{at['split']}[:{_MAX_BOX_ROWS}]"
    for unit in ("relative", "pixel"):  # a pixel's fraction in size is no object
        fits = []
        for box_format in BOX_FORMATS:
            findings = Findings(collect=True)
            options |= {"box_format": box_format, "box_unit": unit}
            load_huggingface_boxes(**options, findings=findings)
            fits += [] if findings.problems else [box_format]
        if len(fits) == 1:
            return fits[0], unit
        if fits:
            raise ValueError(
                f"{at['path']}: the boxes in column {column.name} fit as {' and as '.join(fits)}. "
                f"Give a config with {key}.box_format and box_unit."
            )
    raise ValueError(
        f"{at['path']}: as none of {', '.join(BOX_FORMATS)} do all boxes in column {column.name} "
        f"lie in their images. Give a config with {key}.box_format, box_unit and "
        "data.invalid_boxes: clip."
    )


# VOC devkits.


def describe_voc(path: Path) -> Description | None:
    """Recognize VOC devkits: the folder, one in it, or one in a folder in it."""
    near = [path, *_folders(path), *(sub for one in _folders(path) for sub in _folders(one))]
    devkits = [folder for folder in near if _is_devkit(folder)]
    devkits = [folder for folder in devkits if folder.parent == devkits[0].parent]
    if not devkits:
        return None
    first = devkits[0].absolute()
    ids = {(kit, split): _ids(kit, split) for kit in devkits for split in (*_SPLITS, "trainval")}
    sets = {split: [key for key in ids if key[1] == split and ids[key]] for split in _SPLITS}
    both, notes = [key for key in ids if key[1] == "trainval" and ids[key]], []
    if both and (sets["test"] or not sets["train"]):
        rest = [key for key in sets["train"] if (key[0], "trainval") not in both]
        sets |= {"train": [*both, *rest], "val": []}
        notes = ["train is trainval"]
    if not sets["train"]:
        raise ValueError(
            f"{first / 'ImageSets/Main'} has neither train.txt nor trainval.txt. Write the ids of "
            "the training images to train.txt, one a line."
        )
    used = [key for keys in sets.values() for key in keys]
    files = [kit / "Annotations" / f"{one}.xml" for kit, split in used for one in ids[kit, split]]
    if not (names := sorted(_object_names(files))):
        raise ValueError(f"{first / 'Annotations'} names no object. Give other data.")
    is_pascal = bool(re.fullmatch(r"VOC\d{4}", first.name)) and set(names) <= set(VOC_CLASSES)
    splits: dict[str, Split] = {}
    for name, keys in sets.items():
        voc_sets = [f"{kit.absolute().name}/{split}" for kit, split in keys]
        root = devkits[0].parent if devkits[0].name else first.parent
        source: dict[str, Any] = {"source": "voc", "root": str(root.absolute()), "sets": voc_sets}
        source |= {} if is_pascal else {"classes": names}
        splits |= {name: Split(source, sum(len(ids[key]) for key in keys))} if keys else {}
    pictures = [_image_of(kit, one) for kit, split in sets["train"] for one in ids[kit, split]]
    why = f"{', '.join(str(kit) for kit in devkits)} with Annotations, JPEGImages and ImageSets"
    classes = list(VOC_CLASSES) if is_pascal else names
    sizes = _sizes(pictures)
    return Description(path, "VOC devkit", "detection", splits, classes, why, sizes, notes)


def _is_devkit(folder: Path) -> bool:
    parts = ("Annotations", "JPEGImages", "ImageSets/Main")
    return all((folder / part).is_dir() for part in parts)


def _ids(devkit: Path, split: str) -> list[str]:
    """Return the ids in a split file; none if it does not exist."""
    file = devkit / "ImageSets" / "Main" / f"{split}.txt"
    lines = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    rows = [line.split() for line in lines.splitlines() if line.strip()]
    ids = [row[0] for row in rows if row[1:] != ["-1"]]
    return [one for one in ids if is_below(devkit / "Annotations", one)]


def _image_of(devkit: Path, image_id: str) -> Path:
    files = [devkit / "JPEGImages" / f"{image_id}{suffix}" for suffix in VOC_SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])


def _object_names(files: Sequence[Path]) -> set[str]:
    """Return the class names in annotations; those that cannot be read are reported later."""
    import defusedxml.ElementTree
    from defusedxml import DefusedXmlException

    names: set[str] = set()
    for file in files:
        try:
            root: Any = defusedxml.ElementTree.parse(file).getroot()
        except (OSError, ValueError, SyntaxError, LookupError, DefusedXmlException):
            continue
        names |= {(one.findtext("name") or "").strip() for one in root.findall("object")}
    return names - {""}


# COCO.


def describe_coco(path: Path) -> Description | None:
    """Recognize COCO json in annotations/, or one beside the images of each split (Roboflow)."""
    exported = {f.name: f / _COCO_EXPORT for f in _folders(path) if (f / _COCO_EXPORT).is_file()}
    if (path / _COCO_EXPORT).is_file():
        exported = {"train": path / _COCO_EXPORT}
    found = exported or {
        file.stem.removeprefix("instances_"): file
        for file in visible(path / "annotations")
        if file.suffix == ".json"
        and (file.stem.startswith("instances_") or split_of(file.stem) is not None)
    }
    if not found:
        return None
    names = _split_names(list(found), path)
    trees = {name: _read_coco(found[theirs]) for name, theirs in names.items()}
    classes = _coco_classes(list(trees.values()))
    splits, folders = {}, {}
    for name, theirs in names.items():
        file = found[theirs]
        folders[name] = file.parent if exported else _coco_images(path, theirs, trees[name], file)
        source: dict[str, Any] = {"source": "coco", "images": str(folders[name].absolute())}
        source |= {"annotations": str(file.absolute()), **({"classes": classes} if classes else {})}
        splits[name] = Split(source, len(trees[name]["images"]))
    names_below = [n for n in _file_names(trees["train"]) if is_below(folders["train"], n)]
    pictures = [folders["train"] / name for name in names_below]
    why = ", ".join(str(found[theirs].relative_to(path)) for theirs in names.values())
    categories = _category_names(trees["train"])
    excluded = [name for name in categories if name not in classes] if classes else []
    notes = [f"not a class: {_listed(excluded)}, a parent without boxes"] if excluded else []
    sizes = _sizes(pictures)
    return Description(path, "COCO", "detection", splits, classes or categories, why, sizes, notes)


def _read_coco(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a readable json file: {error}. Repair it.") from error
    for name in ("images", "annotations", "categories"):
        entries = tree.get(name) if isinstance(tree, dict) else None
        if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
            raise ValueError(f"{file} must have a list of {name}, as COCO's json of boxes has.")
    return dict(tree)


def _coco_classes(trees: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return the class names by id without mere parents of others; None if that excludes none."""
    used = {str(one.get("category_id")) for tree in trees for one in tree["annotations"]}
    categories = trees[0]["categories"]
    parents = {str(one.get("supercategory")) for one in categories}
    unused = {str(one.get("name")) for one in categories if str(one.get("id")) not in used}
    names = _category_names(trees[0])
    kept = [name for name in names if name not in parents & unused]
    return None if len(kept) == len(names) else kept


def _category_names(tree: Mapping[str, Any]) -> list[str]:
    """Return the names of the categories by id, as `load_coco` numbers them."""
    with_id = [one for one in tree["categories"] if isinstance(one.get("id"), int | str)]
    by_id = sorted(with_id, key=lambda one: (isinstance(one["id"], str), one["id"]))
    return [str(one.get("name")) for one in by_id]


def _file_names(tree: Mapping[str, Any]) -> list[str]:
    return [name for one in tree["images"] if isinstance(name := one.get("file_name"), str)]


def _coco_images(path: Path, name: str, tree: Mapping[str, Any], file: Path) -> Path:
    """Return the folder of a COCO file's images."""
    split = split_of(name) or name
    tried = [path / name, path / "images" / name, path / split, path / "images" / split,
             path / "images", path]  # fmt: skip
    for folder in tried:
        if any((folder / picture).is_file() for picture in _file_names(tree)[:_MAX_NAMED]):
            return folder
    listed = ", ".join(map(str, tried))
    raise ValueError(
        f"The images of {file} are in none of {listed}. Move them there, or give a config with "
        "data.train.images."
    )


RECOGNIZERS = [
    Recognizer("saved dataset", "a folder that save_to_disk of datasets wrote", describe_saved),
    Recognizer("parquet", "train.parquet, test.parquet, or data/train-*.parquet", describe_parquet),
    Recognizer(
        "COCO",
        "annotations/instances_train.json and the images in train/ or images/; or "
        "train/_annotations.coco.json beside the images",
        describe_coco,
    ),
    Recognizer("VOC devkit", "Annotations/, JPEGImages/ and ImageSets/Main/", describe_voc),
    Recognizer(
        "images with metadata",
        "metadata.csv, .jsonl or .parquet beside images, or in train/ and test/",
        describe_metadata,
    ),
    Recognizer(
        "class folders",
        "<class>/x.jpg, or train/<class>/x.jpg with val/ and test/ likewise",
        describe_class_folders,
    ),
]
