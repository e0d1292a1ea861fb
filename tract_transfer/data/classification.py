"""Classification data sets, the classes that all splits share, and held-out parts."""

# N images, K classes

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, TypeVar

import numpy as np

from tract_transfer.data.detection import DetectionDataset
from tract_transfer.data.findings import Origin
from tract_transfer.data.images import ImageSource, IndexedImages, fingerprint

Held = TypeVar("Held", "ClassificationDataset", DetectionDataset)
RENUMBER = (
    "Number them 0, 1, ... with class_encode_column on all splits together, and save_to_disk."
)


class ClassificationDataset(IndexedImages):
    """Images and their classes: `labels` is int64 (N,), in 0..K-1."""

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        labels: np.ndarray,
        source: ImageSource,
        rows: Sequence[int] | np.ndarray | None = None,
        origin: Origin | None = None,
    ) -> None:
        super().__init__(name, class_names, source, len(labels), rows, origin)
        self.labels = np.asarray(labels, dtype=np.int64)

    @property
    def class_counts(self) -> np.ndarray:
        """The number of images of each class, int64 (K,)."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    @property
    def strata(self) -> np.ndarray:
        """The class of each image, int64 (N,), of which `hold_out` takes the same part."""
        return self.labels

    def target(self, index: int) -> int:
        """Return an image's class, in 0..K-1."""
        return int(self.labels[index])

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of length, class names, labels and 64 images' stored bytes."""
        return fingerprint(self, self.labels)

    def select(self, indices: Sequence[int] | np.ndarray, name: str) -> "ClassificationDataset":
        """Return the data set of these images, in this order; it keeps all classes."""
        selected = super().select(indices, name)
        selected.labels = self.labels[np.asarray(indices, dtype=np.int64)]
        return selected


def hold_out(dataset: Held, fraction: float, seed: int) -> tuple[Held, Held]:
    """Split off a stratified part for validation or for the report; `fraction` lies in (0, 1).

    It gets `round(fraction * count)` images of each class: at least one if the class has two, and
    never all. An image with boxes counts for the rarest of its classes. Returns (the rest, the
    held-out part), both in the order of the data set.
    """
    generator = np.random.default_rng(seed)
    is_held_out = np.zeros(len(dataset), dtype=bool)
    strata = dataset.strata
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        is_held_out[generator.permutation(members)[: max(count, 0)]] = True
    if not is_held_out.any():
        raise ValueError(
            f"{dataset.name}: nothing to hold out, no class has two images. Use a split of its own."
        )
    # These names are part of a run's protocol in results.json: keep them stable.
    return (
        dataset.select(np.flatnonzero(~is_held_out), f"{dataset.name} without {fraction:.0%}"),
        dataset.select(np.flatnonzero(is_held_out), f"{dataset.name}, held-out {fraction:.0%}"),
    )


def shown_classes(dataset: Any) -> set[int] | None:
    """Return the classes that have an image; None for a stream that is not read."""
    counts = dataset.class_counts
    return None if counts is None else set(np.flatnonzero(counts).tolist())


def join_integer_classes(datasets: Mapping[str, Any]) -> None:
    """Give all splits whose labels are integers without names the same classes.

    The K classes are "0", "1", ... up to the largest label in any split. A class without images
    stays: labels are never renumbered, and `check_same_classes` warns.

    Raises:
        ValueError: most classes have no image in any split, as with ids that are no class numbers.
    """
    unnamed = [dataset for dataset in datasets.values() if dataset.origin.label_key is not None]
    if not unnamed:
        return
    key, num_classes = unnamed[0].origin.label_key, max(len(d.class_names) for d in unnamed)
    shown_by_split = [shown_classes(dataset) for dataset in unnamed]
    if None not in shown_by_split:
        shown = sorted(set().union(*(classes or () for classes in shown_by_split)))
        if 2 * len(shown) < num_classes:
            raise ValueError(
                f"{key}: its integers show {len(shown)} classes between {shown[0]} and "
                f"{shown[-1]}, so {num_classes - len(shown)} of {num_classes} would have no image. "
                f"{RENUMBER}"
            )
    for dataset in unnamed:
        dataset.class_names = [str(label) for label in range(num_classes)]


def check_same_classes(datasets: Mapping[str, Any]) -> list[str]:
    """Check that the splits have the same classes in the same order; the first is the reference.

    An image folder that lacks one class shifts the labels of all later ones, which no result would
    reveal. A class without examples shifts nothing and gives a warning.

    Returns:
        Warnings, such as `test has no example of 13 of 102 classes: a, b, ...`.
    """
    reference = next(iter(datasets))
    names = datasets[reference].class_names
    trained = shown_classes(datasets["train"]) if "train" in datasets else None
    absent, untrained = [], []
    for split, dataset in datasets.items():
        if dataset.class_names != names:
            raise ValueError(_class_difference(reference, names, split, dataset.class_names))
        shown = shown_classes(dataset)
        if shown is None:
            continue
        if missing := [name for k, name in enumerate(names) if k not in shown]:
            absent.append(
                f"{split} has no example of {len(missing)} of {len(names)} classes: "
                f"{_first_five(missing)}"
            )
        if trained is not None and (unseen := [names[k] for k in sorted(shown - trained)]):
            untrained.append(
                f"{split} has examples of {len(unseen)} classes that train never shows: "
                f"{_first_five(unseen)}"
            )
    return absent + untrained


def _class_difference(reference: str, expected: list[str], split: str, names: list[str]) -> str:
    for (lacking, has), (other, needed) in permutations([(split, names), (reference, expected)]):
        if missing := sorted(set(needed) - set(has)):
            return (
                f"All splits must have the same classes: {lacking} lacks {len(missing)} that "
                f"{other} has ({_first_five(missing)}), which shifts its labels. Add them "
                f"to {lacking} (in an image folder, an empty folder does not count), or load both "
                "from one dataset."
            )
    k = next(k for k in range(len(names)) if names[k] != expected[k])
    return (
        f"All splits must have the same classes in the same order: class {k} is {expected[k]!r} "
        f"in {reference} and {names[k]!r} in {split}."
    )


def _first_five(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
