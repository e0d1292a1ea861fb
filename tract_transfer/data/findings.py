"""Problems in data sets, raised or collected; where data come from, and official split sizes."""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

Box = tuple[float, float, float, float]  # xyxy pixels, 0-based, x2 and y2 exclusive
Size = tuple[int, int]  # height, width
_MIN_SIDE_PX = 0.01  # float32 still resolves it in an image of 65,536 px
_OVERHANG_PX = 1.0  # anything less is rounding by the tool that wrote the box


class Findings:
    """Problems that a reader finds: the first is raised, or all are collected.

    Args:
        invalid_boxes: `error`, or `clip`: a box is clipped to its image, and dropped if nothing
            remains or its numbers are not finite. `clipped_boxes` lists every such box.
        collect: append every problem to `problems` and skip the item that has it.
    """

    def __init__(self, invalid_boxes: str = "error", collect: bool = False) -> None:
        self.problems: list[str] = []
        self.clipped_boxes: list[str] = []
        self._clip = invalid_boxes == "clip"
        self._collect = collect

    def report(self, error: Exception) -> None:
        """Raise `error`, or collect it."""
        if not self._collect:
            raise error
        self.problems.append(str(error))

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Report an error of the block, which reads one item."""
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            self.report(error)

    def check_box(self, box: Box, size: Size, item: str, written: str) -> Box | None:
        """Return the box clipped to its image, or None if it cannot be used.

        Messages name it `item`, and state it as the annotation does (`written`). An overhang below
        one pixel is a rounding error and not reported.
        """
        (x1, y1, x2, y2), (height, width) = box, size
        inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        is_finite = all(map(math.isfinite, box))
        kept = inside if is_finite and not _is_thin(inside) else None
        if not is_finite:
            problem = f"the box must be four finite numbers, not {written}"
        elif _is_thin(box):
            problem = f"the box is empty or inverted: {written}"
        elif kept is None or max(-x1, -y1, x2 - width, y2 - height) >= _OVERHANG_PX:
            problem = f"the box must lie in the image of {width}x{height} pixels, but is {written}"
        else:
            return kept
        if self._clip:
            self.clipped_boxes.append(f"{item}: {problem}: {'clipped' if kept else 'dropped'}")
            return kept
        self.report(ValueError(f"{item}: {problem}. Correct it, or set data.invalid_boxes: clip."))
        return None


def _is_thin(box: Box) -> bool:
    return min(box[2] - box[0], box[3] - box[1]) < _MIN_SIDE_PX


def is_below(folder: Path, file: str | Path) -> bool:
    """Whether `file`, relative to `folder`, is a path below it. Links in it may lead out of it."""
    path = Path(os.path.normpath(folder.absolute() / file))
    # The folder itself may be reached through a link.
    return not {Path(os.path.normpath(folder.absolute())), folder.resolve()}.isdisjoint(
        path.parents
    )


# Where a data set comes from, and the official split sizes of well-known ones.


class SizeCheck(NamedTuple):
    """How the size of a split compares with the official one; `differs` asks for a warning."""

    text: str
    differs: bool


class Origin(NamedTuple):
    """Where a data set comes from.

    Attributes:
        hub_id: its id on the Hugging Face hub; None for local data.
        size_check: its size against the official one; None if there is none.
        label_key: the config key of its labels if they are integers without names.
    """

    hub_id: str | None = None
    size_check: SizeCheck | None = None
    label_key: str | None = None


class KnownDataset(NamedTuple):
    """The official number of images by split of a data set, and a copy that differs (`trap`).

    `names` are hub ids, and names of folders and saved data sets: see `_normalized`.
    """

    title: str
    names: str
    images: Mapping[str, int]
    trap: str = ""


KNOWN = (
    KnownDataset("CIFAR-10", "uoft-cs/cifar10 cifar10", {"train": 50_000, "test": 10_000}),
    KnownDataset("CIFAR-100", "uoft-cs/cifar100 cifar100", {"train": 50_000, "test": 10_000}),
    KnownDataset("Oxford Flowers-102", "dpdl-benchmark/oxford_flowers102 nelorth/oxford-flowers "
        "flowers102 oxfordflowers102 oxfordflowers",
        {"train": 1_020, "validation": 1_020, "test": 6_149},
        "nelorth/oxford-flowers has 7,169 and 1,020 images and its labels in the order of strings; "
        "dpdl-benchmark/oxford_flowers102 is the official split"),
    KnownDataset("Stanford Cars", "tanganke/stanford_cars stanfordcars",
        {"train": 8_144, "test": 8_041}),
    KnownDataset("MNIST", "ylecun/mnist mnist", {"train": 60_000, "test": 10_000}),
    KnownDataset("Fashion-MNIST", "zalando-datasets/fashion_mnist fashionmnist",
        {"train": 60_000, "test": 10_000}),
    KnownDataset("Food-101", "ethz/food101 food101",
        {"train": 75_750, "validation": 25_250, "test": 25_250}),
    KnownDataset("ImageNet-1k", "ilsvrc/imagenet-1k imagenet1k",
        {"train": 1_281_167, "validation": 50_000, "test": 100_000}),
    KnownDataset("COCO 2014", "", {"train": 82_783, "validation": 40_504}),
    KnownDataset("COCO 2017", "detection-datasets/coco coco2017",
        {"train": 118_287, "validation": 5_000},
        "without the images that show no object there are 117,266 and 4,952"),
    KnownDataset("VOC 2007", "", {"train": 2_501, "val": 2_510, "trainval": 5_011, "test": 4_952}),
    KnownDataset("VOC 2012", "", {"train": 5_717, "val": 5_823, "trainval": 11_540}),
)  # fmt: skip
_BY_TITLE = {entry.title: entry for entry in KNOWN}
_ALIASES = {"val": "validation", "valid": "validation"}


def split_names(split: str) -> list[str]:
    """Return the names in a split such as `train[:10%]+test`."""
    return [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]


def check_size(
    path: str, declared: str | None, is_hub: bool, split: str, count: int
) -> SizeCheck | None:
    """Compare the size of a Hugging Face split with the official one.

    Args:
        path: hub id, folder or file; local data go by the name of their folder.
        declared: the name that a saved data set states for itself.
        split: as in the config, such as `train+validation`. A slice never counts as differing.

    Returns:
        None if the data set or the split is not known here.
    """
    local = Path(path).expanduser().absolute()
    folder = local.parent if local.is_file() else local
    names = {_normalized(n) for n in ((path,) if is_hub else (declared, folder.name)) if n}
    for entry in KNOWN:
        if names & set(map(_normalized, entry.names.split())):
            official = [entry.images.get(_ALIASES.get(n, n)) for n in split_names(split)]
            return _compare(entry.title, split, official, count, entry.trap)
    return None


def check_voc_sets(sets: Sequence[str], count: int) -> SizeCheck | None:
    """Compare the size of VOC image sets, such as `2007/trainval`, with the official one."""
    official = []
    for year, _, name in (voc_set.removeprefix("VOC").partition("/") for voc_set in sets):
        entry = _BY_TITLE.get(f"VOC {year}")
        official.append(entry.images.get(name) if entry else None)
    return _compare("VOC", "+".join(sets), official, count)


def check_coco_file(annotations: Path, count: int) -> SizeCheck | None:
    """Compare the size of a COCO file with an official name, as `instances_val2017.json`."""
    match = re.fullmatch(r"instances_(train|val)(2014|2017)", annotations.stem)
    if match is None:
        return None
    coco, split = _BY_TITLE[f"COCO {match[2]}"], match[1]
    return _compare(coco.title, split, [coco.images[_ALIASES.get(split, split)]], count, coco.trap)


def size_checks(datasets: Mapping[str, Any]) -> dict[str, SizeCheck]:
    """Return how the sizes of splits compare with official ones, by split, if they are known."""
    checks = {split: dataset.origin.size_check for split, dataset in datasets.items()}
    return {split: check for split, check in checks.items() if check is not None}


def _compare(
    title: str, split: str, official: Sequence[int | None], count: int, trap: str = ""
) -> SizeCheck | None:
    """These texts are part of a run's protocol in results.json: keep them stable."""
    sizes = [size for size in official if size is not None]
    if len(sizes) < len(official):
        return None
    text, total = f"{title} {split}: ", sum(sizes)
    if "[" in split:
        return SizeCheck(f"{text}{count:,} images, a slice of the official {total:,}", False)
    if count == total:
        return SizeCheck(f"{text}all {total:,} official images", False)
    text += (
        f"{count:,} images, but the official split has {total:,}: numbers on it do not compare "
        "with published ones"
    )
    return SizeCheck(f"{text} ({trap})" if trap else text, True)


def _normalized(name: str) -> str:
    """Lower case without `-`, `_` and spaces: CIFAR-10 is cifar10."""
    return re.sub(r"[-_ ]", "", name.lower())
