"""Reading a PASCAL VOC devkit: split files and annotations."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from tract_transfer.data.detection import (
    BoxReader,
    DetectionDataset,
    ImageFiles,
    annotated_size,
    stored_size,
)
from tract_transfer.data.findings import Findings, Origin, check_voc_sets, is_below
from tract_transfer.data.images import MAX_PIXELS
from tract_transfer.registry import did_you_mean

VOC_CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


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
        root: the folder that contains VOCdevkit, or VOC2007, or any folder of that layout.
        sets: `<year or folder>/<split>`, such as ["2007/trainval", "2012/trainval"]. A line of a
            split file is an image id, or an id and 1, 0 or -1; images with -1 are excluded.
        classes: the class names in label order; VOC's twenty by default.
        key: the config section that errors name.
        findings: what happens to wrong annotations; by default the first is raised.
        max_pixels: larger images are not decoded.

    Only `size` and, of each object, `name`, `bndbox` and `difficult` are read. A missing
    `difficult` is 0, and a missing size is read from the image's header.

    Raises:
        FileNotFoundError: a folder, a split file, an annotation or an image is missing.
        ValueError: a line or an object is wrong; the message names its file and number.
    """
    reader = BoxReader(VOC_CLASSES if classes is None else classes, key, findings or Findings())
    files: list[str] = []
    for annotation, xml, image in _annotations(Path(root).expanduser(), sets, reader):
        files.append(str(image))
        sides = (_number(annotation.findtext(f"size/{side}")) for side in ("height", "width"))
        index = reader.add_image(annotated_size(*sides) or stored_size(image))
        for number, element in enumerate(annotation.findall("object"), start=1):
            with reader.findings.reporting():
                _read_object(index, f"{xml} object {number}", element, reader)
    size_check = check_voc_sets(sets, len(files)) if classes is None else None
    name, source = f"voc {'+'.join(sets)}", ImageFiles(files, max_pixels)
    origin = Origin(size_check=size_check)
    return DetectionDataset(name, reader.class_names, source, *reader.arrays(), origin=origin)


def _annotations(
    root: Path, sets: Sequence[str], reader: BoxReader
) -> Iterator[tuple[Element, Path, Path]]:
    """Yield (annotation, its XML file, image file) of each image of the sets, once."""
    line_of: dict[Path, str] = {}
    for voc_set in sets:
        devkit, path = _find_split(root, voc_set, reader.key)
        # Bytes that are no UTF-8 become an id that does not exist, which is reported with its line.
        text, count = path.read_text(encoding="utf-8", errors="replace"), 0
        for number, line in enumerate(text.splitlines(), start=1):
            fields = line.split()
            if not fields or (len(fields) == 2 and fields[1] == "-1"):
                continue
            count, item = count + 1, f"{path} line {number}"
            with reader.findings.reporting():
                xml, image = _find_files(devkit, item, fields)
                if (first := line_of.setdefault(xml, item)) != item:
                    message = f"{item} repeats {xml.stem!r}, already in {first}. Remove one."
                    raise ValueError(message)
                yield _parse(xml), xml, image
        if count == 0:
            raise ValueError(f"{path} names no image. Set {reader.key}.sets to a split that does.")


def _find_split(root: Path, voc_set: str, key: str) -> tuple[Path, Path]:
    """Return the devkit of a set, and its split file."""
    year, _, split = voc_set.partition("/")
    if not (year and split):
        raise ValueError(f"{key}.sets: {voc_set!r} must be <year>/<split>, as 2007/trainval.")
    tried = [base / name for base in (root, root / "VOCdevkit") for name in (f"VOC{year}", year)]
    devkit = next((folder for folder in tried if (folder / "Annotations").is_dir()), None)
    if devkit is None:
        listed = ", ".join(str(folder / "Annotations") for folder in tried)
        raise FileNotFoundError(
            f"No VOC devkit for {year!r}: none of {listed} exists. Set {key}.root."
        )
    path = devkit / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        splits = sorted(file.stem for file in path.parent.glob("*.txt"))
        hint = did_you_mean(split, splits)
        raise FileNotFoundError(f"{path} does not exist.{hint} Set {key}.sets to one of {splits}.")
    return devkit, path


def _find_files(devkit: Path, line: str, fields: list[str]) -> tuple[Path, Path]:
    """Return the XML file and the image file of a line of a split file."""
    if fields[1:] not in ([], ["0"], ["1"]):
        raise ValueError(
            f"{line} must be an id, or an id and 1, 0 or -1, not {' '.join(fields)!r}."
        )
    if not is_below(devkit / "Annotations", fields[0]):
        raise ValueError(f"{line} must be an id, not a path out of the devkit: {fields[0]!r}.")
    xml = devkit / "Annotations" / f"{fields[0]}.xml"
    images = [devkit / "JPEGImages" / f"{fields[0]}{suffix}" for suffix in IMAGE_SUFFIXES]
    image = next((file for file in images if file.is_file()), images[0])
    for file in (xml, image):
        if not file.is_file():
            raise FileNotFoundError(
                f"{line} needs {file}, which does not exist. Add it, or remove the line."
            )
    return xml, image


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


def _read_object(image: int, item: str, element: Element, reader: BoxReader) -> None:
    """Add an object; VOC's boxes are 1-based and inclusive."""
    name = (element.findtext("name") or "").strip()
    item = f"{item} ({name or 'no name'})"
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"{item}: <difficult> must be 0 or 1, not {difficult!r}.")
    sides = {side: element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")}
    xmin, ymin, xmax, ymax = map(_number, sides.values())
    written = ", ".join(f"{side} {text}" for side, text in sides.items()) + " (from 1, inclusive)"
    box = (xmin - 1, ymin - 1, xmax, ymax)
    reader.add_object(image, item, name, box, written, difficult=difficult == "1")


def _number(text: str | None) -> float:
    """Return the number that a text holds, or NaN."""
    try:
        return float(text or "")
    except ValueError:
        return math.nan
