"""Where a data set comes from, and the official sizes of well-known ones.

A copy that is another split, or a part, shows by its size.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


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
