"""Reading a PASCAL VOC devkit: split files and annotations, with errors that name the line."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

from PIL import Image

from tract_transfer.data.images import UndecodableImage
from tract_transfer.registry import did_you_mean

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class VocObject(NamedTuple):
    """`box` xyxy pixels, 0-based, x2 and y2 exclusive; `label` in 0..K-1."""

    box: tuple[float, float, float, float]
    label: int
    difficult: bool


def _find_devkit(root: Path, year: str, key: str) -> Path:
    tried = [base / name for base in (root, root / "VOCdevkit") for name in (f"VOC{year}", year)]
    for folder in tried:
        if (folder / "Annotations").is_dir():
            return folder
    listed = ", ".join(str(folder / "Annotations") for folder in tried)
    raise FileNotFoundError(f"No VOC devkit for {year!r}: none of {listed} exists. Set {key}.root.")


def read_split(root: Path, voc_set: str, key: str) -> Iterator[tuple[str, Path, Path]]:
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
    count = 0
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fields = line.split()
        if not fields or (len(fields) == 2 and fields[1] == "-1"):
            continue
        place = f"{path} line {number}"
        if len(fields) > 2 or (len(fields) == 2 and fields[1] not in ("0", "1")):
            raise ValueError(f"{place} must be an id, or an id and 1, 0 or -1, not {line!r}.")
        count += 1
        xml = devkit / "Annotations" / f"{fields[0]}.xml"
        candidates = [devkit / "JPEGImages" / f"{fields[0]}{end}" for end in _IMAGE_SUFFIXES]
        image = next((file for file in candidates if file.is_file()), candidates[0])
        for needed in (xml, image):
            if not needed.is_file():
                raise FileNotFoundError(
                    f"{place} needs {needed}, which does not exist. Add it, or take the line out."
                )
        yield place, xml, image
    if count == 0:
        raise ValueError(f"{path} names no image. Set {key}.sets to a split that does.")


def read_annotation(
    xml: Path, image: Path, label_of: dict[str, int], key: str
) -> tuple[tuple[int, int], list[VocObject]]:
    """Return ((height, width), objects) of one XML file."""
    import defusedxml.ElementTree
    from defusedxml import DefusedXmlException

    try:
        annotation: Element | None = defusedxml.ElementTree.parse(xml).getroot()
        assert annotation is not None
    except (ParseError, DefusedXmlException) as error:
        raise ValueError(f"{xml} is not a readable XML file: {error}. Repair it.") from error
    size = _read_size(annotation, image)
    objects = []
    for number, element in enumerate(annotation.findall("object"), start=1):
        name = (element.findtext("name") or "").strip()
        place = f"{xml} object {number} ({name or 'no name'})"
        if name not in label_of:
            hint = did_you_mean(name, label_of)
            raise ValueError(
                f"{place}: unknown class.{hint} Classes: {', '.join(label_of)}. Correct the name, "
                f"or set {key}.classes."
            )
        box = _read_box(element, size, place)
        flag = (element.findtext("difficult") or "0").strip()
        if flag not in ("0", "1"):
            raise ValueError(f"{place}: <difficult> must be 0 or 1, not {flag!r}.")
        objects.append(VocObject(box, label_of[name], flag == "1"))
    return size, objects


def _read_size(annotation: Element, image: Path) -> tuple[int, int]:
    try:
        height = int(annotation.findtext("size/height") or 0)
        width = int(annotation.findtext("size/width") or 0)
    except ValueError:
        height = width = 0
    if height > 0 and width > 0:
        return height, width
    try:
        with Image.open(image) as header:
            return header.height, header.width
    except OSError as error:
        raise UndecodableImage(str(image), f"no size to be read ({error})") from error


def _read_box(
    element: Element, size: tuple[int, int], place: str
) -> tuple[float, float, float, float]:
    """Return xyxy, 0-based, x2 and y2 exclusive; VOC's own are 1-based and inclusive."""
    corners = []
    for side in ("xmin", "ymin", "xmax", "ymax"):
        text = element.findtext(f"bndbox/{side}")
        try:
            corners.append(float(text or ""))
        except ValueError:
            corners.append(math.nan)
        if not math.isfinite(corners[-1]):
            raise ValueError(f"{place}: <{side}> must be a finite number, not {text!r}.")
    xmin, ymin, xmax, ymax = corners
    height, width = size
    numbers = f"xmin {xmin:g}, ymin {ymin:g}, xmax {xmax:g}, ymax {ymax:g}"
    if xmax < xmin or ymax < ymin:
        raise ValueError(f"{place}: the box is inverted: {numbers}. Correct it.")
    if xmin < 1 or ymin < 1 or xmax > width or ymax > height:
        raise ValueError(
            f"{place}: the box must lie in 1..{width} x 1..{height} (1-based, inclusive), "
            f"but has {numbers}. Correct it."
        )
    return xmin - 1, ymin - 1, xmax, ymax
