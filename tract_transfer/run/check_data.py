"""Checking all data of a config: everything that is broken, instead of the first error."""

from dataclasses import asdict, dataclass, field
from typing import Any, cast

from tract_transfer.build.data import Loaded, check_disjoint, load_split
from tract_transfer.config.data import HeldOutSource
from tract_transfer.config.schema import Config
from tract_transfer.data.check import Progress, check_images, statistics
from tract_transfer.data.classification import check_same_classes, join_integer_classes
from tract_transfer.data.findings import Findings, size_checks


@dataclass
class SplitReport:
    """The broken images and annotations of a split, and its statistics."""

    name: str
    problems: list[str]
    statistics: dict[str, Any] | None


@dataclass
class DataReport:
    """Reports of the splits (`train`, `val`, `test`), and what is wrong between them.

    `problems` stop a run or make its numbers wrong; `warnings` may be harmless.
    """

    splits: dict[str, SplitReport] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is broken."""
        return not (self.problems or any(split.problems for split in self.splits.values()))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return {"is_clean": self.is_clean, **asdict(self)}


def check_data(config: Config, progress: Progress | None = None) -> DataReport:
    """Open every image and read every annotation of a config's splits.

    Images and boxes that `data.undecodable` and `data.invalid_boxes` skip count as broken.
    """
    report = DataReport()
    loaded: dict[str, Loaded] = {}
    item_of: dict[str, str] = {}  # sha256 of the pixels -> split and image
    for name in ("train", "val", "test"):
        section = getattr(config.data, name, None)
        if section is None or isinstance(section, HeldOutSource):  # a part of train
            continue
        findings = Findings(collect=True)
        try:
            dataset = load_split(section, f"data.{name}", findings, config.data.max_pixels)
        except (ValueError, OSError) as error:
            report.splits[name] = SplitReport(name, [*findings.problems, str(error)], None)
            continue
        loaded[name] = dataset
        images = check_images(dataset, progress)
        report.splits[name] = SplitReport(
            dataset.name,
            [*findings.problems, *images.problems],
            statistics(dataset, images.sizes),
        )
        report.warnings += [f"{name}: {text}" for text in images.turned]
        for first, again in images.repeated:
            report.warnings.append(f"{name}: {again} shows the same as {first}")
        for digest, item in images.items.items():
            other = item_of.setdefault(digest, f"{name}: {item}")
            if other != f"{name}: {item}":
                report.warnings.append(f"{name}: {item} shows the same as {other}")
    if loaded:
        _check_between(loaded, report)
    return report


def _check_between(loaded: dict[str, Loaded], report: DataReport) -> None:
    """Add problems and warnings about several splits to the report."""
    checks = size_checks(loaded)
    report.warnings += [f"{n}: {check.text}" for n, check in checks.items() if check.differs]
    try:
        join_integer_classes(loaded)
        report.warnings += check_same_classes(cast(Any, loaded))
    except ValueError as error:
        report.problems.append(str(error))
    try:
        check_disjoint(loaded)
    except (ValueError, OSError) as error:
        report.problems.append(str(error))
