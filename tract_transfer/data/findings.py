"""What a reader finds wrong with a dataset, raised or collected; and the check of a box."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Box = tuple[float, float, float, float]  # xyxy pixels, 0-based, x2 and y2 exclusive
Size = tuple[int, int]  # height, width
# float32, in which boxes are kept, still tells such sides from 0 in an image of 65,536 px.
_MIN_SIDE_PX = 0.01
# Less than this is a rounding of the tool that wrote the box.
_OVERHANG_PX = 1.0


def is_below(folder: Path, file: str | Path) -> bool:
    """Whether `file`, taken from `folder` on, is a path below it.

    By its text: a link that lies in the folder may lead out of it, for who laid it there meant it.
    """
    for place, path in (
        (folder.absolute(), folder.absolute() / file),
        (folder.resolve(), folder / file),  # where the folder itself was reached by a link
    ):
        top = Path(os.path.normpath(place))
        if top in Path(os.path.normpath(path)).parents:
            return True
    return False


class Findings:
    """What a reader finds wrong: raised at once, or collected to tell all of it.

    Args:
        invalid_boxes: `error`; or `clip`: a box is cut at the border of its image, and left out
            where nothing remains or its numbers are none. Each such box is listed in `mended`.
        collect: note every problem in `problems` and go on without what has it.

    An overhang of less than a pixel is a rounding error: such a box is cut without a word.
    """

    def __init__(self, invalid_boxes: str = "error", collect: bool = False) -> None:
        if invalid_boxes not in ("error", "clip"):
            raise ValueError(f"data.invalid_boxes must be error or clip, got {invalid_boxes!r}.")
        self.problems: list[str] = []
        self.mended: list[str] = []
        self._clip = invalid_boxes == "clip"
        self._collect = collect

    def wrong(self, error: Exception) -> None:
        """Raise `error`, or note it."""
        if not self._collect:
            raise error
        self.problems.append(str(error))

    def invalid_box(self, message: str) -> None:
        """Raise or note that a box is none; under `clip` it counts as mended."""
        if self._clip:
            self.mended.append(f"{message}: left out")
        else:
            hint = "Correct it, or set data.invalid_boxes: clip."
            self.wrong(ValueError(f"{message}. {hint}"))

    def box(self, box: Box, size: Size, place: str, written: str) -> Box | None:
        """Return the box within its image; None for one that is not to be used.

        Args:
            box: xyxy pixels, 0-based, x2 and y2 exclusive.
            size: (height, width) of its image.
            place: what an error calls the object.
            written: the numbers as the annotation has them.
        """
        if not all(map(math.isfinite, box)):
            self.invalid_box(f"{place}: the box must have finite numbers, not {written}")
            return None
        x1, y1, x2, y2 = box
        if x2 - x1 < _MIN_SIDE_PX or y2 - y1 < _MIN_SIDE_PX:
            self.invalid_box(f"{place}: the box is empty or inverted: {written}")
            return None
        height, width = size
        inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        is_left = inside[2] - inside[0] >= _MIN_SIDE_PX and inside[3] - inside[1] >= _MIN_SIDE_PX
        if max(-x1, -y1, x2 - width, y2 - height) >= _OVERHANG_PX or not is_left:
            message = (
                f"{place}: the box must lie in the image of {width}x{height} pixels, but is "
                f"{written}"
            )
            if not (self._clip and is_left):
                self.invalid_box(message)
                return None
            self.mended.append(f"{message}: cut at the border")
        return inside


# --- Where a data set comes from, and the official sizes of well-known ones.


class KnownDataset(NamedTuple):
    """A data set's official splits.

    Attributes:
        title: what a message calls it.
        names: hub ids, and what a folder or a saved data set calls itself: see `_plain`.
        images: the number of images by split.
        trap: the copy that is known to differ, and how.
    """

    title: str
    names: tuple[str, ...]
    images: Mapping[str, int]
    trap: str = ""


class SizeCheck(NamedTuple):
    """What a split's size says of it; `differs` where it should be the official one and is not."""

    text: str
    differs: bool


class Origin(NamedTuple):
    """Where a dataset comes from.

    Attributes:
        hub_id: on the Hugging Face hub; None for what is local.
        size_check: how its size compares with the official one; None where none is known.
        label_key: the config key of its labels where these are integers without names.
    """

    hub_id: str | None = None
    size_check: SizeCheck | None = None
    label_key: str | None = None


_FLOWERS_TRAP = (
    "nelorth/oxford-flowers has 7,169 and 1,020 images and its labels in the order of strings; "
    "dpdl-benchmark/oxford_flowers102 is the official split"
)
KNOWN = (
    KnownDataset("CIFAR-10", ("uoft-cs/cifar10", "cifar10"), {"train": 50_000, "test": 10_000}),
    KnownDataset("CIFAR-100", ("uoft-cs/cifar100", "cifar100"), {"train": 50_000, "test": 10_000}),
    KnownDataset(
        "Oxford Flowers-102",
        (
            "dpdl-benchmark/oxford_flowers102",
            "nelorth/oxford-flowers",
            "flowers102",
            "oxfordflowers102",
            "oxfordflowers",
        ),
        {"train": 1_020, "validation": 1_020, "test": 6_149},
        _FLOWERS_TRAP,
    ),
    KnownDataset(
        "Stanford Cars",
        ("tanganke/stanford_cars", "stanfordcars"),
        {"train": 8_144, "test": 8_041},
    ),
    KnownDataset("MNIST", ("ylecun/mnist", "mnist"), {"train": 60_000, "test": 10_000}),
    KnownDataset(
        "Fashion-MNIST",
        ("zalando-datasets/fashion_mnist", "fashionmnist"),
        {"train": 60_000, "test": 10_000},
    ),
    KnownDataset(
        "Food-101",
        ("ethz/food101", "food101"),
        {"train": 75_750, "validation": 25_250, "test": 25_250},
    ),
    KnownDataset(
        "ImageNet-1k",
        ("ilsvrc/imagenet-1k", "imagenet1k"),
        {"train": 1_281_167, "validation": 50_000, "test": 100_000},
    ),
    KnownDataset("COCO 2014", (), {"train": 82_783, "validation": 40_504}),
    KnownDataset(
        "COCO 2017",
        ("detection-datasets/coco", "coco2017"),
        {"train": 118_287, "validation": 5_000},
        "without the images that show no object there are 117,266 and 4,952",
    ),
    KnownDataset("VOC 2007", (), {"train": 2_501, "val": 2_510, "trainval": 5_011, "test": 4_952}),
    KnownDataset("VOC 2012", (), {"train": 5_717, "val": 5_823, "trainval": 11_540}),
)
_ALIASES = {"val": "validation", "valid": "validation"}


def check_size(
    path: str, declared: str | None, is_hub: bool, split: str, count: int
) -> SizeCheck | None:
    """Compare the size of a Hugging Face split with the official one.

    Args:
        path: hub id, folder or file; what is local is called by its folder's name.
        declared: the data set's own name for itself, as a saved one has it.
        split: as in the config, such as `train`, `train+validation` or `train[:10%]`. A slice is
            stated and never told to differ.
        count: images in it.

    Returns:
        None where data set or split is not known here.
    """
    called = (path,) if is_hub else (declared, _folder_name(path))
    names = {_plain(name) for name in called if name}
    for known in KNOWN:
        if names & {_plain(name) for name in known.names}:
            parts = [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]
            official = [known.images.get(_ALIASES.get(part, part)) for part in parts]
            return _compare(known, split, official, count)
    return None


def check_voc_sets(sets: Sequence[str], count: int) -> SizeCheck | None:
    """Compare the size of image sets of a VOC devkit, as `2007/trainval`, with the official one."""
    years = [voc_set.removeprefix("VOC").partition("/") for voc_set in sets]
    tables = {known.title: known.images for known in KNOWN}
    official = [tables.get(f"VOC {year}", {}).get(name) for year, _, name in years]
    return _compare(KnownDataset("VOC", (), {}), "+".join(sets), official, count)


def check_coco_file(annotations: Path, count: int) -> SizeCheck | None:
    """Compare the size of a COCO file by its official name, as `instances_val2017.json`."""
    named = re.fullmatch(r"instances_(train|val)(20\d\d)", annotations.stem)
    if named is None:
        return None
    split, title = named[1], f"COCO {named[2]}"
    for known in KNOWN:
        if known.title == title:
            return _compare(known, split, [known.images.get(_ALIASES.get(split, split))], count)
    return None


def size_checks(datasets: Mapping[str, Any]) -> dict[str, SizeCheck]:
    """Return how the splits' sizes compare with official ones, by split, where any are known."""
    checks = {split: dataset.origin.size_check for split, dataset in datasets.items()}
    return {split: check for split, check in checks.items() if check is not None}


def _compare(
    known: KnownDataset, split: str, official: Sequence[int | None], count: int
) -> SizeCheck | None:
    sizes = [size for size in official if size is not None]
    if len(sizes) < len(official):
        return None
    total = sum(sizes)
    if "[" in split:
        text = f"{known.title} {split}: {count:,} images, a slice of the official {total:,}"
        return SizeCheck(text, False)
    if count == total:
        return SizeCheck(f"{known.title} {split}: all {total:,} official images", False)
    text = (
        f"{known.title} {split}: {count:,} images, but the official split has {total:,}: numbers "
        "on it do not compare with published ones"
    )
    return SizeCheck(f"{text} ({known.trap})" if known.trap else text, True)


def _folder_name(path: str) -> str:
    """Name of the folder, or of the one that a file lies in."""
    place = Path(path).expanduser().absolute()
    return place.parent.name if place.is_file() else place.name


def _plain(name: str) -> str:
    """Lower case without `-`, `_` and spaces: CIFAR-10 is cifar10."""
    return re.sub(r"[-_ ]", "", name.lower())
