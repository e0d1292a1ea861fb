"""Reading a PASCAL VOC devkit: split files and annotations, with errors that name the line."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from tract_transfer.data.detection import (
    UNKNOWN_SIZE,
    DetectionDataset,
    ImageFiles,
    ObjectRow,
    annotated_size,
    flatten,
    label_map,
    object_row,
    stored_size,
    unknown_class,
)
from tract_transfer.data.findings import Box, Findings, Origin, Size, check_voc_sets, is_below
from tract_transfer.data.images import MAX_PIXELS
from tract_transfer.registry import did_you_mean

VOC_CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def load_voc(
    root: str | Path,
    sets: Sequence[str],
    classes: Sequence[str] | None = None,
    *,
    key: str = "data.train",
    findings: Findings | None = None,
    max_pixels: int = MAX_PIXELS,
) -> DetectionDataset:
    """Load image sets of a PASCAL VOC devkit.

    Args:
        root: the folder that holds VOCdevkit, or VOC2007, or any folder of that layout.
        sets: `<year or folder>/<split>`, such as ["2007/trainval", "2012/trainval"]. A split file
            has an image id a line, or an id and 1, 0 or -1: those with -1 are left out.
        classes: the class names in label order; VOC's twenty by default.
        key: the config section that error messages point to.
        findings: what becomes of wrong annotations; by default the first is raised.
        max_pixels: an image of more cannot be decoded.

    Of an annotation `size`, and of each object `name`, `bndbox` and `difficult` are read: the last
    is 0 where it is missing, and the size that of the image's header.

    Raises:
        FileNotFoundError: a folder, a split file, an annotation or an image is missing.
        ValueError: a line or an object is wrong; the message names its file and number.
    """
    names = list(VOC_CLASSES if classes is None else classes)
    label_of = label_map(names, key)
    if not sets:
        raise ValueError(f"{key}.sets must name a set at least, such as 2007/trainval.")
    findings = Findings() if findings is None else findings
    files: list[str] = []
    sizes: list[Size] = []
    objects: list[list[ObjectRow]] = []
    for annotation, xml, image in _annotated(Path(root).expanduser(), sets, key, findings):
        size = _read_size(annotation) or stored_size(image)
        files.append(str(image))
        sizes.append(size)
        objects.append(list(_read_objects(annotation, xml, size, label_of, key, findings)))
    name = f"voc {'+'.join(sets)}"
    dataset = DetectionDataset(
        name, names, ImageFiles(files), sizes, flatten(objects), max_pixels=max_pixels
    )
    if classes is None:
        dataset.origin = Origin(size_check=check_voc_sets(sets, len(files)))
    return dataset


def _find_devkit(root: Path, year: str, key: str) -> Path:
    tried = [base / name for base in (root, root / "VOCdevkit") for name in (f"VOC{year}", year)]
    for folder in tried:
        if (folder / "Annotations").is_dir():
            return folder
    listed = ", ".join(str(folder / "Annotations") for folder in tried)
    raise FileNotFoundError(f"No VOC devkit for {year!r}: none of {listed} exists. Set {key}.root.")


def _annotated(
    root: Path, sets: Sequence[str], key: str, findings: Findings
) -> Iterator[tuple[Element, Path, Path]]:
    """Yield (annotation, its XML file, image file) of each image of the sets, once."""
    origin: dict[Path, str] = {}
    for voc_set in sets:
        for place, xml, image in _read_split(root, voc_set, key, findings):
            if xml in origin:
                message = f"{place} repeats {xml.stem!r}, already in {origin[xml]}. Take one out."
                findings.wrong(ValueError(message))
                continue
            origin[xml] = place
            try:
                annotation = _parse(xml)
            except ValueError as error:
                findings.wrong(error)
                continue
            yield annotation, xml, image


def _read_split(
    root: Path, voc_set: str, key: str, findings: Findings
) -> Iterator[tuple[str, Path, Path]]:
    """Yield (split file and line, XML file, image file) of each image of a set."""
    year, slash, split = voc_set.partition("/")
    if not (year and slash and split):
        raise ValueError(f"{key}.sets: {voc_set!r} must be <year>/<split>, as 2007/trainval.")
    devkit = _find_devkit(root, year, key)
    path = devkit / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.txt"))
        raise FileNotFoundError(
            f"{path} does not exist.{did_you_mean(split, known)} Set {key}.sets to one of {known}."
        )
    # A byte that is no UTF-8 makes an id that does not exist, and is then told with its line.
    text, count = path.read_text(encoding="utf-8", errors="replace"), 0
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields or (len(fields) == 2 and fields[1] == "-1"):
            continue
        place = f"{path} line {number}"
        count += 1
        if len(fields) > 2 or (len(fields) == 2 and fields[1] not in ("0", "1")):
            message = f"{place} must be an id, or an id and 1, 0 or -1, not {line!r}."
            findings.wrong(ValueError(message))
            continue
        if not is_below(devkit / "Annotations", fields[0]):
            message = f"{place} must be an id, not a path out of the devkit: {fields[0]!r}."
            findings.wrong(ValueError(message))
            continue
        xml = devkit / "Annotations" / f"{fields[0]}.xml"
        candidates = [devkit / "JPEGImages" / f"{fields[0]}{end}" for end in _IMAGE_SUFFIXES]
        image = next((file for file in candidates if file.is_file()), candidates[0])
        missing = [str(file) for file in (xml, image) if not file.is_file()]
        if missing:
            message = (
                f"{place} needs {missing[0]}, which does not exist. Add it, or take the line out."
            )
            findings.wrong(FileNotFoundError(message))
            continue
        yield place, xml, image
    if count == 0:
        raise ValueError(f"{path} names no image. Set {key}.sets to a split that does.")


def _parse(xml: Path) -> Element:
    """Return the root of an XML file; entities, which can grow without bound, are refused."""
    import defusedxml.ElementTree
    from defusedxml import DefusedXmlException

    try:
        root: Element | None = defusedxml.ElementTree.parse(xml).getroot()
    except (ParseError, DefusedXmlException, LookupError, ValueError) as error:
        raise ValueError(f"{xml} is not a readable XML file: {error}. Repair it.") from error
    assert root is not None
    return root


def _read_size(annotation: Element) -> Size | None:
    try:
        height = int(annotation.findtext("size/height") or 0)
        width = int(annotation.findtext("size/width") or 0)
    except ValueError:
        return None
    return annotated_size({"height": height, "width": width})


def _read_objects(
    annotation: Element,
    xml: Path,
    size: Size,
    label_of: Mapping[str, int],
    key: str,
    findings: Findings,
) -> Iterator[ObjectRow]:
    if size == UNKNOWN_SIZE:
        return
    for number, element in enumerate(annotation.findall("object"), start=1):
        name = (element.findtext("name") or "").strip()
        place = f"{xml} object {number} ({name or 'no name'})"
        if name not in label_of:
            findings.wrong(unknown_class(place, name, label_of, key))
            continue
        flag = (element.findtext("difficult") or "0").strip()
        if flag not in ("0", "1"):
            findings.wrong(ValueError(f"{place}: <difficult> must be 0 or 1, not {flag!r}."))
            continue
        box = _read_box(element, size, place, findings)
        if box is not None:
            yield object_row(box, label_of[name], difficult=flag == "1")


def _read_box(element: Element, size: Size, place: str, findings: Findings) -> Box | None:
    """Return the box, 0-based and exclusive; VOC's own are 1-based and inclusive."""
    corners = []
    for side in ("xmin", "ymin", "xmax", "ymax"):
        text = element.findtext(f"bndbox/{side}")
        try:
            corners.append(float(text or ""))
        except ValueError:
            corners.append(math.nan)
        if not math.isfinite(corners[-1]):
            findings.invalid_box(f"{place}: <{side}> must be a finite number, not {text!r}")
            return None
    xmin, ymin, xmax, ymax = corners
    written = f"xmin {xmin:g}, ymin {ymin:g}, xmax {xmax:g}, ymax {ymax:g} (from 1, inclusive)"
    return findings.box((xmin - 1, ymin - 1, xmax, ymax), size, place, written)
